"""Weights files: what they declare and hold, checked against a configuration before any model is touched.

An adapter's tensors stand in `adapter_model.safetensors` and are read from nowhere else. Keys end in
`tucka_experts.{core, expert_factor, …}` and `tucka_router.{centroids, …}`; `expert_shapes` and `router_shapes` say
their shapes (D input and O output features of a layer; see `tucka.ops`).
"""

from __future__ import annotations

import math
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .patterns import rank_lookup, require_quick_matching

if TYPE_CHECKING:
    from .config import TuckAConfig

PUBLISHED_KEYS = {
    "tucka_g": "tucka_experts.core",
    "tucka_c": "tucka_experts.expert_factor",
    "tucka_u": "tucka_experts.input_factor",
    "tucka_ec": "tucka_router.centroids",
}
"""Ends of the published code's keys, and of ours."""

FILE_PREFIX = "base_model.model."

OWN_KEY = re.compile(rf"\.(?:tucka_experts\.|tucka_router\.|(?:{'|'.join(PUBLISHED_KEYS)})$)")
"""In the key of a tensor of experts or of a router, ours or the published code's."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of the tensors of an adapter, but for the router's flag."""

TYPES = (*FLOATS, "BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
"""Types of what stands beside them: trained heads and biases."""

ROOM = 2**23
"""Numbers that an adapter may always hold, however small its model or file: 32 MiB."""

Shape = tuple[Any, ...]
"""Sizes; None stands for one that only the model knows."""


class Declared(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


# --- files -------------------------------------------------------------------------------------------------------


def check_weights_beside(
    directory: str | Path, subfolder: str | None, config: TuckAConfig, **hub_options: Any
) -> dict[str, Declared] | None:
    """Check the weights file beside a configuration against it, one tensor at a time.

    Parameters
    ----------
    directory : str or Path
        A directory, or a repository on the hub.
    subfolder : str, optional
        Where in it.
    config : TuckAConfig
        What was read there.
    **hub_options
        For `huggingface_hub.hf_hub_download`.

    Returns
    -------
    dict or None
        What the file declares, by key; empty if there are no weights, None if that cannot be told.

    Raises
    ------
    ValueError
        If there are weights but no whole safetensors file with experts, or a shape or a type that the configuration
        does not give, or values that are not finite.
    """
    path = _weights_path(Path(directory) / (subfolder or ""), str(directory), subfolder, hub_options)
    if path is None or not os.path.lexists(path):
        return None if path is None else {}
    header = read_header(path)
    _require_experts(path, header, config)
    _check_shapes(path, header, config)
    with safe_open(path, framework="pt") as file:
        for key, (dtype, _) in header.items():
            if dtype in FLOATS:
                require_sound(key, file.get_tensor(key), f"{path}: ")
    return header


def _weights_path(folder: Path, repository: str, subfolder: str | None, hub_options: dict[str, Any]) -> Path | None:
    """Where the weights are; the place may be empty. None: on the hub, out of reach."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if (folder / CONFIG_NAME).is_file():  # or else the configuration came from the hub as well
        pickled = not os.path.lexists(path) and (folder / WEIGHTS_NAME).exists()
    else:
        try:
            return Path(hf_hub_download(repository, path.name, subfolder=subfolder, **hub_options))
        except LocalEntryNotFoundError:  # no connection, and an earlier one fetched the configuration alone
            return None
        except EntryNotFoundError:
            known = {name: hub_options[name] for name in ("revision", "token") if name in hub_options}
            pickled = file_exists(repository, "/".join(filter(None, (subfolder, WEIGHTS_NAME))), **known)
    if pickled:
        raise ValueError(f"{folder / WEIGHTS_NAME} is a pickle; adapters are read from {path.name} only")
    return path


def read_header(path: Path) -> dict[str, Declared]:
    """What a safetensors file declares, by key; `ValueError` if it is none or not whole."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise OSError("it is no regular file")
        with safe_open(path, framework="pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: Declared(part.get_dtype(), tuple(part.get_shape())) for key, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def header_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, by key; `ValueError` if it is none or not whole."""
    return {key: declared.shape for key, declared in read_header(path).items()}


def require_sound(key: str, value: Tensor, place: str = "") -> None:
    """Refuse experts and routers that are not finite, and any other tensor that holds NaN, by `ValueError`."""
    bad = ~value.isfinite() if is_own(key) else value.isnan()
    if bad.any():
        raise ValueError(f"{place}{key} holds {int(bad.sum())} of {value.numel()} values that are not finite")


# --- a file against its configuration ----------------------------------------------------------------------------


def is_own(key: str) -> bool:
    """Whether a key means a tensor of experts or of a router, and not one that PEFT saves beside them."""
    return OWN_KEY.search(key) is not None


def layer_of(key: str) -> str:
    """Name of the adapted layer that a key belongs to."""
    return OWN_KEY.split(key.removeprefix(FILE_PREFIX))[0]


def expert_shapes(
    config: TuckAConfig, r: int, d: int | None = None, o: int | None = None, *, routed: bool = True
) -> dict[str, Shape]:
    """Shapes of every tensor that the experts of a layer can have; one that runs before the router has one expert."""
    k, t, p = (config.k, config.t, config.p) if routed else (1, 1, 1)
    q = config.trained(r)
    v = o if config.form == "additive" else d
    factors: dict[str, Shape] = dict(expert_factor=(t, p), input_factor=(d, q), output_factor=(v, q))
    factors |= dict(held_input=(d, r - q), held_output=(v, r - q))
    lasso: dict[str, Shape] = dict(lasso_expert=(p,), lasso_input=(r,), lasso_output=(r,))
    w, a = config.block_width(r), None if d is None or o is None else config.axis_width(d, o)
    axes: Shape = (None, None, None) if a is None or d is None else (a, a, d // a)
    return {"core": (k, p, r, w), "shared_core": (r, w), "axis_core": axes, **factors, **lasso}


def router_shapes(config: TuckAConfig, width: int | None) -> dict[str, Shape]:
    """Shapes of every tensor that a router can have, given the input features of its layer."""
    k, t = config.k, config.t
    features, placed = (None, None) if width is None else (config.feature_size(width), config.placed_size(width))
    scaling: dict[str, Shape] = dict(center=(features,), scale=(features,), axes=(features, placed), spread=())
    return dict(centroids=(k * t, placed), initialised=(), balance_bias=(k, t), log_share=(k, t), **scaling)


def _require_experts(path: Path, header: dict[str, Declared], config: TuckAConfig) -> None:
    """Refuse a file without experts: nothing in it would bound the sizes that its configuration declares."""
    if not any(key.endswith((".tucka_experts.core", ".tucka_g")) for key in header):
        raise ValueError(f"{path} holds {len(header)} tensors, none with a core of experts")
    numbers = sum(math.prod(declared.shape) for declared in header.values())
    if config.k**2 > max(ROOM, 16 * numbers):  # the identity of the groups' mode is formed
        raise ValueError(f"k={config.k} groups take {config.k}² numbers to work with, but {path} holds {numbers}")
    require_quick_matching(config, {layer_of(key) for key in header}, "rank_pattern")


def _check_shapes(path: Path, header: dict[str, Declared], config: TuckAConfig) -> None:
    rank_of = rank_lookup(config)
    for key, (dtype, shape) in header.items():
        if dtype not in TYPES:
            raise ValueError(f"{path}: {key} is of type {dtype}, not {', '.join(TYPES[:-1])} or {TYPES[-1]}")
        if not is_own(key):
            continue
        part, rank = part_of(key), rank_of(layer_of(key))
        types = ("BOOL",) if part == "initialised" else FLOATS
        if dtype not in types:
            raise ValueError(f"{path}: {key} is of type {dtype}, not {' or '.join(types)}")
        expected = {**expert_shapes(config, rank), **router_shapes(config, None)}.get(part)
        unrouted = expert_shapes(config, rank, routed=False).get(part) if config.router_depth else expected
        if expected is not None and not (fits(shape, expected) or fits(shape, unrouted or expected)):
            given = tuple("…" if size is None else size for size in expected)
            raise ValueError(
                f"{path}: {key} has shape {shape}, but k={config.k}, t={config.t}, p={config.p}, "
                f"r={rank}, block_size={config.block_size}, trained_columns={config.trained_columns}, "
                f"axis_block_size={config.axis_block_size} of its configuration give {given}"
            )


def part_of(key: str) -> str:
    """Short name of the tensor that a key of ours, or of the published code, means."""
    end = key.rpartition(".")[2]
    return PUBLISHED_KEYS.get(end, end).rpartition(".")[2]


def fits(shape: tuple[int, ...], expected: Shape) -> bool:
    """Whether a shape is the expected one, as far as that is known."""
    return len(shape) == len(expected) and all(e in (None, s) for e, s in zip(expected, shape))
