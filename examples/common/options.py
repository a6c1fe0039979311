"""The command line that every example has, and what each does first with it."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets as hub
import torch
import transformers
from common.methods import METHODS, method_of
from common.presets import preset_of

SIZES = ("r", "k", "t", "p", "alpha")
"""TuckA's sizes that have an option of their own."""


def parser_of(doc: str, example: str, datasets: Sequence[str] = ("offline",)) -> argparse.ArgumentParser:
    """Make the parser of an example.

    Parameters
    ----------
    doc : str
        The example's docstring, which ``--help`` shows.
    example : str
        Its name, which is that of its output directory.
    datasets : sequence of str
        Choices of ``--dataset``; the first is the default.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    what = parser.add_argument_group("what is compared, and on what")
    add = what.add_argument
    listed = ", ".join(METHODS)
    text = f"any of {listed}; lora:r=16 sets fields of a method (default: tucka lora)"
    add("--method", nargs="+", type=_method, default=["tucka", "lora"], metavar="NAME", help=text)
    add("--dataset", choices=datasets, default=datasets[0], help="what to adapt to (default: %(default)s)")
    add("--dataset-path", type=Path, help="directory with that dataset, laid out as on the hub (default: the hub)")
    add("--model", help="pretrained model, a hub id or a directory (default: the dataset's)")
    add("--preset", choices=["paper"], help="the published hyper-parameters of that dataset")
    add("--samples", type=int, help="cap on the training rows (default: all)")
    add("--seed", nargs="+", type=int, default=[0], metavar="N", help="one run of every method for each (default: 0)")
    how = parser.add_argument_group("how it is trained; defaults depend on dataset and method")
    add = how.add_argument
    add("--epochs", type=float, help="passes over the training rows")
    add("--batch-size", type=int, help="rows in a step, of one process")
    add("--learning-rate", type=float, help="peak learning rate, of every method that is compared")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    sizes = parser.add_argument_group(
        "sizes of TuckA", "PEFT's methods, but VeRA and BOFT, are sized to train at least as many parameters."
    )
    for name in SIZES:
        kind = float if name == "alpha" else int
        sizes.add_argument(f"--{name}", type=kind, help=METHODS["tucka"].helps[name])
    where = parser.add_argument_group("where things lie")
    add = where.add_argument
    output, results = Path("out") / example, Path("out/results.csv")
    add("--output", type=Path, default=output, help="adapters, models and the figure (default: %(default)s)")
    text = "table that runs are added to, and looked up in before they are done (default: %(default)s)"
    add("--results", type=Path, default=results, help=text)
    return parser


def read(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, and begin."""
    args = parser.parse_args(argv)
    if args.preset:
        try:
            preset_of(args.dataset)
        except ValueError as error:
            parser.error(str(error))
    return begin(args)


def begin(args: argparse.Namespace) -> argparse.Namespace:
    """Set threads and quiet the libraries, as every example does first."""
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    hub.disable_progress_bars()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT still reads it
    warnings.filterwarnings("ignore", message="Failed to load the CUDA extension|Setting boft_n_butterfly_factor")
    args.output.mkdir(parents=True, exist_ok=True)
    return args


def sizes_of(args: argparse.Namespace) -> dict[str, Any]:
    """TuckA's sizes that the command line gives."""
    return {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}


def _method(text: str) -> str:
    try:
        method_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
