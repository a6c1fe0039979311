"""The section that needs the log of a training: loads over time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.figures import Inputs
from analysis.routes import load_history

from .drawings import drawn, side_by_side
from .markup import counted, percent, table
from .page import Section

NO_LOADS = (
    "The log holds no loads of groups; train with tucka.callbacks.BalanceCallback among the Trainer's callbacks to "
    "have them logged."
)
CHANGE = 0.03
"""Changes of the busiest group's share below this are noise."""

DEAD = 0.1
"""A group is called dead below this part of an even share, as revivals do."""


def towers_in(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the towers whose loads a log holds; "" where there is one."""
    found = (re.fullmatch(r"load/(?:(.+)/)?group_\d+", key) for entry in log for key in entry)
    return list(dict.fromkeys(match[1] or "" for match in found if match))


def load(inputs: Inputs, tower: str) -> Section:
    """How evenly the groups were used over training, in one tower."""
    log: Any = inputs.log
    towers, history = towers_in(log), load_history(log, tower=tower or None)
    shares = history.pivot_table(index="step", columns="group", values="share").sort_index()
    even, last, first = 1 / shares.shape[1], shares.iloc[-1], shares.iloc[0]
    dead = int((last < DEAD * even).sum())
    if len(shares) > 1:
        change = last.max() - first.max()
        trend = "hardly changed" if abs(change) < CHANGE else "evened out" if change < 0 else "grew less even"
        sentence = (
            f"From step {_step(shares.index[0])} to {_step(shares.index[-1])} the loads {trend}: the busiest group "
            f"went from {percent(first.max())} to {percent(last.max())} (even: {percent(even)}), "
        )
    else:
        sentence = (
            f"At step {_step(shares.index[0])} the busiest group had {percent(last.max())} (even: {percent(even)}), "
        )
    sentence += f"and {counted(dead, 'group is', 'groups are') if dead else 'no group is'} dead at the end."
    frame = pd.DataFrame(
        {
            "group": [str(group) for group in shares.columns],
            "first": first.to_numpy(),
            "mean": shares.mean().to_numpy(),
            "lowest": shares.min().to_numpy(),
            "highest": shares.max().to_numpy(),
            "last": last.to_numpy(),
        }
    )
    shown = table(frame, "Share of the training samples", dict.fromkeys(frame.columns[1:], percent))
    number = towers.index(tower)
    title = f"Load over training: {tower}" if tower else "Load over training"
    return Section(
        f"load-{number}", title, sentence, (side_by_side(drawn("load", inputs, tower=tower or None), shown),)
    )


def _step(value: Any) -> str:
    return f"{int(value):,}"
