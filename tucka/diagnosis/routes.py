"""Checks of routes: taken once in a forward, and not moved by neighbours."""

from __future__ import annotations

from ..routing import Route
from .comparison import largest, main_output, route_difference, rows_of, tolerance_of
from .report import FAIL, PASS, WARN, Row, judged, skipped
from .subject import Subject

MOST_ALONE = 8
"""Samples that are run alone at most."""


def forward_and_routes(subject: Subject) -> Row:
    """The model runs on the batch, every router takes its route, and the output is finite."""
    output, routes = subject.routed()
    silent = [tower or "the model" for tower, taken in routes.items() if not taken]
    if not bool(main_output(output).isfinite().all()):
        return Row(
            FAIL,
            "The model's output on this batch holds NaN or infinity.",
            "If 'finite numbers' passes, look at the base model alone (with model.disable_adapter(): …), at the "
            "batch, and at overflow in float16; bfloat16 has the range of float32.",
        )
    if silent:
        outcome = FAIL if len(silent) == len(routes) else WARN
        return Row(
            outcome,
            f"No adapted layer of {', '.join(silent)} ran on this batch, so its router and experts act on nothing here "
            "and would not train.",
            "Give a batch that uses that part of the model, or leave its layers out (exclude_modules).",
        )
    units = sorted({len(route.group) for taken in routes.values() for route in taken})
    routers = "1 router" if len(routes) == 1 else f"{len(routes)} routers"
    return Row(PASS, f"{routers}, {' and '.join(map(str, units))} unit{'' if units == [1] else 's'} routed")


def batch_invariance(subject: Subject) -> Row:
    """A sample is routed alone as it is in the batch."""
    samples = subject.samples
    if subject.config.routing == "batch":
        return skipped(
            "By design a route depends on the whole batch here (routing='batch', as in the paper), and so do "
            "predictions.",
            "If a prediction must not depend on its neighbours, use routing='sample'.",
        )
    if samples < 2:
        return skipped(f"the batch has {samples} sample(s); give two or more")
    _, together = subject.routed()
    units = {len(route.group) for taken in together.values() for route in taken}
    if units != {samples}:
        return skipped(f"the model routes {sorted(units)} units of {samples} samples")
    moved = {sample: _moved_alone(subject, together, sample) for sample in range(min(samples, MOST_ALONE))}
    sample, worst = max(moved.items(), key=lambda item: (item[1] != item[1], item[1]))  # NaN is the worst
    return judged(
        worst,
        tolerance_of(subject.model),
        f"Sample {sample} is routed differently alone and in the batch (its scores differ by {worst:.2g}): what the "
        "router reads depends on the other samples.",
        "Let the router read a layer that treats samples apart: set router_module, or router_depth=0; look for "
        "statistics over the batch before the layer it reads now.",
    )


def _moved_alone(subject: Subject, together: dict[str, list[Route]], sample: int) -> float:
    """How far the routes of a sample alone lie from its routes in the batch."""
    _, alone = subject.routed(subject.part(sample, sample + 1))
    return largest(
        route_difference(
            single, rows_of(whole, sample, sample + 1), subject.dispatchers[tower].router(subject.adapter_name)
        )
        for tower, taken in together.items()
        for whole, single in zip(taken, alone[tower])
    )
