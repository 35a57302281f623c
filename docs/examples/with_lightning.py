"""An SN-GAN on the ring with Lightning: two optimizers want manual optimization. Run it again, and it goes on."""

import argparse
from pathlib import Path

import lightning
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

import lipgan

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batches", type=int, default=100, help="of an epoch")
parser.add_argument("--folder", type=Path, default=Path("with_lightning"))
args = parser.parse_args()


class GAN(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        self.critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
        lipgan.group_spectral_norm(self.critic)  # before Lightning moves and wraps the module

    def training_step(self, batch, _):
        (real,) = batch
        of_generator, of_critic = self.optimizers()
        fake = self.generator(torch.randn(len(real), 8, device=self.device))
        loss = lipgan.critic_loss(self.critic, real, fake.detach(), "non-saturating", kind="r1", weight=0.1)
        of_critic.zero_grad()
        self.manual_backward(loss.total)
        of_critic.step()
        self.toggle_optimizer(of_generator)  # no gradients of the critic
        of_generator.zero_grad()
        self.manual_backward(softplus(-self.critic(fake)).mean())
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.log_dict({"critic": loss.loss, "penalty": loss.penalty})

    def configure_optimizers(self):
        networks = (self.generator, self.critic)
        return [torch.optim.Adam(network.parameters(), 1e-3, betas=(0.0, 0.9)) for network in networks]


lightning.seed_everything(0)
loader = DataLoader(TensorDataset(lipgan.data.load("ring").samples), batch_size=64, shuffle=True)
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
kept = lightning.pytorch.callbacks.ModelCheckpoint(args.folder, save_last=True)
trainer = lightning.Trainer(
    max_epochs=args.epochs, limit_train_batches=args.batches, accelerator="auto", devices=1, callbacks=[kept], **quiet
)
last = args.folder / "last.ckpt"
trainer.fit(GAN(), loader, ckpt_path=last if last.exists() else None, weights_only=True)
