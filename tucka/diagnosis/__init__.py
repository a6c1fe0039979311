"""The self-check: what the method promises, tried on a user's own model and batch.

Every check is a function of a `Subject` that returns a `Row`; `doctor` runs them all and prints their table.
"""

from .examination import CHECKS, doctor
from .report import Diagnosis, Row

__all__ = ["CHECKS", "Diagnosis", "Row", "doctor"]
