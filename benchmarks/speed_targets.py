"""What the library aims at, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .arms import parse_settings
from .report import markdown

Record = Mapping[str, Any]


class Target(NamedTuple):
    """A limit of a ratio.

    Attributes
    ----------
    text : str
        What is aimed at.
    what : str
        The measurement it reads.
    arms : tuple of str
        Whom it concerns; none given: all but the reference.
    reference : str
        The arm they are divided by.
    limit : float
        The largest ratio that meets it.
    ratios : callable
        (record, all records, reference) to lower quartile, median and upper quartile, or None.
    noisy : bool
        Met also where only the lower quartile is within the limit: equal as far as can be told.
    """

    text: str
    what: str
    arms: tuple[str, ...]
    reference: str
    limit: float
    ratios: Callable[[Record, Sequence[Record], str], Sequence[float] | None]
    noisy: bool = False


def _timed(record: Record, records: Sequence[Record], reference: str) -> Sequence[float] | None:
    return record["ratios"].get(reference)


def _up_to_1024(record: Record, records: Sequence[Record], reference: str) -> Sequence[float] | None:
    """Ratios of so many experts; more are measured and have no limit."""
    own = parse_settings(record["arm"].partition(":")[2])
    return None if own.get("k", 1) * own.get("t", 1) > 1024 else _timed(record, records, reference)


def _saved(record: Record, records: Sequence[Record], reference: str) -> Sequence[float] | None:
    same = ("what", "model", "settings", "dtype", "device")
    name = "saved_activation_bytes"
    found = [o[name] for o in records if o["arm"] == reference and all(o[field] == record[field] for field in same)]
    return [record[name] / found[0]] * 3 if found and found[0] else None


def _state(record: Record, records: Sequence[Record], reference: str) -> Sequence[float] | None:
    expected = record["closed_form_bytes"]
    return [record["trained_bytes"] / expected] * 3 if expected else None


def _steps(record: Record, records: Sequence[Record], reference: str) -> Sequence[float] | None:
    return [record["steps"]] * 3


FULL, CORE = ("tucka", "tucka-batch"), ("tucka-core", "tucka-core-batch")

TARGETS = (
    Target("training step, everything trained", "train", FULL, "lora", 1.00, _timed),
    Target("training step, cores alone", "train", CORE, "frozen", 1.10, _timed),
    Target("writing a token", "decode", FULL, "lora", 1.00, _timed),
    Target("merged or exported route", "merged", ("tucka-merged", "tucka-exported"), "frozen", 1.00, _timed, True),
    Target("saved activations, everything trained", "memory", FULL, "lora", 1.00, _saved),
    Target("saved activations, cores alone", "memory", CORE, "frozen", 1.03, _saved),
    Target("bytes that train", "memory", (), "closed form", 1.00, _state),
    Target("training step, up to 1024 experts", "experts", (), "tucka:k=1,t=1", 1.03, _up_to_1024),
    Target("calibration without labels", "calibration", ("identity", "hosvd"), "training step", 20.0, _steps),
    Target("calibration with a loss", "calibration", ("gradient",), "training step", 40.0, _steps),
    Target("import", "import", ("tucka",), "peft", 1.10, _timed),
)


def results(target: Target, records: Sequence[Record]) -> Iterator[tuple[Record, Sequence[float]]]:
    """Records that a target concerns, and their ratios."""
    for record in records:
        chosen = not target.arms or record["arm"] in target.arms
        if record["what"] == target.what and chosen and record["arm"] != target.reference:
            ratios = target.ratios(record, records, target.reference)
            if ratios is not None:
                yield record, ratios


def worst_results(target: Target, records: Sequence[Record]) -> list[tuple[Record, Sequence[float]]]:
    """Of the arms in every place, the one with the largest ratio."""
    worst: dict[str, tuple[Record, Sequence[float]]] = {}
    for record, ratios in results(target, records):
        place = where(record)
        if place not in worst or decisive(target, ratios) > decisive(target, worst[place][1]):
            worst[place] = (record, ratios)
    return list(worst.values())


def decisive(target: Target, ratios: Sequence[float]) -> float:
    """The quartile that is held against the limit, to the three digits that tables show."""
    lower, median, _ = ratios
    return round(lower if target.noisy else median, 3)


def where(record: Record) -> str:
    """Model, precision and device, and what else of the setting is not the usual."""
    settings = record["settings"]
    blocks = f"{settings['layers']} blocks" if settings.get("layers") else ""
    parts = [record["model"], blocks, record["dtype"], record["device"], settings.get("targets")]
    parts += ["compiled" if settings.get("compiled") else "", f"r={settings['rank']}" if "rank" in settings else ""]
    parts += [f"{settings['batch']} × {settings['positions']}" if "positions" in settings else ""]
    return ", ".join(filter(None, parts))


def targets_table(records: Sequence[Record]) -> str:
    """All targets and what was measured of them, as Markdown; empty if nothing was."""
    lines = []
    for target in TARGETS:
        for record, ratios in worst_results(target, records):
            lower, median, upper = ratios
            shown = f"{median:.3f}" + (f" ({lower:.3f}–{upper:.3f})" if lower != upper else "")
            limit = f"{target.limit:.2f} × {target.reference}" + (", within noise" if target.noisy else "")
            met = "yes" if decisive(target, ratios) <= target.limit else "no"
            lines.append((target.text, where(record), f"≤ {limit}", record["arm"], shown, met))
    return markdown(("target", "measured on", "limit", "worst arm", "ratio", "met"), lines) if lines else ""
