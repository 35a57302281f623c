"""A WGAN-GP on the ring with accelerate: python, or accelerate launch, with_accelerate.py. Run it again: it goes on."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lipgan

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--folder", type=Path, default=Path("with_accelerate"))
args = parser.parse_args()

accelerator = Accelerator()
set_seed(0)
generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
of_generator = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.0, 0.9))
of_critic = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.0, 0.9))
loader = DataLoader(TensorDataset(lipgan.data.load("ring").samples), batch_size=512, shuffle=True)
everything = accelerator.prepare(generator, critic, of_generator, of_critic, loader)
generator, critic, of_generator, of_critic, loader = everything
set_seed(0, device_specific=True)  # other noise and other mixtures in each process


class Progress:
    """What accelerate saves and loads beside networks, optimizers and random numbers."""

    epoch = 0

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


progress = Progress()
accelerator.register_for_checkpointing(progress)
if args.folder.exists():
    accelerator.load_state(str(args.folder))

while progress.epoch < args.epochs:
    progress.epoch += 1
    for (real,) in loader:
        fake = generator(torch.randn(len(real), 8, device=accelerator.device))
        loss = lipgan.critic_loss(critic, real, fake.detach(), "wasserstein", kind="wgan-gp")
        of_critic.zero_grad()
        accelerator.backward(loss.total)  # the wrapper goes into lipgan as it is
        of_critic.step()
        of_generator.zero_grad()
        accelerator.backward(-critic(fake).mean())
        of_generator.step()
    accelerator.save_state(str(args.folder))
    accelerator.print(f"epoch {progress.epoch}: critic {float(loss.loss):.3f}, penalty {float(loss.penalty):.3f}")
