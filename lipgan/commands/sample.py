"""``lipgan sample``: a picture of samples from a checkpoint, or music."""

import argparse
import io
from pathlib import Path

from PIL import Image

from lipgan._files import write_atomically
from lipgan.commands.console import find_device
from lipgan.commands.names import check_outputs, checkpoint_file
from lipgan.data.chords import chords, midi
from lipgan.training import checkpoint, load_generator
from lipgan.training.pictures import image_bytes
from lipgan.training.sampling import draw
from lipgan.training.showing import picture_of

__all__ = ["main"]


def main(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        ValueError, OSError: bad input; nothing was written then.
    """
    if args.output.suffix.lower() in (".mid", ".midi"):
        _music(args)
        return
    format = Image.registered_extensions().get(args.output.suffix.lower())
    if format is None or format not in Image.SAVE:
        raise ValueError(f"{args.output} must end in the name of an image format, such as .png")
    try:
        image_bytes(Image.new("RGB", (8, 8)), format)
    except Exception as error:  # XBM knows black and white only; what others need may not be installed
        raise ValueError(f"{args.output} cannot be written ({error}): choose another format, such as .png") from error
    path = checkpoint_file(args)
    check_outputs([path], output=args.output)
    generator = load_generator(path, device=find_device(args.device))
    if not bool(draw(generator, args.number, args.seed or 0).isfinite().all()):
        raise ValueError(f"the generator of {path} makes samples that are not finite")
    # Of the data sets only this one has names for what a generator makes.
    data = chords() if _trained_on(path) == "chords" else None
    shown = Image.open(io.BytesIO(picture_of(generator, args.number, args.seed or 0, data, str(path))))
    # Matplotlib writes transparency, which is none here and which JPEG does not know.
    write_atomically(args.output, image_bytes(shown.convert("RGB") if shown.mode == "RGBA" else shown, format))


def _music(args: argparse.Namespace) -> None:
    path = checkpoint_file(args)
    check_outputs([path], output=args.output)
    generator = load_generator(path, device=find_device(args.device))
    trained_on = _trained_on(path)
    if trained_on != "chords":
        raise ValueError(f"{args.output} is for music, and the generator of {path} was trained on {trained_on!r}")
    write_atomically(args.output, midi(draw(generator, args.number, args.seed or 0)))


def _trained_on(path: Path) -> str:
    return str(checkpoint.read(path).get("data"))
