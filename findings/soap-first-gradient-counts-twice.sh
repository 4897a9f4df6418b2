#!/usr/bin/env bash
# SOAP keeps running means of G G^T and G^T G of every matrix, from which it takes its eigenbasis. In
# pytorch-optimizer 4.1.0 a parameter that has a gradient in the first step gets them right. One that
# has its first gradient in a later step, as an expert that got no token before, is set up and then
# updated in that same step: this gradient enters the means twice, and is applied at once in the
# basis of itself, while other parameters skip their first step. The optimizer counts steps for a
# group, not for a parameter, so nobody can see it afterwards. Whoever reads curvature from these
# means, or compares experts by them, gets a false scale for experts that come late.
set -u
dir=$(mktemp -d) && trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv" || exit 2
"$dir/venv/bin/pip" install --quiet torch==2.13.0 || exit 2
"$dir/venv/bin/pip" install --quiet pytorch-optimizer==4.1.0 || exit 2
cd "$dir" && "$dir/venv/bin/python" -W ignore - <<'EOF'
import torch
from pytorch_optimizer import SOAP

BETA, STEPS, LATE_FROM = 0.95, 6, 3


def mean_of(gradients):
    """The running mean of G G^T."""
    mean = torch.zeros(4, 4)
    for gradient in gradients:
        mean = BETA * mean + (1 - BETA) * gradient @ gradient.T
    return mean


torch.manual_seed(0)
early, late = (torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(2))
seen = {early: [], late: []}
optimizer = SOAP([early, late], lr=1e-3, betas=(BETA, BETA))
for step in range(STEPS):
    optimizer.zero_grad()
    for weight in (early, late) if step >= LATE_FROM else (early,):
        weight.grad = torch.randn_like(weight)
        seen[weight].append(weight.grad.clone())
    before = late.detach().clone()
    optimizer.step()
    if step in (0, LATE_FROM):
        print(f"step {step}: moved the late parameter by {float((late - before).norm()):.4f}, in all the early one by "
              f"{float(early.norm()):.4f}")


def off(weight, gradients):
    held, true = optimizer.state[weight]["GG"][0], mean_of(gradients)
    return float((held - true).norm() / true.norm())


results = off(early, seen[early]), off(late, seen[late]), off(late, [seen[late][0], *seen[late]])
print("pytorch-optimizer 4.1.0; relative error of the held mean of G G^T")
print(f"gradients from the first step on  {results[0]:.1e}")
print(f"gradients from step {LATE_FROM} on          {results[1]:.2f}, and {results[2]:.1e} if the first counts twice")
print("kept for a parameter:", ", ".join(optimizer.state[late]))
same = results[0] < 1e-5 and results[1] > 0.1 and results[2] < 1e-5 and "step" not in optimizer.state[late]
print("as stated" if same else "CHANGED")
raise SystemExit(0 if same else 1)
EOF
