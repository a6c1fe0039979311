"""What an import of LoRAs did.

Shape legend: K groups (LoRAs) (see `tucka.ops`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..routing import Route
from .seeding import Seeding


class LayerImport(NamedTuple):
    """How well the experts of one layer are the LoRAs' updates of it."""

    layer: str
    rank: int
    errors: tuple[float, ...]  # (K,) ‖expert − ΔW‖ / ‖ΔW‖ of every LoRA; 0 for one that leaves the layer alone


class Import(NamedTuple):
    """What an import did; `str` of it is a table."""

    names: tuple[str, ...]  # of the LoRAs; LoRA i is group i
    layers: tuple[LayerImport, ...]
    towers: tuple[str, ...]  # of the routers
    seeding: dict[str, Seeding]  # by tower name; empty without samples
    temperature: float  # of the routers

    @property
    def error(self) -> float:
        """The largest relative error of any LoRA in any layer."""
        return max(error for layer in self.layers for error in layer.errors)

    def route(self, *names: str | int) -> Any:
        """What gives every sample the LoRA that is named for it, at full strength: an argument for `tucka.pin_route`.

        Parameters
        ----------
        *names : str or int
            One for every sample, or one for all.

        Returns
        -------
        Route, or dict of Route by tower name
            With gates of 1, so that outputs are the LoRA's; a group alone would have the gate the router gives it.

        Raises
        ------
        ValueError
            If an adapter is not one of those imported.
        """
        unknown = [name for name in names if name not in self.names and name not in range(len(self.names))]
        if unknown or not names:
            raise ValueError(f"{unknown[0] if unknown else names!r} is not one of the adapters {list(self.names)}")
        groups = [self.names.index(name) if isinstance(name, str) else name for name in names]
        route = Route(torch.tensor(groups), torch.ones(len(groups), 1))
        return route if len(self.towers) == 1 else dict.fromkeys(self.towers, route)

    def __str__(self) -> str:
        width = max(len("layer"), *(len(line.layer) for line in self.layers))
        columns = [max(9, len(name)) for name in self.names]
        rows = [("layer", "rank", list(self.names))]
        rows += [(line.layer, str(line.rank), [f"{error:.3e}" for error in line.errors]) for line in self.layers]
        lines = [f"{a:{width}}  {b:>4}  " + "  ".join(f"{x:>{n}}" for x, n in zip(c, columns)) for a, b, c in rows]
        for tower, seeding in self.seeding.items():
            where = f" in {tower}" if tower else ""
            for name, share, gate in zip(self.names, *seeding):
                lines.append(f"{name}: {share:.1%} of its samples routed to it{where}, mean gate {gate:.4f}")
        return "\n".join(lines if self.seeding else [*lines, "the router is not seeded: no samples were given"])
