"""Train the classifier of the features "digits" and write its weights into the package.

Run it from a checkout with lipgan installed: ``python scripts/train_digits_features.py``. It takes less than a minute
on a CPU and prints the accuracy on the digits that it was not trained on.
"""

import argparse
import math
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from lipgan import data
from lipgan._files import write_atomically
from lipgan.metrics.features.digits import HELD_OUT, WEIGHTS, DigitNetwork, to_digits

# Users bring digits that were scaled up: the classifier sees what is left of those after averaging back.
SIZES = (8, 12, 16, 32)
BATCH = 64


def distort(images: Tensor) -> Tensor:
    """Each of ``images [n, 1, 8, 8]`` turned by up to 12 degrees, scaled by up to 10 %, moved by up to 0.6 pixels."""
    n = len(images)
    angle = (2 * torch.rand(n) - 1) * math.radians(12)
    scale = 1 + (2 * torch.rand(n) - 1) * 0.1
    shift = (2 * torch.rand(n, 2) - 1) * 0.15
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    folder = Path(__file__).resolve().parent.parent / "lipgan" / "metrics" / "features"
    parser.add_argument("--out", type=Path, default=folder / WEIGHTS, help="the file of the weights")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    sets = [data.load("digits", size) for size in SIZES]
    labels = sets[0].labels
    assert labels is not None
    images = torch.stack([to_digits((images.samples + 1) / 2) for images in sets])
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[HELD_OUT] = True
    train = (~held_out).nonzero()[:, 0]

    network = DigitNetwork()
    steps = arguments.epochs * -(-len(train) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(arguments.epochs):
        for batch in train[torch.randperm(len(train))].split(BATCH):
            size = torch.randint(len(SIZES), (len(batch),))
            loss = F.cross_entropy(network(distort(images[size, batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    network.eval()
    with torch.no_grad():
        for size, at_size in zip(SIZES, images, strict=True):
            right = network(at_size[held_out]).argmax(1) == labels[held_out]
            print(f"{size:2d}x{size}: {right.float().mean():.4f} of {len(right)} digits not trained on are right")
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(arguments.out, safetensors.torch.save(weights))
    print(f"wrote {arguments.out}, {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
