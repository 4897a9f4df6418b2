#!/usr/bin/env bash
# Muon gives every matrix an update whose singular values are all about 1. Experts that are fused in
# one parameter (experts, out, in), as transformers 5 holds them, are matrices side by side, so one
# would expect that for each expert. Muon of pytorch-optimizer 4.1.0 and of heavyball 3.2.1 flattens
# what follows the first dimension, as for convolutions: it orthogonalizes one matrix
# (experts, out * in), whose rows are whole experts. An expert's update is then its own gradient,
# scaled, minus what it has in common with the other experts': the singular values keep their
# spread, and the update has the size of one direction instead of all. Nothing warns. The same
# matrices as parameters of their own, the control, get singular values of about 1. Muon of torch
# 2.13 refuses parameters of three dimensions. Give fused experts to another optimizer, or one that
# takes batches of matrices.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet pytorch-optimizer==4.1.0 heavyball==3.2.1 || exit 2
cd "$dir" && "$dir/venv/bin/python" -W ignore - <<'EOF'
import heavyball
import torch
from pytorch_optimizer import Muon

heavyball.utils.compile_mode = heavyball.utils.compile_mode_recommended_to_none = None  # the same steps, not compiled
torch.manual_seed(0)
GRADIENTS = torch.randn(4, 16, 32) @ torch.diag(torch.logspace(0, -2, 32))  # of four experts, no two directions alike


def of_pytorch_optimizer(weights):
    return Muon([{"params": weights, "use_muon": True}], lr=1.0, momentum=0.0, nesterov=False)


def of_heavyball(weights):
    return heavyball.Muon(weights, lr=1.0, betas=(0.0, 0.0), nesterov=False)


def update(optimizer, fused):
    """The first step of four experts, (4, 16, 32)."""
    weights = [GRADIENTS] if fused else list(GRADIENTS)
    weights = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in weights]
    for weight, gradient in zip(weights, [GRADIENTS] if fused else GRADIENTS):
        weight.grad = gradient.clone()
    optimizer(weights).step()
    return -(weights[0] if fused else torch.stack(weights)).detach()


def spread(matrices):
    """Largest over smallest singular value, the median of the experts."""
    values = torch.linalg.svdvals(matrices)
    return float((values[:, 0] / values[:, -1]).median())


print(f"singular values, largest over smallest: gradient {spread(GRADIENTS):.1f}")
same = True
for name, optimizer in (("pytorch-optimizer", of_pytorch_optimizer), ("heavyball", of_heavyball)):
    fused, apart = update(optimizer, True), update(optimizer, False)
    alike = torch.nn.functional.cosine_similarity(fused.flatten(1), GRADIENTS.flatten(1))
    sizes = float((fused.flatten(1).norm(dim=1) / apart.flatten(1).norm(dim=1)).median())
    print(f"{name:17} fused {spread(fused):.1f}, apart {spread(apart):.1f}; fused update over the one apart "
          f"{sizes:.2f} in size, and to the gradient at a cosine of {float(alike.min()):.3f} or more")
    same = same and spread(fused) > 0.5 * spread(GRADIENTS) > 4 * spread(apart) and float(alike.min()) > 0.9
try:
    torch.optim.Muon([torch.nn.Parameter(GRADIENTS.clone())])
    print("torch              took three dimensions")
    same = False
except ValueError as error:
    print(f"torch              ValueError: {error}")
print("as stated" if same else "CHANGED")
raise SystemExit(0 if same else 1)
EOF
