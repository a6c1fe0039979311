"""What a diagnosis says: one row for each check, and their table."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import NamedTuple, Optional

WIDTH = 100
"""Columns of the table."""

PASS, WARN, FAIL, ERROR, SKIPPED = "pass", "warn", "fail", "error", "skipped"

COLUMNS = "{check:<24} {outcome:<7} {measured:>8} {limit:>8}"
REMARK = len(COLUMNS.format(check="", outcome="", measured="", limit="")) + 3
"""Where the column of remarks starts."""


class Row(NamedTuple):
    """What one check found.

    Attributes
    ----------
    outcome : {"pass", "warn", "fail", "error", "skipped"}
        "warn" is legitimate, yet rarely wanted; "error" means that the check itself could not run.
    why : str
        What was found, or why the check does not apply.
    remedy : str
        What to do; there is one wherever the outcome is "warn", "fail" or "error".
    measured, tolerance : float, optional
        The number that was judged, and the largest one that passes.
    check : str
        The check's name.
    """

    outcome: str
    why: str = ""
    remedy: str = ""
    measured: Optional[float] = None
    tolerance: Optional[float] = None
    check: str = ""


def judged(measured: float, tolerance: float, why: str, remedy: str, note: str = "") -> Row:
    """A pass, with a note, if what was measured is within the tolerance; otherwise a failure. NaN fails."""
    if measured <= tolerance:
        return Row(PASS, note, "", measured, tolerance)
    return Row(FAIL, why, remedy, measured, tolerance)


def skipped(why: str, remedy: str = "") -> Row:
    """A check that does not apply."""
    return Row(SKIPPED, why, remedy)


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What `doctor` found; `str` of it is the table it printed.

    Attributes
    ----------
    title : str
        What was examined.
    rows : tuple of Row
        One for each check, in the order they ran.
    """

    title: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed, and none broke down; warnings are no failures."""
        return not any(row.outcome in (FAIL, ERROR) for row in self.rows)

    def __getitem__(self, check: str) -> Row:
        """The row of a check, by its name."""
        for row in self.rows:
            if row.check == check:
                return row
        raise KeyError(f"{check!r} is no check; the checks are {', '.join(row.check for row in self.rows)}")

    def __repr__(self) -> str:
        return f"Diagnosis({self._summary()})"

    def __str__(self) -> str:
        header = COLUMNS.format(check="check", outcome="outcome", measured="measured", limit="at most")
        lines = [self.title, "", header, "─" * WIDTH]
        for row in self.rows:
            lines += _lines(row)
        return "\n".join([*lines, "─" * WIDTH, self._summary()])

    def _summary(self) -> str:
        outcomes = [row.outcome for row in self.rows]
        said = {PASS: "passed", WARN: "warned", FAIL: "failed", ERROR: "could not run", SKIPPED: "skipped"}
        return ", ".join(f"{outcomes.count(key)} {word}" for key, word in said.items() if key in outcomes)


def _lines(row: Row) -> list[str]:
    """A row as lines: a short remark beside it where there is nothing to do, otherwise why and what to do below it."""
    shouted = row.outcome.upper() if row.outcome in (WARN, FAIL, ERROR) else row.outcome
    line = COLUMNS.format(
        check=row.check, outcome=shouted, measured=_number(row.measured), limit=_number(row.tolerance)
    )
    remark = textwrap.wrap(row.why, WIDTH - REMARK) or [""]
    if row.remedy or len(remark) > 2:
        return [line.rstrip(), *_paragraph("why", row.why), *_paragraph("do", row.remedy)]
    return [f"{line}   {remark[0]}".rstrip(), *(" " * REMARK + rest for rest in remark[1:])]


def _paragraph(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"    {label:<5}", subsequent_indent=" " * 9)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
