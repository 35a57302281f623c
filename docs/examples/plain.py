"""A WGAN-GP on the ring, in a loop of your own. Run it again, and it goes on where it stood."""

import argparse
import os
from pathlib import Path

import torch
from torch import nn

import lipgan

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--checkpoint", type=Path, default=Path("plain.pt"))
args = parser.parse_args()

torch.manual_seed(0)
samples = lipgan.data.load("ring").samples  # [n, 2]
generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
of_generator = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.0, 0.9))
of_critic = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.0, 0.9))
parts = {"generator": generator, "critic": critic, "of_generator": of_generator, "of_critic": of_critic}

done = 0
if args.checkpoint.exists():
    state = torch.load(args.checkpoint, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    done = state["step"]

for step in range(done + 1, args.steps + 1):
    for _ in range(2):
        real = samples[torch.randint(len(samples), (64,))]
        fake = generator(torch.randn(64, 8)).detach()
        loss = lipgan.critic_loss(critic, real, fake, "wasserstein", kind="wgan-gp")
        of_critic.zero_grad()
        loss.total.backward()
        of_critic.step()
    of_generator.zero_grad()
    (-critic(generator(torch.randn(64, 8))).mean()).backward()
    of_generator.step()
    if step % 500 == 0 or step == args.steps:
        state = {name: part.state_dict() for name, part in parts.items()}
        partial = args.checkpoint.with_suffix(".partial")
        torch.save({**state, "random": torch.get_rng_state(), "step": step}, partial)
        os.replace(partial, args.checkpoint)  # a file is whole, whenever the program is killed
        print(f"step {step}: critic {float(loss.loss):.3f}, penalty {float(loss.penalty):.3f}")
