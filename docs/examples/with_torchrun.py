"""A WGAN-GP on the ring in several processes: torchrun --nproc-per-node 2 with_torchrun.py

SIGTERM, which clusters send before they end a job, saves after the step under way. Run it again, and it goes on.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lipgan

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--checkpoint", type=Path, default=Path("with_torchrun.pt"))
args = parser.parse_args()
received = []
signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
dist.init_process_group("gloo")  # "nccl" on GPUs, with the networks on cuda:LOCAL_RANK
torch.manual_seed(0)
generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
generator, critic = DistributedDataParallel(generator), DistributedDataParallel(critic)
of_generator = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.0, 0.9))
of_critic = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.0, 0.9))
parts = {"generator": generator, "critic": critic, "of_generator": of_generator, "of_critic": of_critic}
done, stopping = 0, False
if args.checkpoint.exists():  # the first process writes, all read: they are alike
    state = torch.load(args.checkpoint, weights_only=True)
    done = state.pop("step")
    for name, part in parts.items():
        part.load_state_dict(state[name])
samples, batch = lipgan.data.load("ring").samples, 64 // dist.get_world_size()
for step in range(done + 1, args.steps + 1):
    # Other samples in each process, and in each step, whether resumed or not.
    torch.manual_seed(step * dist.get_world_size() + dist.get_rank())
    real, fake = samples[torch.randint(len(samples), (batch,))], generator(torch.randn(batch, 8))
    of_critic.zero_grad()
    lipgan.critic_loss(critic, real, fake.detach(), "wasserstein", kind="wgan-gp").total.backward()
    of_critic.step()  # with gradients averaged over the processes
    of_generator.zero_grad()
    (-critic(fake).mean()).backward()
    of_generator.step()
    stopping = torch.tensor(float(bool(received)))
    dist.all_reduce(stopping)  # the signal may reach one process a step before another
    if (step % 500 == 0 or step == args.steps or stopping) and dist.get_rank() == 0:
        partial = args.checkpoint.with_suffix(".partial")
        torch.save({**{name: part.state_dict() for name, part in parts.items()}, "step": step}, partial)
        os.replace(partial, args.checkpoint)
    if stopping:
        break
dist.barrier()
dist.destroy_process_group()
sys.exit(128 + signal.SIGTERM if stopping else 0)
