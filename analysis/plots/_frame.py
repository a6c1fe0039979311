"""What the plots share: the axes, the checks of tables, names and colours of groups, ticks that leave room to read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize

from analysis.styles import DIVERGING, MISSING, PALETTE, group_colors

NO_VALUES = "no finite values"
_WHOLE = (int, np.integer)
_NUMBER = (*_WHOLE, float, np.floating)


def axes_or_new(ax: Axes | None) -> Axes:
    """Return the axes given, or those of a new figure."""
    if ax is not None:
        return ax
    # Imported here, for pyplot chooses a backend.
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def checked(
    name: str,
    table: pd.DataFrame,
    keys: Sequence[str],
    values: Sequence[str],
    unique: Sequence[str] = (),
) -> pd.DataFrame:
    """Return the columns that a plot reads, its values as finite floats or NaN.

    Parameters
    ----------
    name : str
        What the caller calls the table, for messages.
    table : DataFrame
        What the caller was given. It is not changed.
    keys, values : sequences of str
        Columns that name a row, each without gaps, and columns of numbers.
    unique : sequence of str, optional
        Columns whose values together occur once.

    Raises
    ------
    ValueError
        If it is no DataFrame, lacks columns or rows, has a row without a name, a value that is no number, or a name
        that occurs twice.
    """
    wanted = [*keys, *values]
    if not isinstance(table, pd.DataFrame):
        raise ValueError(f"{name} is a DataFrame with columns {', '.join(wanted)}, got {type(table).__name__}")
    missing = [column for column in wanted if column not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns)) or "none"
        raise ValueError(
            f"{name} has columns {', '.join(wanted)}, but {', '.join(missing)} not among those found: {found}"
        )
    if table.empty:
        raise ValueError(f"{name} has at least one row, found none")
    for column in keys:
        if table[column].isna().any():
            gaps = int(table[column].isna().sum())
            raise ValueError(
                f"column {column!r} of {name} is filled, found {gaps} of {len(table)} rows without a value"
            )
    repeated = table.duplicated(list(unique)) if unique else None
    if repeated is not None and repeated.any():
        first = ", ".join(f"{column}={table.loc[repeated, column].iloc[0]}" for column in unique)
        raise ValueError(f"{name} has one row for each {', '.join(unique)}, found several for {first}")
    return pd.DataFrame(
        {column: table[column].to_numpy() for column in keys}
        | {column: finite(f"column {column!r} of {name}", table[column]) for column in values}
    )


def finite(name: str, values: Any, shape: str | None = None) -> np.ndarray:
    """Return numbers as an array of floats in which everything that is not finite is NaN.

    `shape` names the expected axes, as in "(K, P, R, R)"; their number is checked, and that none is empty.
    """
    try:
        array = np.array(pd.Series(values).to_numpy(float, na_value=np.nan) if shape is None else values, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is numeric, but {error}") from error
    if shape is not None and (array.ndim != shape.count(",") + 1 or array.size == 0):
        raise ValueError(f"{name} has shape {shape} and no empty axis, got {array.shape}")
    array[~np.isfinite(array)] = np.nan
    return array


def say_no_values(ax: Axes, text: str = NO_VALUES) -> None:
    """Write across the axes that there is nothing to draw."""
    ax.set(xticks=[], yticks=[])
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.35")


def ordered(values: Iterable[Any]) -> list[Any]:
    """Return the distinct values, numbers by size and anything else by first appearance."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct) if all(isinstance(value, _NUMBER) for value in distinct) else distinct


def short_name(value: Any) -> str:
    """Return a group or label as text, a whole number without its decimals."""
    return str(int(value)) if isinstance(value, _NUMBER) and float(value).is_integer() else str(value)


def full_name(value: Any, kind: str) -> str:
    """Return "group 3" for a number of that kind, and any other name as it is."""
    return f"{kind} {short_name(value)}" if isinstance(value, _NUMBER) else str(value)


def group_palette(groups: Iterable[Any]) -> dict[Any, str]:
    """Give every group its colour; a numbered group has the same one whichever others are present."""
    names = ordered(groups)
    if all(isinstance(name, _WHOLE) and name >= 0 for name in names):
        colors = group_colors(int(max(names)) + 1)
        return {name: colors[int(name)] for name in names}
    return dict(zip(names, group_colors(len(names))))


def show_groups(ax: Axes, palette: dict[Any, str], handles: Sequence[Artist], others: Sequence[Artist] = ()) -> None:
    """Explain the colours of groups: by a legend beside the axes, or by a colour bar where a legend would be long.

    `handles` stands for the groups, in the order of `palette`; `others` is explained in either case.
    """
    if len(palette) <= len(PALETTE):
        for handle, group in zip(handles, palette):
            handle.set_label(short_name(group))
        legend_beside(ax, [*handles, *others], title="group")
        return
    color_scale(ax, list(palette.values()), [short_name(group) for group in palette], "group")
    legend_over(ax, others)


def legend_beside(ax: Axes, handles: Sequence[Artist], title: str | None = None) -> None:
    """Put a legend to the right of the axes, where it covers no data."""
    columns = 1 + (len(handles) - 1) // 16
    place: dict[str, Any] = dict(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0)
    ax.legend(handles=list(handles), title=title, ncols=columns, alignment="left", **place)


def legend_over(ax: Axes, handles: Sequence[Artist]) -> None:
    """Put a legend, if there is something to explain, inside axes that have a colour bar at their side."""
    if handles:
        ax.legend(handles=list(handles), loc="best", frameon=True, edgecolor="none", framealpha=0.8)


def color_scale(ax: Axes, colors: Sequence[str], names: Sequence[str], label: str, most: int = 9) -> None:
    """Add a colour bar of named steps, at most `most` of them labelled."""
    norm = BoundaryNorm(np.arange(len(colors) + 1) - 0.5, len(colors))
    shown = np.unique(np.linspace(0, len(colors) - 1, min(most, len(colors))).round().astype(int))
    _bar(ax, ScalarMappable(norm, ListedColormap(list(colors))), label, shown, [names[index] for index in shown])


def signed_scale(limit: float) -> dict[str, Any]:
    """Return the norm and colour map of an image whose centre is 0, with grey for what is not finite."""
    # A limit of 0 (all entries 0) would make every colour undefined.
    norm = Normalize(-limit, limit) if limit > 0 else Normalize(-1.0, 1.0)
    return dict(norm=norm, cmap=mpl.colormaps[DIVERGING].with_extremes(bad=MISSING), interpolation="nearest")


def share_scale() -> dict[str, Any]:
    """Return the norm and colour map of an image of numbers from 0 to 1, with grey for what is not finite."""
    cmap = mpl.colormaps["Reds"].with_extremes(bad=MISSING)
    return dict(norm=Normalize(0.0, 1.0), cmap=cmap, interpolation="nearest")


def scale_bar(ax: Axes, scale: dict[str, Any], label: str) -> None:
    """Add the colour bar of `signed_scale` or `share_scale`."""
    _bar(ax, ScalarMappable(scale["norm"], scale["cmap"]), label)


def _bar(
    ax: Axes,
    colors: ScalarMappable,
    label: str,
    ticks: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Add a colour bar beside the axes, as high as they are, whatever their aspect."""
    # Of the room given here the bar takes what its own aspect leaves it.
    place = ax.inset_axes((1.03, 0.0, 1.0, 1.0))
    place.set_box_aspect(24)
    place.set_anchor("W")
    bar = ax.figure.colorbar(colors, cax=place, label=label, ticks=ticks)
    bar.outline.set_visible(False)  # type: ignore[operator]
    if names is not None:
        place.set_yticklabels(names)
        place.minorticks_off()


def bare(ax: Axes) -> None:
    """Remove the frame and tick marks of an image."""
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def name_ticks(axis: Axis, positions: Sequence[float] | np.ndarray, names: Sequence[str]) -> None:
    """Label positions of an axis, leaving out labels that would run into the one before.

    Words below an axis are turned by 90° rather than left out.
    """
    across = isinstance(axis, XAxis)
    turned = across and len(apart(axis, positions, names)) < len(names) and not all(map(str.isdecimal, names))
    kept = apart(axis, positions, names, turned)
    axis.set_ticks([positions[index] for index in kept], [names[index] for index in kept])
    axis.set_ticks([], minor=True)
    if turned:
        axis.set_tick_params(rotation=90)


def apart(axis: Axis, positions: Sequence[float] | np.ndarray, names: Sequence[str], turned: bool = False) -> list[int]:
    """Return which labels of an axis have room beside each other, in the order of their positions."""
    transform = axis.get_transform()
    places = transform.transform(np.asarray(positions, dtype=float))
    low, high = sorted(transform.transform(np.asarray(axis.get_view_interval())))
    across = isinstance(axis, XAxis) and not turned
    # Names and legends at the sides will take part of a width.
    room = (max(map(len, names)) * 0.62 + 0.6) / 0.75 if across else 1.15
    room *= tick_size(axis) / axis_length(axis) * ((high - low) or 1.0)
    kept: list[int] = []
    for index in np.argsort(places):
        if not kept or places[index] - places[kept[-1]] >= room:
            kept.append(int(index))
    return kept


def axis_length(axis: Axis) -> float:
    """Return the length of an axis in points, as it is before the layout makes room for what lies outside."""
    axis.axes.apply_aspect()
    box, dpi = axis.axes.get_window_extent(), axis.axes.figure.dpi
    return (box.width if isinstance(axis, XAxis) else box.height) * 72 / dpi


def tick_size(axis: Axis) -> float:
    """Return the font size of tick labels in points."""
    return float(axis.get_major_ticks(1)[0].label1.get_fontsize())


def short_layers(names: Iterable[Any], limit: int = 22) -> list[str]:
    """Shorten names of layers: without the leading parts they all share, and long ones without their middle.

    All keep equally many of their last parts, and with several layers the first (usually the number of the block).
    Names stay distinct, longer than `limit` if need be.
    """
    parts = [str(name).split(".") for name in names]
    if len(parts) == 1:
        return [_last_parts(parts[0], max(limit, 24))]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    parts = [part[shared:] for part in parts]
    for kept in range(max(map(len, parts)), 0, -1):
        short = [_without_middle(part, kept) for part in parts]
        if max(map(len, short)) <= limit:
            break
    return short if len(set(short)) == len(parts) else [".".join(part) for part in parts]


def _last_parts(parts: list[str], limit: int) -> str:
    """Return as many of the last parts of a name as fit, at least one."""
    fitting = (".".join(parts[start:]) for start in range(len(parts)))
    return next((name for name in fitting if len(name) <= limit), parts[-1])


def _without_middle(parts: list[str], kept: int) -> str:
    """Return the first part and the `kept` last ones, and a mark for those left out."""
    return ".".join(parts) if len(parts) <= kept + 1 else f"{parts[0]}…{'.'.join(parts[-kept:])}"
