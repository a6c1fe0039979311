"""Speed of TuckA beside PEFT's LoRA and the frozen base model, arms measured in turn in one process.

    python -m benchmarks.speed train --model bert       training steps; also forward, merged, load
    python -m benchmarks.speed decode --model llama     reading a prompt, and each token after it
    python -m benchmarks.speed experts                  training steps with 1 to 4096 experts
    python -m benchmarks.speed ranks                    training steps at ranks 1 to 64
    python -m benchmarks.speed import                   fresh interpreters
    python -m benchmarks.speed calibration              a calibration, in training steps of the same model
    python -m benchmarks.speed all                      all of these and benchmarks.memory, for several models
    python -m benchmarks.speed table                    docs/results/speed-tables.md and the figure

Every arm adapts the same modules of the same weights at the same rank. Results go to a JSON file, where what is
measured again replaces what was there.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from . import calibration, memory, speed_measures
from .quality import names
from .records import Records, circumstances
from .shapes import setting_of
from .speed_arms import MERGED, RUN, TRAINED
from .speed_measures import EXPERTS, LOADED, RANKED, Measure
from .speed_options import OUT, add_options, command_line, prepare, records_of

MEASURES: dict[str, tuple[Measure, tuple[str, ...]]] = {
    "train": (speed_measures.train, TRAINED),
    "forward": (speed_measures.forward, RUN),
    "decode": (speed_measures.decode, RUN),
    "experts": (speed_measures.experts, EXPERTS),
    "ranks": (speed_measures.ranks, RANKED),
    "load": (speed_measures.load, LOADED),
    "merged": (speed_measures.merged, MERGED),
}
"""What is measured with a model, and the arms unless others are asked for."""

ON_CPU = (
    *(f"{what} --model {model}" for model in ("bert", "vit", "llama", "minilm") for what in ("train", "forward")),
    *(f"{what} --model {model} --dtype bfloat16" for model in ("bert", "llama") for what in ("train", "forward")),
    "train --model llama --targets all-linear",
    "decode --model llama",
    "decode --model llama --dtype bfloat16",
    "experts",
    "ranks",
    "load",
    "merged --model bert",
    "merged --model llama",
    "import",
    "calibration",
    *(f"memory --model {model}" for model in ("bert", "vit", "llama", "minilm")),
)
"""What `all` measures on the CPU."""

ON_CUDA = (
    *(
        f"{what} --model {model} --dtype bfloat16{compiled}"
        for model in ("llama-1b", "llama-7b")
        for what in ("train", "forward")
        for compiled in ("", " --compile")
    ),
    *(f"{what} --model llama-1b --dtype bfloat16" for what in ("decode", "experts", "ranks", "load", "merged")),
    "train --model llama-1b --dtype bfloat16 --targets all-linear",
    *(f"memory --model {model} --dtype bfloat16" for model in ("llama-1b", "llama-7b")),
)
"""What `all` measures on a GPU."""


def measure(args: argparse.Namespace, argv: list[str]) -> int:
    """Measure, write each result as it is there, and print it."""
    prepare(args)
    store = Records(args.out)
    about = circumstances(command_line("benchmarks.speed", argv))
    for timed in _measured(args):
        extras = {**timed.extras, **({"peak_tflops": args.peak_tflops} if args.device != "cpu" else {})}
        found = records_of(timed._replace(extras=extras), about)
        store.put(found)
        for record in found:
            print(describe(record), flush=True)
    return 0


def _measured(args: argparse.Namespace) -> Iterator[speed_measures.Timed]:
    if args.what == "import":
        return speed_measures.imports(args.rounds, args.warmup)
    function, arms = MEASURES[args.what]
    if args.what == "decode":
        function = partial(speed_measures.decode, new=args.new_tokens)
    chosen = names(args.arms) if args.arms else list(arms)
    return function(setting_of(args), chosen, args.rounds, args.warmup)


def describe(record: dict[str, Any]) -> str:
    """One line on a record."""
    lower, median, upper = (1e3 * value for value in record["seconds"])
    ratios = ", ".join(f"{middle:.3f} × {name}" for name, (_, middle, _) in record["ratios"].items())
    head = f"{record['what']} {record['model']} {record['dtype']} {record['arm']}".replace("  ", " ")
    return f"{head}: {median:.2f} ms ({lower:.2f} to {upper:.2f}), {ratios}"


def calibrate(args: argparse.Namespace, argv: list[str]) -> int:
    """Measure calibrations with `benchmarks.calibration`: its model and its rounds, and its sizes unless given."""
    prepare(args)
    about = circumstances(command_line("benchmarks.speed", argv))
    for start in ("identity", "hosvd", "gradient"):
        own = _calibration_arguments(args, start)
        settings = {name: value for name, value in vars(own).items() if name not in ("what", "dtype", "device")}
        found = calibration.measure_time(own)
        own.samples = 2 * own.batch  # what is held does not depend on how many are read
        found |= calibration.measure_memory(own)
        shared = {
            "what": "calibration",
            "model": f"llama of width {own.width}",
            "dtype": args.dtype,
            "device": args.device,
        }
        Records(args.out).put([{**shared, "arm": start, "settings": settings, **found, **about}])
        print(f"calibration {start}: {found['steps']:.1f} training steps", flush=True)
    return 0


def _calibration_arguments(args: argparse.Namespace, start: str) -> argparse.Namespace:
    names = ("rank", "dtype", "device", "threads", "layers", "batch", "positions")
    given = {"start": start, **{name: value for name in names if (value := getattr(args, name)) is not None}}
    return calibration.read_arguments(["time", *(f"--{name}={value}" for name, value in given.items())])


def measure_all(args: argparse.Namespace, argv: list[str]) -> int:
    """Measure the whole plan, one command after the other, and write the tables."""
    own = {"--threads": (args.threads, None), "--device": (args.device, "cpu"), "--out": (args.out, OUT)}
    common = [part for name, (value, usual) in own.items() if value != usual for part in (name, str(value))]
    for line in ON_CPU if args.device == "cpu" else ON_CUDA:
        what, *options = line.split()
        gc.collect()  # the models measured before
        if what == "memory":
            memory.main([*options, *common])
        else:
            main([what, *options, "--rounds", str(args.rounds), *common])
    return table(args, argv)


def table(args: argparse.Namespace, argv: list[str]) -> int:
    """Write the tables and the figure."""
    from . import speed_report

    print(speed_report.write(Records(args.out).read(), args.report))
    return 0


COMMANDS = {
    **dict.fromkeys((*MEASURES, "import"), measure),
    "calibration": calibrate,
    "all": measure_all,
    "table": table,
}


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.speed", description=__doc__, formatter_class=shown)
    parser.add_argument("what", choices=list(COMMANDS))
    add_options(parser)
    add = parser.add_argument
    add("--rounds", type=int, default=15, help="rounds that count (default: %(default)s)")
    add("--warmup", type=int, default=2, help="rounds before them (default: %(default)s)")
    add("--new-tokens", type=int, default=32, help="tokens to generate (default: %(default)s)")
    add("--peak-tflops", type=float, default=989.0, help="of the GPU, dense, for model FLOP use (default: an H200's)")
    add("--report", type=Path, default=Path("docs/results"), help="directory of tables (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    argv = sys.argv[1:] if argv is None else argv
    args = read_arguments(argv)
    return COMMANDS[args.what](args, argv)


if __name__ == "__main__":
    sys.exit(main())
