"""Parts of modules for tests of discovery: parameters and lists of modules under any name."""

import torch
from torch import nn


class Holder(nn.Module):
    """Modules and parameters under given names."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def bank(*shape):
    return nn.Parameter(torch.randn(*shape))


def linears(count, width=16):
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))
