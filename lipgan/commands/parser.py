"""The flags of every command. Nothing here imports PyTorch, so that ``--help`` and wrong flags are answered at once."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lipgan._choices import BENCHMARKS, METRICS, PROTOCOLS, RANGES, range_error
from lipgan.recipe import CHOICES, FIELDS

__all__ = ["build"]


class _Parser(argparse.ArgumentParser):
    """argparse with one line per error instead of the whole usage, and flags by their whole names only.

    Else --lr, which no command has, would be --lr-decay.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _whole(least: int, largest: int = 2**32 - 1) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        problem = range_error(value, least, largest)
        if problem is not None:
            raise argparse.ArgumentTypeError(f"{problem}, got {_shown(text)}")
        return value

    return convert


def _field(name: str) -> Callable[[str], int]:
    return _whole(*RANGES[name])


def _path(text: str) -> Path:
    # Path("") is the current folder, which nobody means.
    if not text:
        raise argparse.ArgumentTypeError("must be the name of a file or folder, got ''")
    return Path(text)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # A benchmark with many models would not end on the same day.
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 3600, got {_shown(text)}")
    return value


def _option(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=NUMBER, got {text!r}") from None


class _Options(argparse.Action):
    """Collects ``--option NAME=NUMBER`` into a dict."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        name, value = values
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), name: value})


class _Version(argparse.Action):
    """Prints the version, which takes as long to find out as the parser to build."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import lipgan

        print(f"lipgan {lipgan.__version__}")
        parser.exit()


def _add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of a recipe."""
    group = parser.add_argument_group("fields of the recipe", "default: the recipe's; see docs/recipes.md")
    for name, kind in FIELDS.items():
        if name == "steps":  # of the run, above
            continue
        flag = "--" + name.replace("_", "-")
        if name == "options":
            group.add_argument(
                "--option", dest=name, type=_option, action=_Options, metavar="NAME=X", help="of the system"
            )
        elif kind is tuple:
            group.add_argument(flag, type=float, nargs=2, metavar="X")
        elif kind is int:
            group.add_argument(flag, type=_field(name), metavar="N")
        elif kind is float:
            group.add_argument(flag, type=float, metavar="X")
        else:
            choices = CHOICES.get(name)
            group.add_argument(flag, metavar="NAME", help=", ".join(choices) if choices else None)


def _add_weights_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="the weights of these features, .safetensors or .pth; of dinov2 and clip, a folder (default: those in the "
        "package's cache)",
    )
    parser.add_argument("--sha256", metavar="HEX", help="what the checksum of that file begins with, 8 digits or more")
    parser.add_argument("--download", action="store_true", help="fetch the weights of the features if they are absent")


def build() -> argparse.ArgumentParser:
    """The parser of the command line; the parsed ``command`` is the name of the command."""
    common = _Parser(add_help=False)
    common.add_argument("--seed", type=_field("seed"), metavar="N", help="start of all random numbers (default: 0)")
    common.add_argument(
        "--device",
        metavar="D",
        help="cpu, cuda, cuda:1, ... (default: cuda where there is one)",
    )

    parser = _Parser(prog="lipgan", description="Lipschitz-constrained GANs: train, sample, measure.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, help: str, example: str) -> _Parser:
        subparser: _Parser = commands.add_parser(
            name,
            parents=[common],
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(command=name)
        return subparser

    train = add(
        "train",
        "train a recipe on a data set, into a folder",
        "lipgan train --recipe sngan --data digits --steps 2000 --out runs/demo",
    )
    train.add_argument("--recipe", metavar="NAME", help="which system (default: sngan)")
    train.add_argument("--data", metavar="NAME", help="which data set (default: digits)")
    train.add_argument("--size", type=_field("size"), metavar="N", help="pixels a side (default: 16)")
    train.add_argument(
        "--steps", type=_field("steps"), metavar="N", help="train up to this step (default: the recipe's)"
    )
    train.add_argument("--out", type=_path, required=True, metavar="DIR", help="folder of the results")
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in --out exactly where it was saved")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out by a new one")
    train.add_argument("--save-every", type=_field("save_every"), metavar="N", help="steps (default: 500)")
    train.add_argument(
        "--log-every",
        type=_field("log_every"),
        metavar="N",
        help="steps per line of metrics.jsonl (default: 20)",
    )
    train.add_argument(
        "--evaluate-every",
        type=_field("evaluate_every"),
        metavar="N",
        help="steps between two quick evaluations (default: none)",
    )
    train.add_argument("--config", type=_path, metavar="FILE", help="a TOML file of all these; flags override it")
    _add_recipe_flags(train)

    sample = add(
        "sample",
        "draw a grid of samples from a checkpoint",
        "lipgan sample runs/demo/checkpoint.pt -n 64 -o grid.png",
    )
    sample.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", help="a checkpoint, or the folder of a run")
    sample.add_argument("-n", "--number", type=_whole(1, 2**16), default=64, metavar="N", help="samples (default: 64)")
    sample.add_argument(
        "-o",
        "--output",
        type=_path,
        default=Path("grid.png"),
        metavar="FILE",
        help="picture (default: grid.png)",
    )

    fid = add(
        "fid",
        "compare two sets of images by the Frechet distance of their features",
        "lipgan fid photographs/ samples/ --features random --size 32",
    )
    side = (
        "a folder of images, a .zip, .tar or .parquet file of them (several: shards-{000..003}.tar), an .npz file of "
        "statistics or images, an .npy file of features or images, or a data set of images"
    )
    fid.add_argument("a", metavar="A", help=side)
    fid.add_argument("b", metavar="B", help="the same")
    fid.add_argument(
        "--features",
        metavar="NAME",
        help="what images are compared by: inception, dinov2, clip, digits, pixels, random; torchvision:MODEL, "
        "timm:MODEL, hf:MODEL; module:FILE.py:FUNCTION, which runs that file; or a file of weights of inception "
        "(default: inception)",
    )
    _add_weights_flags(fid)
    fid.add_argument(
        "--protocol",
        metavar="NAME",
        default="pytorch-fid",
        help=f"as which package: {', '.join(PROTOCOLS)}; they differ in how images are brought to the size of "
        "Inception (default: pytorch-fid)",
    )
    fid.add_argument(
        "--size", type=_field("size"), metavar="N", help="bring images to N x N pixels (default: as they are)"
    )
    fid.add_argument(
        "--batch-size", type=_field("batch_size"), default=50, metavar="N", help="images at once (default: 50)"
    )
    fid.add_argument(
        "--workers",
        type=_whole(0),
        metavar="N",
        help="threads that read image files while the features are computed; 0: none (default: one a core, up to 4)",
    )
    fid.add_argument("--skip-broken", action="store_true", help="name broken and huge image files, and go on")
    fid.add_argument("--save-stats", type=_path, metavar="FILE", help="write the statistics of A there, as .npz")
    fid.add_argument("--json", type=_path, metavar="FILE", help="write the distance and how it was computed there")

    evaluation = add(
        "eval",
        "judge the averaged generator of a checkpoint against what its samples are to look like",
        "lipgan eval runs/demo --metrics fid is kid prdc --plot eval.png",
    )
    evaluation.add_argument("checkpoint", type=_path, metavar="CHECKPOINT", help="a checkpoint, or the folder of a run")
    evaluation.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        metavar="NAME",
        help=f"{', '.join(METRICS)} (default: all that the features allow)",
    )
    evaluation.add_argument(
        "-n",
        "--n",
        "--number",
        dest="number",
        type=_whole(1, 2**24),
        default=2000,
        metavar="N",
        help="samples (default: 2000)",
    )
    evaluation.add_argument(
        "--data",
        metavar="NAME",
        help="compare with that data set, or with the images in that folder, scaled to the size of the samples "
        "(default: the data set of the run, or for translations the domain that they go to)",
    )
    evaluation.add_argument(
        "--workers", type=_whole(0), metavar="N", help="threads that read the images of a folder, as of lipgan fid"
    )
    evaluation.add_argument(
        "--protocol",
        metavar="NAME",
        default="lipgan",
        help=f"the metrics as which package defines them: {', '.join(PROTOCOLS)} (default: lipgan)",
    )
    evaluation.add_argument(
        "--features",
        metavar="NAME",
        help="what images are compared by, as of lipgan fid (default: digits for the data set digits, else inception)",
    )
    _add_weights_flags(evaluation)
    evaluation.add_argument("--json", type=_path, metavar="FILE", help="write the metrics and what they are of there")
    evaluation.add_argument(
        "--plot",
        type=_path,
        metavar="FILE",
        help="write samples, nearest real images and the metrics there, .png",
    )

    bench = add(
        "bench",
        "measure against PyTorch on this machine, after checking that the results agree",
        "lipgan bench spectral-norm --json bench.json",
    )
    bench.add_argument("which", nargs="?", choices=(*BENCHMARKS, "all"), default="all", help="default: all")
    bench.add_argument("--json", type=_path, metavar="FILE", help="write every number there")
    bench.add_argument("--plot", type=_path, metavar="DIR", help="write plots there")
    bench.add_argument("--threads", type=_whole(1), metavar="N", help="threads of torch and of the native code")
    bench.add_argument(
        "--seconds", type=_seconds, default=1.0, metavar="S", help="time for each model (default: %(default)s)"
    )

    study = add(
        "study",
        "see claims of the lectures happen: figure, table and page of each, with a verdict",
        "lipgan study duality --quick --out runs/studies",
    )
    study.add_argument("name", nargs="?", metavar="NAME", help="of a study, or all")
    study.add_argument("--list", action="store_true", help="print the names")
    study.add_argument("--quick", action="store_true", help="a short run, of a minute or two")
    study.add_argument(
        "--out",
        type=_path,
        default=Path("runs/studies"),
        metavar="DIR",
        help="each study has a folder there, and goes on with what it holds (default: runs/studies)",
    )
    study.add_argument("--seeds", type=_whole(1, 1000), metavar="N", help="how many seeds (default: the study's)")
    study.add_argument("--workers", type=_whole(1, 1024), default=1, metavar="N", help="processes (default: 1)")
    study.add_argument("--overwrite", action="store_true", help="replace what the folders hold")

    add("doctor", "say which backend serves each op here, and why", "lipgan doctor")
    return parser
