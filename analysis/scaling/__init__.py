"""Laws of score against size, the Pareto front of both, and the size at which one method overtakes another."""

from analysis.scaling.methods import BreakEven, break_even, fit_laws, law_table
from analysis.scaling.power_law import PowerLaw, fit_power_law
from analysis.tradeoffs import pareto_front

__all__ = ["BreakEven", "PowerLaw", "break_even", "fit_laws", "fit_power_law", "law_table", "pareto_front"]
