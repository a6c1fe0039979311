"""Tables of the speed and memory benchmarks, from their records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from analysis import style

from .report import markdown
from .speed_figures import draw
from .speed_targets import targets_table

Record = Mapping[str, Any]

HEADINGS = {
    "train": "Training step",
    "experts": "Training step by number of experts",
    "ranks": "Training step by rank",
    "forward": "Forward",
    "prefill": "Reading a prompt",
    "decode": "Writing a token",
    "merged": "Forward of a merged model",
    "save": "Saving an adapter",
    "load": "Loading an adapter",
    "switch": "Switching between two adapters",
    "import": "Import",
    "calibration": "Calibration",
    "memory": "Memory",
}
"""What was measured, in the order of the page."""

VARIED = {"ranks": "rank", "prefill": "batch", "decode": "batch"}
"""The setting that takes several values in one table."""

INTRODUCTION = (
    "Median of the rounds and, in brackets, quartiles; ratios are taken round by round. *Fastest* is the fastest round "
    "of an arm over the fastest of the other."
)

MEMORY = {
    "saved_activation_bytes": "saved activations (MiB)",
    "peak_live_bytes": "peak of a step (MiB)",
    "cuda_peak_bytes": "peak of the allocator (MiB)",
}


def write(records: Sequence[Record], directory: Path) -> str:
    """Write `speed-tables.md` and, with training steps, `speed.svg` and `speed.png`; return the text of the tables.

    Raises
    ------
    ValueError
        If there are no records.
    """
    if not records:
        raise ValueError("there are 0 records to write tables of, at least 1 is needed")
    parts = ["# Speed and memory", INTRODUCTION]
    wanted = targets_table(records)
    if wanted:
        parts += ["## Targets", wanted]
    for what, heading in HEADINGS.items():
        for group in groups(record for record in records if record["what"] == what):
            parts += section(heading, group)
    text = "\n\n".join(parts) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "speed-tables.md").write_text(text)
    if any(record["what"] == "train" for record in records):
        # With a fixed salt and no date, equal results give equal files.
        with style("notebook"), rc_context({"svg.hashsalt": "speed"}):
            figure = draw(records)
            figure.savefig(directory / "speed.svg", metadata={"Date": None})
            figure.savefig(directory / "speed.png", dpi=150)
    return text


def groups(records: Iterable[Record]) -> list[list[Record]]:
    """Records that belong in one table: all arms of one model under one setting."""
    found: dict[str, list[Record]] = {}
    for record in records:
        varied = VARIED.get(record["what"])
        shared = {name: value for name, value in record["settings"].items() if name != varied}
        if record["what"] == "calibration":
            shared.pop("start")
        key = json.dumps([record["model"], record["dtype"], record["device"], shared], sort_keys=True)
        found.setdefault(key, []).append(record)
    return list(found.values())


def section(heading: str, group: Sequence[Record]) -> list[str]:
    """Heading, commands, circumstances and table of a group."""
    first = group[0]
    where = [first["model"], first["dtype"], first["device"], "compiled" if first["settings"].get("compiled") else ""]
    title = ", ".join(filter(None, where))
    commands = "\n".join(f"    {command}" for command in dict.fromkeys(record["command"] for record in group))
    tables = {"memory": memory_table, "calibration": calibration_table}
    return [
        f"## {heading}: {title}".removesuffix(": "),
        commands,
        circumstances(group),
        tables.get(first["what"], time_table)(group),
    ]


def circumstances(group: Sequence[Record]) -> str:
    """Settings, rounds, machine, versions and date, as sentences."""
    first = group[0]
    varied = VARIED.get(first["what"])
    hidden = {varied, "compiled", "start", "device", "dtype"}
    settings = ", ".join(f"{n} {v}" for n, v in first["settings"].items() if n not in hidden and v is not None)
    rounds = f"{first['rounds']} rounds" if "rounds" in first else ""
    machine, versions = first["machine"], first["versions"]
    shown = f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, load {machine['load']}"
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = filter(None, (settings, rounds, shown, packages, first["date"]))
    return "; ".join(lines) + "."


def time_table(group: Sequence[Record]) -> str:
    """Milliseconds, ratios, and tokens or model FLOP use where they say something."""
    varied = VARIED.get(group[0]["what"])
    references = list(dict.fromkeys(name for record in group for name in record["ratios"]))
    columns: dict[str, Callable[[Record], str]] = {"arm": lambda record: record["arm"]}
    if varied:
        columns[varied] = lambda record: str(record["settings"][varied])
    columns["ms"] = milliseconds
    for name in references:
        columns[f"× {name}"] = lambda record, name=name: spread(record["ratios"].get(name), ".3f")  # type: ignore[misc]
        columns[f"fastest × {name}"] = lambda record, name=name: f"{record['fastest'][name]:.3f}"  # type: ignore[misc]
    if "tokens" in group[0]:
        columns["tokens/s"] = lambda record: f"{record['tokens'] / record['seconds'][1]:,.1f}"
    if "peak_tflops" in group[0] and "operations" in group[0]:
        columns["model FLOP use"] = lambda record: f"{flop_use(record):.1%}"
    return markdown(list(columns), [[cell(record) for cell in columns.values()] for record in group])


def milliseconds(record: Record) -> str:
    """The time of an arm to about four digits."""
    values = [1e3 * value for value in record["seconds"]]
    form = ".3f" if values[1] < 10 else ".2f" if values[1] < 100 else ".1f" if values[1] < 1000 else ",.0f"
    return spread(values, form)


def flop_use(record: Record) -> float:
    """Operations of the model, 4 for each matrix entry and token of a step, as a share of what the device can do."""
    return record["operations"] / (record["seconds"][1] * record["peak_tflops"] * 1e12)


def spread(values: Sequence[float] | None, form: str) -> str:
    """A median and its quartiles, unless all are one number."""
    if values is None:
        return ""
    lower, median, upper = (format(value, form) for value in values)
    return median if values[0] == values[2] else f"{median} ({lower}–{upper})"


def memory_table(group: Sequence[Record]) -> str:
    """Bytes of every arm, and ratios to LoRA and to the frozen base."""
    by_arm = {record["arm"]: record for record in group}
    shown = {name: heading for name, heading in MEMORY.items() if name in group[0]}
    headings = ["arm"]
    for heading in shown.values():
        headings += [heading, "× lora", "× frozen"]
    headings += ["trained (KiB)", "closed form (KiB)", "moments (KiB)"]
    lines = []
    for record in group:
        cells = [record["arm"]]
        for name in shown:
            ratios = [ratio(record, by_arm.get(other), name) for other in ("lora", "frozen")]
            cells += [f"{record[name] / 2**20:,.2f}", *ratios]
        kept = ("trained_bytes", "closed_form_bytes", "moment_bytes")
        lines.append([*cells, *(f"{record[name] / 2**10:,.2f}" for name in kept)])
    return markdown(headings, lines)


def ratio(record: Record, other: Record | None, name: str) -> str:
    """A number over that of another arm, or nothing where that was not measured."""
    return "" if other is None or not other[name] else f"{record[name] / other[name]:.3f}"


def calibration_table(group: Sequence[Record]) -> str:
    """Calibrations beside training steps: time, and the peak of live tensors."""
    columns = {
        "calibration_seconds": "calibration (s)",
        "step_seconds": "training step (s)",
        "steps": "calibration in training steps",
        "calibration_peak_MiB": "peak of a calibration (MiB)",
        "training_peak_MiB": "peak of a step (MiB)",
        "arithmetic_MiB": "held by arithmetic (MiB)",
    }
    lines = [[record["arm"], *(f"{record[name]:.2f}" for name in columns)] for record in group]
    return markdown(("start", *columns.values()), lines)
