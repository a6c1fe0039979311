"""Sweeps in tests: no warning passes."""

import warnings

from analysis import sweep


def run(objective, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sweep(objective, *args, progress=False, **options)
