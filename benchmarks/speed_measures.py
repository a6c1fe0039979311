"""What the speed benchmark measures: each function gives the seconds of its arms, round by round."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from .calibration import seconds
from .shapes import Setting, new_batch, new_model
from .speed_arms import Arm, Batch, build, inference, training_step
from .timing import Clock, interleave

RANKS = (1, 2, 4, 8, 16, 32, 64)

COUNTS = (4, 16, 64, 256, 1024, 4096)
"""Numbers of experts K·T beside 1: all in groups of one, and as many groups as experts in a group."""

EXPERTS = (
    "tucka:k=1,t=1",
    *(f"tucka:k={count},t=1" for count in COUNTS),
    *(f"tucka:k={round(count**0.5)},t={round(count**0.5)}" for count in COUNTS),
)

RANKED = ("frozen", "lora", "tucka")

LOADED = ("lora", "tucka")
"""Arms whose files are loaded, saved and switched between."""

IMPORTS = {"peft": "import peft", "tucka": "import peft, tucka"}
"""What a fresh interpreter is asked to import."""


class Timed(NamedTuple):
    """Seconds of arms that were measured in turn.

    Attributes
    ----------
    what : str
        Name of the measurement.
    setting : Setting or None
        What the arms share; None where no model is involved.
    seconds : dict of str to list of float
        By arm, one number for each round.
    references : tuple of str
        The arms that others are compared with.
    extras : dict of str to float
        Numbers of the measurement that its readers need: how many tokens, how many operations.
    """

    what: str
    setting: Setting | None
    seconds: dict[str, list[float]]
    references: tuple[str, ...] = ("lora", "frozen")
    extras: dict[str, float] = {}  # noqa: RUF012


Measure = Callable[[Setting, Sequence[str], int, int], Iterator[Timed]]
"""Of (setting, arms, rounds, warm-up rounds); each result as soon as it is there."""


def train(setting: Setting, names: Sequence[str], rounds: int, warmup: int) -> Iterator[Timed]:
    """Training steps."""
    base, batch = new_model(setting), new_batch(setting)
    arms = [build(name, base, setting, batch) for name in names]
    clocks = {arm.name: partial(seconds, partial(training_step, arm, batch), setting.device) for arm in arms}
    work = {"operations": 4.0 * matrix_parameters(base) * setting.batch * setting.positions}
    yield Timed("train", setting, interleave(clocks, rounds, warmup), extras=work)


def experts(setting: Setting, names: Sequence[str], rounds: int, warmup: int) -> Iterator[Timed]:
    """Training steps with more and more experts, compared with the first arm."""
    for timed in train(setting, names, rounds, warmup):
        yield timed._replace(what="experts", references=(names[0],))


def ranks(
    setting: Setting, names: Sequence[str], rounds: int, warmup: int, sizes: Sequence[int] = RANKS
) -> Iterator[Timed]:
    """Training steps at several ranks, the arms of one rank in turn."""
    for rank in sizes:
        for timed in train(replace(setting, rank=rank), names, rounds, warmup):
            yield timed._replace(what="ranks")


def forward(setting: Setting, names: Sequence[str], rounds: int, warmup: int) -> Iterator[Timed]:
    """Forwards without gradient."""
    base, batch = new_model(setting), new_batch(setting)
    arms = [build(name, base, setting, batch) for name in names]
    yield Timed("forward", setting, interleave(_forwards(arms, batch, setting), rounds, warmup))


def merged(setting: Setting, names: Sequence[str], rounds: int, warmup: int) -> Iterator[Timed]:
    """Forwards of the base and of adapters that were merged into it."""
    for timed in forward(setting, names, rounds, warmup):
        yield timed._replace(what="merged", references=("frozen",))


def decode(
    setting: Setting, names: Sequence[str], rounds: int, warmup: int, batches: Sequence[int] = (1, 8), new: int = 32
) -> Iterator[Timed]:
    """Reading a prompt of so many positions, and each token written after it, at several batch sizes."""
    base, everything = new_model(setting), new_batch(replace(setting, batch=max(batches)))
    arms = [build(name, base, setting, everything) for name in names]
    for size in batches:
        prompt = {name: everything[name][:size] for name in ("input_ids", "attention_mask")}
        one = replace(setting, batch=size)
        prefills = _forwards(arms, {**prompt, "use_cache": True}, one)
        read = {"tokens": float(size * setting.positions)}
        yield Timed("prefill", one, interleave(prefills, rounds, warmup), extras=read)
        steps: dict[str, Clock] = {arm.name: partial(seconds_per_token, arm.model, prompt, new) for arm in arms}
        yield Timed("decode", one, interleave(steps, rounds, warmup), extras={"tokens": float(size)})


def _forwards(arms: Sequence[Arm], batch: Batch, setting: Setting) -> dict[str, Clock]:
    clocks: dict[str, Clock] = {}
    for arm in arms:
        arm.model.eval()
        clocks[arm.name] = partial(seconds, partial(inference, arm, batch), setting.device)
    return clocks


class TokenClock(BaseStreamer):
    """Notes when `generate` hands over the prompt, the token that reading it gave, and every token after."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with tokens on the CPU, so what made them has ended."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to hand over."""


def seconds_per_token(model: Any, prompt: Batch, new: int) -> float:
    """Greedy generation: the mean time between a token and the next, the reading of the prompt left out."""
    if new < 2:
        raise ValueError(f"the time between tokens needs at least 2 of them, got {new}")
    clock = TokenClock()
    model.generate(**prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=clock)
    return (clock.times[-1] - clock.times[1]) / (new - 1)


def load(setting: Setting, names: Sequence[str], rounds: int, warmup: int) -> Iterator[Timed]:
    """Saving an adapter, loading it beside another, and making the other one of two adapters active."""
    base, batch = new_model(setting), new_batch(setting)
    clocks: dict[str, dict[str, Clock]] = {"save": {}, "load": {}, "switch": {}}
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            model: Any = build(name, base, setting, batch).model
            place = Path(directory, name)
            save = partial(model.save_pretrained, place, selected_adapters=["default"])
            clocks["save"][name] = partial(seconds, save, setting.device)
            clocks["save"][name]()
            model.load_adapter(place, "other")
            clocks["load"][name] = partial(_seconds_to_load, model, place, setting.device)
            clocks["switch"][name] = partial(_seconds_to_switch, model, setting.device)
        for what, one in clocks.items():
            yield Timed(what, setting, interleave(one, rounds, warmup), references=("lora",))


def _seconds_to_load(model: Any, directory: Path, device: str) -> float:
    taken = seconds(lambda: model.load_adapter(directory, "loaded"), device)
    model.delete_adapter("loaded")
    return taken


def _seconds_to_switch(model: Any, device: str) -> float:
    """Mean of a switch there and a switch back."""
    return sum(seconds(partial(model.set_adapter, name), device) for name in ("other", "default")) / 2


def imports(rounds: int, warmup: int, statements: dict[str, str] = IMPORTS) -> Iterator[Timed]:
    """Imports in fresh interpreters, whose own start does not count."""
    clocks: dict[str, Clock] = {name: partial(seconds_to_import, text) for name, text in statements.items()}
    first = next(iter(statements))
    yield Timed("import", None, interleave(clocks, rounds, warmup), references=(first,))


def seconds_to_import(statement: str) -> float:
    """Wall time of a statement in a fresh interpreter."""
    code = f"import time; begun = time.perf_counter(); {statement}; print(time.perf_counter() - begun)"
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(ended.stdout.split()[-1])


def matrix_parameters(model: nn.Module) -> int:
    """Entries of the weights of all linear layers: those that every position is multiplied with, but for heads."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
