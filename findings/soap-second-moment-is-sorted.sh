#!/usr/bin/env bash
# exp_avg_sq of an Adam-like optimizer is the running mean of each parameter's squared gradient.
# In SOAP of pytorch-optimizer 4.1.0 it has that name and the parameter's shape too, so one would
# expect to read from it which expert or input column had the largest gradients. It lies in the
# eigenbasis of the gradients, largest eigenvalue first, also along the expert dimension of fused
# experts: the sum is right within 1 %, but entry 0 is the strongest direction, whichever expert that
# is. Here expert 0, which gets 2 % of the tokens, appears to hold two thirds of the sum, and truly
# holds 1 % of it; AdamW on the same data, the control, gives the true shares. Whoever takes
# importance from saved optimizer states must leave SOAP out or rotate back.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet pytorch-optimizer==4.1.0 || exit 2
cd "$dir" && "$dir/venv/bin/python" -W ignore - <<'EOF'
import torch
from pytorch_optimizer import SOAP

SHARES = torch.tensor([0.02, 0.30, 0.08, 0.60])  # of the tokens, experts 0 to 3


def ranks(values):
    return values.flatten().argsort().argsort().float()


def rank_correlation(a, b):
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def train(optimizer):
    """Fits four fused linear experts for 300 steps; returns (held, true) second moments, (4, 16, 32)."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 16, 32) * 0.1)
    teacher = torch.randn(4, 16, 32)
    columns = torch.logspace(-1, 1, 32)[torch.randperm(32)]  # the inputs' scales
    stepper = optimizer([weight], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    true = torch.zeros_like(weight)
    for _ in range(300):
        expert = torch.multinomial(SHARES, 64, replacement=True)
        inputs = torch.randn(64, 32) * columns
        target = torch.einsum("boi,bi->bo", teacher[expert], inputs) + torch.randn(64, 16)
        loss = (torch.einsum("boi,bi->bo", weight[expert], inputs) - target).square().mean()
        stepper.zero_grad()
        loss.backward()
        true.mul_(0.999).add_(weight.grad.square(), alpha=0.001)
        stepper.step()
    return stepper.state[weight]["exp_avg_sq"], true


print("pytorch-optimizer 4.1.0; exp_avg_sq against the running mean of the squared gradients")
readings = {}
for name, optimizer in (("AdamW", torch.optim.AdamW), ("SOAP", SOAP)):
    held, true = train(optimizer)
    total = float(held.sum() / true.sum())
    columns = rank_correlation(held.sum((0, 1)), true.sum((0, 1)))
    shares, true_shares = (moments.sum((1, 2)) / moments.sum() for moments in (held, true))
    readings[name] = (held.shape == true.shape, total, columns, shares, true_shares)
    print(f"{name:5} shape alike {held.shape == true.shape}, sum {total:.3f} of the true one, "
          f"rank correlation of columns {columns:+.2f}")
    print(f"      experts 0 to 3 hold {[round(s, 3) for s in shares.tolist()]}, "
          f"truly {[round(s, 3) for s in true_shares.tolist()]}")
adam, soap = readings["AdamW"], readings["SOAP"]
same = (
    adam[0] and adam[2] > 0.99 and torch.allclose(adam[3], adam[4], atol=0.01)
    and soap[0] and abs(soap[1] - 1) < 0.05 and soap[2] < 0.5
    and soap[3].argmax() == 0 and soap[4].argmax() == 3 and soap[4].argmin() == 0
)
print("as stated" if same else "CHANGED")
raise SystemExit(0 if same else 1)
EOF
