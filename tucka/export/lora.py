"""Export: groups of experts as ordinary LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from peft import PeftModel
from torch import Tensor

from ..config import TuckAConfig
from ..model import dispatchers_of, single_adapter_name
from .directory import write_export
from .exactness import warn_of_shared_input
from .factors import LowRank, low_rank_updates
from .lora_files import beside_experts, lora_config, write_lora
from .measurement import Candidate, OutputError, output_errors
from .routes import FixedRoute, Observed, RouteLike, fixed_routes, observe
from .serving import ServingRouter


class ExportedLora(NamedTuple):
    """One LoRA directory."""

    directory: Path
    routes: dict[str, FixedRoute]  # by tower
    error: Optional[OutputError]  # on the loader's samples of that group; of all samples for a `Route` or the mean


class LoraExport(NamedTuple):
    """What an export wrote."""

    loras: tuple[ExportedLora, ...]
    ranks: dict[str, int]  # by layer
    inexact_layers: tuple[str, ...]  # also applied to relative positions, where a LoRA and the experts differ

    def __str__(self) -> str:
        lines = [f"{'directory':24}  route from    samples  output error  of the update"]
        for lora in self.loras:
            source = "/".join(dict.fromkeys(route.source for route in lora.routes.values()))
            error = lora.error
            shown = (
                "not measured" if error is None else f"{error.samples:7}  {error.outputs:12.3e}  {error.update:13.3e}"
            )
            lines.append(f"{lora.directory.name:24}  {source:10}  {shown}")
        return "\n".join(lines)


def to_lora(
    model: PeftModel,
    directory: str | Path,
    route: RouteLike | Mapping[str, RouteLike] | None = None,
    loader: Iterable[Any] | None = None,
    *,
    rank: int | None = None,
    adapter_name: str | None = None,
    samples: int = 512,
    save_embedding_layers: bool | str = "auto",
) -> LoraExport:
    """Write fixed routes of an adapter as ordinary PEFT LoRA adapters of the rank of their updates.

    That is R, or with ``axis_block_size`` the narrower side of the layer, unless `rank` is less. A LoRA of that rank is
    exact for its route: ``PeftModel.from_pretrained(base, directory)`` gives the outputs of the adapted model
    with that route pinned. Trained heads and biases come along; so do layers before the router and the shared slice,
    which act in every route.

    Parameters
    ----------
    model : PeftModel
        The adapted model; it is left as it is.
    directory : str or Path
        Where to write. An earlier export there is replaced whole; an adapter that is no export is not touched.
    route : int, Route, "mean", or a dict of these by tower, optional
        Default: every group, in ``directory/group-0``, ``directory/group-1``, …, and the router beside them (see
        `tucka.export.ServingRouter`). An integer is one group; a `Route` of one unit with gates is that route exactly;
        "mean" is the mean over the loader's routed units. Models with several towers need a dict.
    loader : iterable, optional
        Batches the model takes; they are read once and kept. A sample's gates are its own, a group's LoRA has one set
        for all: with a loader the mean gates of the samples that chose the group, and the report says what that costs
        in the outputs; without one, the gates at the group's centroids.
    rank : int, optional
        Write LoRAs of this rank at most: of an update of a higher one, the best approximation (truncated SVD). Give a
        loader to measure what that costs.
    adapter_name : str, optional
        Default: the active adapter. With a loader it must be the active one.
    samples : int
        How many samples of the loader to read.
    save_embedding_layers : bool or "auto"
        As in `PeftModel.save_pretrained`.

    Returns
    -------
    LoraExport
        Directories, ranks, where gates came from and measured errors; `str` of it is a table.

    Raises
    ------
    TypeError
        If `model` is no `PeftModel`.
    ValueError
        If `rank` is below 1, the route does not fit the model, an update is not finite, the router has not started, or
        `directory` holds an adapter that is no export. Nothing is written then.

    Warns
    -----
    UserWarning
        If an adapted layer is also applied to relative positions (DeBERTa) and samples are routed: only the shared
        slice acts there, which no LoRA can say.

    Notes
    -----
    Additive form: A = Uᵀ, B = α V Mᵀ. Multiplicative form: A = Uᵀ, B = α W U Mᵀ. A slice E on the axes adds W Eᵀ, and
    one of A and B is then the identity. Computed in single precision at least.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"to_lora takes a PeftModel, but got a {type(model).__name__}")
    if rank is not None and rank < 1:
        raise ValueError(f"a LoRA has a rank of at least 1, got rank={rank}")
    name = single_adapter_name(model, adapter_name)
    config: Any = model.peft_config[name]
    observed = None if loader is None else observe(model, name, loader, samples)
    wanted = {"": route} if route is not None else _every_group(model, name, config)
    routes = {part: fixed_routes(model, name, one, observed) for part, one in wanted.items()}
    updates = {part: low_rank_updates(model, name, one, rank) for part, one in routes.items()}
    errors = _errors(model, name, routes, updates, observed)
    inexact = warn_of_shared_input(model, name)
    beside = beside_experts(model, name, save_embedding_layers)
    router = ServingRouter.of(model, name) if route is None and len(dispatchers_of(model, name)) == 1 else None

    def write(folder: Path) -> None:
        for part, update in updates.items():
            write_lora(folder / part, model, lora_config(model, name, update), update, beside)
        if router is not None:
            router.write(folder)

    write_export(directory, _record(name, routes, errors), write)
    loras = tuple(ExportedLora(Path(directory) / part, routes[part], errors[part]) for part in routes)
    ranks = {layer: len(update.a) for layer, update in next(iter(updates.values())).items()}
    return LoraExport(loras, ranks, inexact)


def _every_group(model: PeftModel, name: str, config: TuckAConfig) -> dict[str, dict[str, int]]:
    towers = list(dispatchers_of(model, name))
    if len(towers) > 1 and config.k > 1:
        raise ValueError(
            f"the model has {len(towers)} towers, each with a router of k={config.k} groups: give "
            f"route={{tower: group}} for the combination to export; the towers are {towers}"
        )
    return {f"group-{group}": dict.fromkeys(towers, group) for group in range(config.k)}


def _errors(
    model: PeftModel,
    name: str,
    routes: dict[str, dict[str, FixedRoute]],
    updates: dict[str, dict[str, LowRank]],
    observed: Observed | None,
) -> dict[str, OutputError | None]:
    if observed is None:
        return dict.fromkeys(routes)
    candidates = [Candidate(updates[part], served_by(routes[part], observed)) for part in routes]
    return dict(zip(routes, output_errors(model, name, candidates, observed)))


def served_by(routes: dict[str, FixedRoute], observed: Observed) -> Tensor:  # (N,) bool
    """The units that chose the groups; all of them for a route that a user gave whole, or for a mean."""
    serves = torch.ones(sum(observed.units), dtype=torch.bool)
    for tower, route in routes.items():
        chosen = observed.routes[tower].group
        # A tower may see another number of units (several images for a prompt); those tell nothing of the samples.
        if route.group is not None and route.source != "given" and len(chosen) == len(serves):
            serves &= (chosen == route.group).cpu()
    return serves


def _record(
    name: str, routes: dict[str, dict[str, FixedRoute]], errors: dict[str, OutputError | None]
) -> dict[str, Any]:
    """What the file beside the LoRAs says of them."""
    lines = {}
    for part, one in routes.items():
        towers = {tower: {**route._asdict(), "weights": route.weights.tolist()} for tower, route in one.items()}
        error = errors[part]
        lines[part or "."] = {"routes": towers, "error": None if error is None else error._asdict()}
    return {"kind": "lora", "adapter": name, "loras": lines}
