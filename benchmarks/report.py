"""Tables of the quality benchmark, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib import rc_context

from .figures import draw_scores
from .selection import SELECTION_SEEDS
from .tasks import TASKS

NUMBERS = (
    "seed", "learning_rate", "adapter_parameters", "trainable_parameters", "validation", "test", "seconds",
    "cpu_seconds", "calibration_seconds", "nmi", "max_vio", "final_loss",
)  # fmt: skip


SETTING = ["arm", "settings", "epochs", "train_rows"]
"""Runs of a task that agree in these are averaged."""
SETTING_HEADINGS = ("arm", "settings", "epochs × rows")


def frame(rows: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """Results as a table with numbers where numbers are; runs that failed have none."""
    table = pd.DataFrame(rows)
    for name in NUMBERS:
        table[name] = pd.to_numeric(table[name])
    table["diverged"] = table["diverged"] == "True"
    table["selects"] = table["seed"].isin(SELECTION_SEEDS)
    return table


def final_scores(runs: pd.DataFrame, task: str) -> pd.DataFrame:
    """Test scores of every arm on a task, best first: mean, standard error, seeds, size, time, learning rate."""
    final = runs[(runs["task"] == task) & ~runs["selects"] & (runs["error"] == "")]
    groups = final.groupby(SETTING, sort=False)
    scores = groups.agg(
        score=("test", "mean"),
        error=("test", "sem"),
        validation=("validation", "mean"),
        seeds=("seed", "nunique"),
        parameters=("adapter_parameters", "mean"),
        learning_rates=("learning_rate", lambda rates: ", ".join(f"{rate:g}" for rate in sorted(set(rates)))),
        seconds=("cpu_seconds", "mean"),
        calibration=("calibration_seconds", "mean"),
        nmi=("nmi", "mean"),
        max_vio=("max_vio", "mean"),
        diverged=("diverged", "sum"),
        note=("note", "first"),
    )
    return scores.reset_index().sort_values("score", ascending=False, ignore_index=True)


def robustness(runs: pd.DataFrame, task: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Validation score by arm and learning rate, mean of the selection seeds, and whether one of them diverged.

    What was not tried is NaN; a run that failed or ended at no number counts as a score of 0, and as diverged.
    """
    tried = runs[(runs["task"] == task) & runs["selects"]].fillna({"validation": 0.0})
    tried = tried.assign(diverged=tried["diverged"] | (tried["error"] != ""))
    by = dict(index=SETTING, columns="learning_rate", sort=False)
    return tried.pivot_table("validation", **by), tried.pivot_table("diverged", **by) > 0


def failures(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that failed and did not succeed in a later try, perhaps with a later version of the arm's settings."""
    columns = ["task", "arm", "seed", "learning_rate"]
    succeeded = pd.MultiIndex.from_frame(runs.loc[runs["error"] == "", columns])
    return runs[(runs["error"] != "") & ~pd.MultiIndex.from_frame(runs[columns]).isin(succeeded)]


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are aligned to the right."""
    rule = [":---", *("---:" for _ in headings[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *lines))


def score_table(scores: pd.DataFrame) -> str:
    """`final_scores` as Markdown."""
    sizes = ("parameters", "seeds", "learning rate", "CPU s", "start s")
    headings = (*SETTING_HEADINGS, "score", *sizes, "NMI", "MaxVio", "")
    lines = [
        (
            *_cells(row.arm, row.settings, row.epochs, row.train_rows),
            f"{row.score:.2f}" + (f" ± {row.error:.2f}" if pd.notna(row.error) else ""),
            f"{row.parameters:,.0f}",
            str(row.seeds),
            row.learning_rates,
            f"{row.seconds:.0f}",
            _number(row.calibration, ".1f"),
            _number(row.nmi, ".2f"),
            _number(row.max_vio, ".2f"),
            "; ".join(filter(None, (row.note, f"{row.diverged} diverged" if row.diverged else ""))),
        )
        for row in scores.itertuples()
    ]
    return markdown(headings, lines)


def robustness_table(means: pd.DataFrame, diverged: pd.DataFrame) -> str:
    """`robustness` as Markdown: the best score, then points below it; a dagger where a run diverged."""
    rates = sorted(means.columns)
    lines = []
    for setting, line in means.iterrows():
        marks = diverged.loc[setting]
        cells = [_number(line[rate] - line.max(), "+.1f") + (" †" if marks[rate] else "") for rate in rates]
        lines.append((*_cells(*setting), f"{line.max():.2f}", *cells))
    return markdown((*SETTING_HEADINGS, "best", *(f"{rate:g}" for rate in rates)), lines)


def write(rows: Sequence[Mapping[str, str]], directory: Path) -> str:
    """Write `quality-tables.md`, `quality.svg` and `quality.png`; return the text of the tables.

    Raises
    ------
    ValueError
        If there are no results.
    """
    if not rows:
        raise ValueError("there are 0 results to write tables of, at least 1 is needed")
    runs = frame(rows)
    directory.mkdir(parents=True, exist_ok=True)
    parts = ["# Quality by task", "Test score in percent, mean ± standard error over seeds."]
    scores = {}
    for task in (task for task in TASKS if (runs["task"] == task).any()):
        parts.append(f"## {task}")
        final, (means, diverged) = final_scores(runs, task), robustness(runs, task)
        if len(final):
            scores[task] = final
            parts.append(score_table(final))
        if len(means):
            heading = "Validation score, points below the arm's best by learning rate († a run diverged):"
            parts += [heading, robustness_table(means, diverged)]
    failed = failures(runs)
    if len(failed):
        lines = [(r.task, r.arm, f"{r.seed}", f"{r.learning_rate:g}", r.error) for r in failed.itertuples()]
        parts += ["## Failed runs", markdown(("task", "arm", "seed", "learning rate", "error"), lines)]
    text = "\n\n".join(parts) + "\n"
    (directory / "quality-tables.md").write_text(text)
    if scores:
        figure = draw_scores(scores)
        # With a fixed salt and no date, equal results give equal files.
        with rc_context({"svg.hashsalt": "quality"}):
            figure.savefig(directory / "quality.svg", metadata={"Date": None})
        figure.savefig(directory / "quality.png", dpi=150)
    return text


def _cells(arm: str, settings: str, epochs: str, train_rows: str) -> tuple[str, str, str]:
    """A setting under `SETTING_HEADINGS`; JSON loses its braces and quotes."""
    plain = settings.strip("{}").replace('"', "").replace(": ", "=") or "–"
    return arm, plain, f"{float(epochs):g} × {train_rows}"


def _number(value: float, form: str) -> str:
    return "" if pd.isna(value) else format(value, form)
