"""``lipgan sample``: a grid of samples from a checkpoint."""

import argparse
import io
from pathlib import Path

from PIL import Image

from lipgan._files import check_destination, write_atomically
from lipgan.commands.console import find_device
from lipgan.training import load_generator
from lipgan.training.pictures import image_bytes, picture
from lipgan.training.run import CHECKPOINT
from lipgan.training.sampling import draw

__all__ = ["main"]


def main(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError, OSError: bad input; nothing was written then.
    """
    format = Image.registered_extensions().get(args.output.suffix.lower())
    if format is None or format not in Image.SAVE:
        raise ValueError(f"{args.output} must end in the name of an image format, such as .png")
    try:
        image_bytes(Image.new("RGB", (8, 8)), format)
    except Exception as error:  # XBM knows black and white only; what others need may not be installed
        raise ValueError(f"{args.output} cannot be written ({error}): choose another format, such as .png") from error
    check_destination(args.output)
    path: Path = args.checkpoint / CHECKPOINT if args.checkpoint.is_dir() else args.checkpoint
    generator = load_generator(path, device=find_device(args.device))
    samples = draw(generator, args.number, args.seed or 0)
    shown = Image.open(io.BytesIO(picture(samples, None, str(path), getattr(generator, "classes", 0))))
    # Matplotlib writes transparency, which is none here and which JPEG does not know.
    write_atomically(args.output, image_bytes(shown.convert("RGB") if shown.mode == "RGBA" else shown, format))
