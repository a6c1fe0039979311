"""Figure of the speed benchmark: training steps beside LoRA's, and by number of experts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.styles import PALETTE

from .arms import parse_settings
from .speed_arms import TRAINED

Record = Mapping[str, Any]

COLORS = tuple(color for color in PALETTE if color != "#F0E442")
"""Yellow is too light for a thin line on white."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""A marker goes with each colour, for those who see none."""

MODELS = {"bert": "BERT-base", "vit": "ViT-base", "llama": "Llama 110M", "minilm": "MiniLM", "llama-1b": "Llama 1B",
          "llama-7b": "Llama 7B"}  # fmt: skip


def looks_of(records: Sequence[Record]) -> dict[tuple[str, str], tuple[str, str]]:
    """Colour and marker of every model and choice of targets, the same in all panels."""
    kinds = dict.fromkeys(kind_of(record) for record in records if record["what"] in ("train", "experts"))
    return {kind: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, kind in enumerate(kinds)}


def kind_of(record: Record) -> tuple[str, str]:
    """Model, and targets where they are not the default."""
    return record["model"], record["settings"].get("targets") or ""


def label_of(kind: tuple[str, str]) -> str:
    """How a model is called in a legend."""
    model, targets = kind
    return MODELS.get(model, model) + (f", {targets}" if targets else "")


def panel_of(record: Record) -> str:
    """Where a training step was measured: device, precision, compiled or not."""
    device = {"cpu": "CPU", "cuda": "GPU"}.get(record["device"], record["device"])
    return f"{device}, {record['dtype']}" + (", compiled" if record["settings"].get("compiled") else "")


def plot_ratios(records: Sequence[Record], ax: Axes, looks: Mapping[Any, tuple[str, str]]) -> Axes:
    """Draw each arm's training step over LoRA's, a row for each arm and a marker for each model.

    Parameters
    ----------
    records : sequence
        Training steps of one panel.
    ax : Axes
        Where to draw.
    looks : mapping
        From `looks_of`.
    """
    arms = [arm for arm in TRAINED if any(record["arm"] == arm for record in records)]
    kinds = list(dict.fromkeys(map(kind_of, records)))
    for row in range(0, len(arms), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#F2F2F2", zorder=0)
    ax.axvline(1.0, color="#555555", linewidth=1, zorder=1)
    for record in records:
        if record["arm"] in arms and "lora" in record["ratios"]:
            lower, median, upper = record["ratios"]["lora"]
            place = (kinds.index(kind_of(record)) - (len(kinds) - 1) / 2) * 0.7 / max(len(kinds), 1)
            color, marker = looks[kind_of(record)]
            ax.errorbar(
                median,
                arms.index(record["arm"]) + place,
                xerr=[[median - lower], [upper - median]],
                fmt=marker,
                color=color,
                markersize=5,
                elinewidth=1.2,
                label=label_of(kind_of(record)),
            )
    ax.set(yticks=range(len(arms)), yticklabels=arms, xlabel="training step ÷ LoRA's", title=panel_of(records[0]))
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", alpha=0.3)
    return ax


def plot_experts(records: Sequence[Record], ax: Axes, looks: Mapping[Any, tuple[str, str]]) -> Axes:
    """Draw the training step over that with one expert against K·T: solid with T = 1, dashed with K = T."""
    ax.axhspan(0.97, 1.03, color="#D9D9D9", zorder=0, label="± 3 %")
    ax.axhline(1.0, color="#555555", linewidth=1, zorder=1)
    found: dict[tuple, list[tuple[int, Sequence[float]]]] = {}
    for record in records:
        own = parse_settings(record["arm"].partition(":")[2])
        k, t = own.get("k", 1), own.get("t", 1)
        (values,) = record["ratios"].values()
        for shape in [shape for shape, fits in (("T = 1", t == 1), ("K = T", k == t)) if fits]:
            place = (kind_of(record), panel_of(record), json.dumps(record["settings"], sort_keys=True), shape)
            found.setdefault(place, []).append((k * t, values))
    series = list(dict.fromkeys(place[:3] for place in found))
    for place, points in found.items():
        if len(points) < 2:
            continue  # one expert alone, which is T = 1 and K = T
        kind, panel, settings, shape = place
        points.sort()
        counts, values = [count for count, _ in points], [value for _, value in points]
        color, marker = COLORS[series.index(place[:3]) % len(COLORS)], looks[kind][1]
        blocks = f", {layers} blocks" if (layers := json.loads(settings).get("layers")) else ""
        ax.errorbar(
            counts,
            [median for _, median, _ in values],
            yerr=[[median - lower for lower, median, _ in values], [upper - median for _, median, upper in values]],
            fmt=marker + ("-" if shape == "T = 1" else "--"),
            color=color,
            markerfacecolor=color if shape == "T = 1" else "white",
            markersize=5,
            elinewidth=1.2,
            label=f"{label_of(kind)}{blocks}, {panel}, {shape}",
        )
    counts = sorted({count for points in found.values() for count, _ in points})
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(FixedLocator(counts))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set(xlabel="experts K·T", ylabel="training step ÷ that of one expert", title="Number of experts")
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left")
    return ax


def draw(records: Sequence[Record]) -> Figure:
    """Draw a panel for each device and precision, and one for the number of experts, with one legend of models."""
    looks = looks_of(records)
    trained = [record for record in records if record["what"] == "train"]
    experts = [record for record in records if record["what"] == "experts"]
    panels = list(dict.fromkeys(map(panel_of, trained)))
    figure = Figure(layout="constrained")
    axes = grid(figure, len(panels) + bool(experts))
    for ax, panel in zip(axes, panels):
        plot_ratios([record for record in trained if panel_of(record) == panel], ax, looks)
    if experts:
        plot_experts(experts, axes[-1], looks)
    handles: dict[str, Any] = {}
    for ax in axes[: len(panels)]:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def grid(figure: Figure, count: int) -> list[Axes]:
    """So many panels in two columns; one that would stand alone in a line takes all of it."""
    columns = min(2, count)
    lines = -(-count // columns)
    figure.set_size_inches(4.9 * columns, 3.9 * lines + 0.5)
    cells = figure.add_gridspec(lines, columns, hspace=0.08)
    places: list[Any] = [cells[i // columns, i % columns] for i in range(count)]
    if count % columns:
        places[-1] = cells[lines - 1, :]
    return [figure.add_subplot(place) for place in places]
