"""The command line: ``python -m analysis`` and ``figure …``, ``report …`` or ``sweep …``."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import transformers

from analysis.adapters import read_adapter
from analysis.data import load_model, read_data
from analysis.figures import FIGURES, Inputs, draw
from analysis.observations import Observations, observe
from analysis.report import write_report
from analysis.report.accounting import shapes_of
from analysis.report.files import write_atomically
from analysis.styles import WIDTHS, style
from analysis.sweeps.command import add_command as add_sweep
from analysis.sweeps.work import one_line

FORMATS = ("pdf", "svg", "eps", "png")
MOST = 600
"""Characters of an error message."""
STYLES = ("paper", "notebook", "slides")
OPTIONS = {"adapter": "--adapter", "observed": "--data", "labels": "--labels", "log": "--log", "runs": "--runs"}
"""What a figure needs, and the option that gives it."""

EXAMPLES = """examples:
  python -m analysis figure expert-similarity --adapter out/adapter -o similarity.pdf
  python -m analysis figure flow --adapter out/adapter --model out/base --data test.npz --labels domain -o flow.svg
  python -m analysis figure load --log out/checkpoint-500/trainer_state.json --style slides -o load.png
  python -m analysis figure trade-off --runs results.csv --method arm --parameters adapter_parameters --score test \\
      --width icml-column -o trade_off.pdf
  python -m analysis report out/adapter -o report.html
  python -m analysis report out/adapter --model out/base --data test.csv.gz --labels domain \\
      --log out/checkpoint-500/trainer_state.json -o report.html
"""

DATA_HELP = (
    "data: .safetensors or .npz with arrays of one length, named as the model's arguments; or .jsonl or .csv (also "
    ".gz) with a column 'text'"
)


class UsageError(Exception):
    """The command line asks for something that cannot be."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and stop."""
        self.exit(2, f"{self.prog}: error: {one_line(str(message), MOST)} (see --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run a command, and return the exit status: 0, 1 if it failed, 2 for a wrong command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = args.run(args)
    except UsageError as error:
        sys.stderr.write(f"{parser.prog} {args.command}: error: {one_line(str(error), MOST)} (see --help)\n")
        return 2
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{parser.prog} {args.command}: {one_line(str(error), MOST)}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(f"{written}\n")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    layout: Any = dict(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = Parser(
        prog="python -m analysis",
        description="Draw what an adapter of Tucker experts has learnt: a single figure, or a report of one HTML page. "
        "Or run a sweep over settings, for the tables of runs that figures are drawn from.",
        epilog=EXAMPLES,
        **layout,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{figure,report,sweep}")
    named = "\n".join(f"  {name:<24}{_needed(name)}\n{_folded(each.caption)}" for name, each in FIGURES.items())
    figure = commands.add_parser(
        "figure",
        help="draw one figure into a file",
        description="Draw one figure into a file, by default as vectors.",
        epilog=f"figures, and what they need:\n{named}\n\n{EXAMPLES}",
        **layout,
    )
    figure.set_defaults(run=run_figure)
    figure.add_argument("name", metavar="NAME", help=f"one of {', '.join(FIGURES)}")
    figure.add_argument("--adapter", type=Path, metavar="DIR", help="directory of a saved adapter")
    _add_data(figure)
    figure.add_argument("--runs", type=Path, metavar="FILE.csv", help="table of training runs, one row for each")
    for column, default in (("method", "method"), ("parameters", "parameters"), ("score", "score")):
        text = f"column of the runs that holds the {column} (default: {default})"
        figure.add_argument(f"--{column}", metavar="COLUMN", default=default, help=text)
    figure.add_argument("--style", choices=STYLES, default="paper", help="kind of document (default: paper)")
    widths = ", ".join(f"{name} ({inches:g} in)" for name, inches in WIDTHS.items())
    figure.add_argument("--width", choices=WIDTHS, metavar="NAME", help=f"width of the figure: {widths}")
    figure.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=f"file, ending in {', '.join(FORMATS)}"
    )
    report = commands.add_parser(
        "report",
        help="write a report of one self-contained HTML page",
        description="Write a report of one self-contained HTML page. The weights alone tell a part of it; with data "
        "it shows routing and movement, with labels who goes where, with a log the load over training.",
        epilog=EXAMPLES,
        **layout,
    )
    report.set_defaults(run=run_report)
    report.add_argument("adapter", type=Path, metavar="ADAPTER", help="directory of a saved adapter")
    _add_data(report)
    report.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html", help="file to write")
    add_sweep(commands, **layout)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        metavar="DIR|ID",
        help="base model: a directory or hub id (default: what the adapter names, if local)",
    )
    add("--data", type=Path, metavar="FILE", help=DATA_HELP)
    add("--labels", metavar="KEY", help="array or column of the data with a class, domain or task for every sample")
    add("--samples", type=int, default=512, metavar="N", help="of longer data, draw so many samples (default: 512)")
    add("--layer", metavar="NAME", help="layer to draw, or the end of its name (default: the first, or a choice)")
    add("--tower", metavar="NAME", help="whose router, for models with several towers")
    add("--log", type=Path, metavar="FILE.json", help="trainer_state.json of a training with tucka.callbacks")


# --- the commands --------------------------------------------------------------------------------------------------


def run_figure(args: argparse.Namespace) -> Path:
    """Draw one figure into a file."""
    if args.name not in FIGURES:
        raise UsageError(f"{args.name!r} is no figure; the figures are {', '.join(FIGURES)}")
    suffix = args.output.suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise UsageError(f"figures are written as {', '.join(FORMATS)}, got {str(args.output)!r}")
    held = {need: getattr(args, option.lstrip("-")) for need, option in OPTIONS.items()}
    needs = _all_needs(args.name)
    lacking = [OPTIONS[need] for need in needs if held[need] is None]
    if lacking:
        raise UsageError(f"figure {args.name} needs {' and '.join(lacking)}")
    inputs = Inputs(layer=args.layer, tower=args.tower, columns=_columns(args))
    if args.adapter is not None:
        inputs = inputs._replace(adapter=read_adapter(args.adapter))
    if "observed" in needs:
        observed = _observed(args)
        inputs = inputs._replace(observed=observed, adapter=observed.adapter)
    if "log" in needs:
        inputs = inputs._replace(log=read_log(args.log))
    if "runs" in needs:
        inputs = inputs._replace(runs=_read_runs(args.runs))
    with style(args.style, width=args.width):
        figure: Any = draw(args.name, inputs).figure
        return write_atomically(args.output, lambda temporary: figure.savefig(temporary, format=suffix))


def run_report(args: argparse.Namespace) -> Path:
    """Write a report."""
    if args.labels is not None and args.data is None:
        raise UsageError("--labels names an entry of the data: give --data too")
    adapter, shapes = read_adapter(args.adapter), None
    inputs = Inputs(adapter=adapter, layer=args.layer, tower=args.tower)
    if args.log is not None:
        inputs = inputs._replace(log=read_log(args.log))
    if args.data is not None or args.model is not None:
        model = load_model(args.adapter, args.model)
        shapes = shapes_of(model)
        if args.data is not None:
            observed = _observed(args, model)
            # In a model the adapter is called "default".
            observed = observed._replace(adapter=observed.adapter._replace(name=adapter.name))
            inputs = inputs._replace(observed=observed, adapter=observed.adapter)
    return write_report(args.output, inputs, shapes=shapes)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log history of a ``trainer_state.json``, or a file that holds just that list.

    Raises
    ------
    ValueError
        If the file holds neither.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    history = found.get("log_history") if isinstance(found, dict) else found
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError(f"{path} holds no log_history, as a trainer_state.json does")
    return history


def _observed(args: argparse.Namespace, model: Any = None) -> Observations:
    """The adapter on the data."""
    if args.samples < 1:
        raise UsageError(f"--samples is at least 1, got {args.samples}")
    if not args.data.is_file():
        raise FileNotFoundError(f"there is no file {args.data}")
    model = load_model(args.adapter, args.model) if model is None else model
    data = read_data(args.data, model, labels=args.labels, samples=args.samples)
    quiet = not sys.stderr.isatty()
    try:
        return observe(model, data.batches, samples=data.samples, labels=data.labels, progress=not quiet)
    except (ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        # A model meets data that it cannot take with whatever its first failing operation raises.
        kind = type(model.get_base_model()).__name__
        raise ValueError(f"{kind} cannot be run on {args.data}: {type(error).__name__}: {error}") from error


def _read_runs(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error


def _all_needs(name: str) -> tuple[str, ...]:
    """What a figure needs; an adapter on data needs the adapter."""
    needs = FIGURES[name].needs
    return ("adapter", *needs) if "observed" in needs else needs


def _columns(args: argparse.Namespace) -> dict[str, str]:
    return {name: getattr(args, name) for name in ("method", "parameters", "score")}


def _needed(name: str) -> str:
    return ", ".join(OPTIONS[need] for need in _all_needs(name)) or "nothing (an adapter's sizes with --adapter)"


def _folded(text: str, width: int = 94) -> str:
    return textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


if __name__ == "__main__":
    sys.exit(main())
