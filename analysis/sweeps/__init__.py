"""Sweeps: every run of a grid once, in parallel, each a row of a table that survives interruptions."""

from analysis.sweeps.driver import Plan, plan, sweep
from analysis.sweeps.grid import Run, expand
from analysis.sweeps.work import ROW_FILE, Script

__all__ = ["ROW_FILE", "Plan", "Run", "Script", "expand", "plan", "sweep"]
