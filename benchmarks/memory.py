"""Memory of TuckA beside PEFT's LoRA and the frozen base model: what a training step keeps, reaches and stores.

    python -m benchmarks.memory --model bert

Saved activations: bytes of the storages that autograd keeps for the backward, each counted once, parameters and buffers
left out. Peak: bytes of all tensors that a step makes and that are alive at the same time (`benchmarks.live`); on a GPU
also what its allocator reached. State: bytes of what trains and of the moments AdamW keeps of it, beside the closed
forms of `analysis.parameters`. These are counts: they are the same on every machine, and one step tells them.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from analysis.parameters import count, layer_shapes

from .arms import parse_settings
from .live import LiveBytes
from .quality import names
from .records import Records, circumstances
from .shapes import Setting, new_batch, new_model, setting_of
from .speed_arms import TRAINED, Arm, Batch, build, config_of, training_step
from .speed_options import add_options, command_line, prepare


def saved_activation_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that autograd holds between forward and backward, parameters and buffers left out."""
    own = {storage_of(tensor) for tensor in chain(model.parameters(), model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in own:
            kept[storage_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(**batch).loss  # holds the graph, so that no storage is freed and its address taken again
    del loss
    return sum(kept.values())


def storage_of(tensor: Tensor) -> int:
    """Address of a tensor's memory, which views share."""
    return tensor.untyped_storage().data_ptr()


def peak_live_bytes(arm: Arm, batch: Batch) -> int:
    """The most that the tensors of a training step take at once, beyond parameters and state."""
    with LiveBytes() as live:
        training_step(arm, batch)
    return live.peak


def cuda_peak_bytes(arm: Arm, batch: Batch) -> int:
    """What the GPU's allocator reaches in a training step, beyond what it held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training_step(arm, batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def trained_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that train."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def moment_bytes(optimiser: torch.optim.Optimizer | None) -> int:
    """Bytes of what the optimiser keeps for every entry; its counters of steps are no such thing."""
    states = () if optimiser is None else optimiser.state.items()
    return sum(
        value.nbytes
        for parameter, state in states
        for value in state.values()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    )


def closed_form_bytes(text: str, setting: Setting, base: nn.Module) -> int:
    """Bytes that should train by the closed form, all in single precision."""
    name, _, listed = text.partition(":")
    config: Any = config_of(name, setting, **parse_settings(listed))
    if config is None:
        return 0
    if isinstance(config, LoraConfig):
        return 4 * count(layer_shapes(base, config), "lora", r=config.r).total
    return 4 * count(layer_shapes(base, config), "tucka", config=config).total


def measure(text: str, base: nn.Module, setting: Setting, batch: Batch) -> dict[str, int]:
    """The numbers of one arm."""
    arm = build(text, base, setting, batch)
    training_step(arm, batch)  # makes the optimiser's state, which is no part of a step's peak
    numbers = {
        "saved_activation_bytes": saved_activation_bytes(arm.model, batch),
        "trained_bytes": trained_bytes(arm.model),
        "closed_form_bytes": closed_form_bytes(text, setting, base),
        "moment_bytes": moment_bytes(arm.optimiser),
        "peak_live_bytes": peak_live_bytes(arm, batch),
    }
    return {**numbers, "cuda_peak_bytes": cuda_peak_bytes(arm, batch)} if setting.device != "cpu" else numbers


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__, formatter_class=shown)
    add_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure every arm, and write it."""
    argv = sys.argv[1:] if argv is None else argv
    args = read_arguments(argv)
    prepare(args)
    setting = setting_of(args)
    base, batch = new_model(setting), new_batch(setting)
    about = circumstances(command_line("benchmarks.memory", argv))
    shared = dict(what="memory", model=setting.model, dtype=setting.dtype, device=setting.device)
    for arm in names(args.arms) if args.arms else TRAINED:
        numbers = measure(arm, base, setting, batch)
        Records(args.out).put([{**shared, "arm": arm, "settings": setting.details, **numbers, **about}])
        shown = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in numbers.items())
        print(f"memory {setting.model} {arm}: {shown}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
