"""The offline tasks of the other examples, cut short: for examples that train one method many times."""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from .arithmetic import PRETRAIN_STEPS
from .options import parser_of
from .study import Task

SOURCES = {"digits": "image_classification", "docstrings": "text_classification", "arithmetic": "math_reasoning"}
"""The datasets, and the example whose offline data each is."""

CUT = {"digits": (600, 4.0), "docstrings": (1000, 2.0), "arithmetic": (800, 3.0)}
"""Training rows (of the digits: images, each of which is in every domain) and epochs, unless others are given."""


def short_parser(doc: str, example: str, *varied: str) -> argparse.ArgumentParser:
    """Make the parser of an example that varies settings of TuckA, see `options.parser_of`; some options it refuses."""
    parser = parser_of(doc, example, datasets=list(SOURCES))
    parser.set_defaults(method=["tucka"])
    for option in ("--preset", *varied):
        parser.add_argument(option, nargs="*", action=_Refused, help=argparse.SUPPRESS)
    parser.epilog = "By default a run is short: " + "; ".join(
        f"{name}, {rows} {'images' if name == 'digits' else 'rows'} and {epochs:g} epochs"
        for name, (rows, epochs) in CUT.items()
    )
    return parser


def cut(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in the rows and epochs that the command line does not give."""
    rows, epochs = CUT[args.dataset]
    args.samples, args.epochs = args.samples or rows, args.epochs or epochs
    return args


def task_of(args: argparse.Namespace, seed: int) -> Task:
    """Make the task of a dataset."""
    example = importlib.import_module(SOURCES[args.dataset])
    options = {**vars(args), "pretrain_steps": PRETRAIN_STEPS, "test_samples": args.samples}
    return example.offline(argparse.Namespace(**options), seed)


class _Refused(argparse.Action):
    """An option that other examples have."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parser.error(f"{self.option_strings[0]} is not an option here: what is varied are settings of TuckA")
