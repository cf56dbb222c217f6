"""A run that can be killed at any instant: started again, it goes on from its last checkpoint, with the same bits.

    python examples/resume_after_crash.py --out runs/toy --steps 200     # stop it: Ctrl-C, kill -9, a power cut
    python examples/resume_after_crash.py --out runs/toy --steps 200     # the same command goes on

A checkpoint is a directory that is whole or absent, written while the next steps run. Any placement loads it: a run may
go on with other options of `wrap`, on another machine.
"""

import argparse
from pathlib import Path

import torch

import offload

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="a directory for checkpoints (default runs/toy)")
parser.add_argument("--steps", type=int, default=40, help="of the whole run (default 40)")
parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints (default 10)")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8))).bfloat16()
optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optim = offload.wrap(model, optim, optimizer="host", gradients="host", device=device)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, T_max=args.steps)

first = 0
if (args.out / "latest").exists():  # it names the last checkpoint that is whole
    saved = offload.load_checkpoint(args.out, model, optim)
    first = saved.client_state["step"]
    schedule.load_state_dict(saved.client_state["schedule"])
    print(f"goes on from {saved.path}")

for step in range(first, args.steps):
    # Batches by the number of the step: the data goes on where it was, too.
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(step)).to(device, torch.bfloat16)
    loss = (model(x) - x).square().mean()
    loss.backward()
    optim.step()
    schedule.step()
    optim.zero_grad()
    if (step + 1) % args.every == 0:
        state = {"step": step + 1, "schedule": schedule.state_dict()}
        offload.save_checkpoint(
            args.out, model, optim, tag=f"step{step + 1}", client_state=state, async_save=True, keep=2
        )
    print(f"step {step}: loss {loss.item():.6f}")
