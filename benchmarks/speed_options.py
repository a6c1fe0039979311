"""Options that the benchmarks of speed and of memory share."""

from __future__ import annotations

import argparse
import shlex
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from .shapes import SHAPES, setting_of
from .speed_measures import Timed
from .timing import summarise

OUT = Path("benchmarks/results/speed.json")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which model is measured, how it is adapted and where it runs."""
    add = parser.add_argument
    add("--model", choices=list(SHAPES), default="bert", help="whose sizes (default: %(default)s)")
    add("--layers", type=int, help="blocks (default: the model's)")
    add("--batch", type=int, help="samples in a batch (default: the model's)")
    add("--positions", type=int, help="tokens of a sample, or of a prompt (default: the model's)")
    add("--rank", type=int, default=8, help="r (default: %(default)s)")
    add("--targets", help="all-linear, or names separated by commas (default: the architecture's)")
    add("--arms", help="arms to measure, separated by commas; fields as in tucka:k=8,t=2 (default: by measurement)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="precision of the base model")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--compile", action="store_true", help="compile every arm (torch.compile)")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    add("--out", type=Path, default=OUT, help="the results (default: %(default)s)")


def prepare(args: argparse.Namespace) -> None:
    """Threads, silence and, for compiled arms, room in the compiler's cache for all of them.

    Raises
    ------
    ValueError
        If the sizes fit no model, or the device is not there.
    """
    setting_of(args)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device} was asked for, but torch {torch.__version__} finds 0 CUDA devices")
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if args.compile:
        # All arms run the same code; beyond the limit the compiler gives up and silently runs eagerly.
        torch._dynamo.config.recompile_limit = 256  # type: ignore[attr-defined]


def command_line(module: str, argv: list[str]) -> str:
    """A command as it would be typed."""
    return shlex.join(["python", "-m", module, *argv])


def records_of(timed: Timed, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of one measurement, an arm each."""
    setting = timed.setting
    shared = {
        "what": timed.what,
        "model": "" if setting is None else setting.model,
        "settings": {} if setting is None else setting.details,
        "dtype": "" if setting is None else setting.dtype,
        "device": "cpu" if setting is None else setting.device,
    }
    found = summarise(timed.seconds, timed.references)
    return [{**shared, "arm": arm, **numbers, **timed.extras, **about} for arm, numbers in found.items()]
