"""What calibration costs: its time in training steps of the same model, and the memory it holds.

Time: one process calibrates a model and trains it on the same batches, each several times in turn, and the ratio of the
medians is the cost in training steps. Memory: the bytes that calibration holds beyond one batch, counted from the
moments of every layer, beside the peak of live tensors in calibration and in training steps. The bytes held depend
on widths, ranks and experts and not on how many samples are read, so the count is made for any model from its shapes.

    python -m benchmarks.calibration time --width 384 --layers 6 --start gradient
    python -m benchmarks.calibration memory --width 1024 --layers 8 --start hosvd
    python -m benchmarks.calibration arithmetic --width 4096 --layers 32 --intermediate 11008
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, logging

import tucka
from tucka.moments import FORMED_LIMIT

from .live import LiveBytes

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY = 1000


def new_model(args: argparse.Namespace) -> nn.Module:
    """A Llama of those sizes with random weights."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=args.width, num_hidden_layers=args.layers, intermediate_size=args.intermediate)
    config = LlamaConfig(**sizes, num_attention_heads=args.width // 64, vocab_size=VOCABULARY)
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype)).to(args.device)


def new_batches(args: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Random tokens in batches, as many samples as asked for."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(-(-args.samples // args.batch)):
        tokens = torch.randint(VOCABULARY, (args.batch, args.positions), generator=generator).to(args.device)
        batches.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens})
    return batches


def new_config(args: argparse.Namespace) -> tucka.TuckAConfig:
    """k-means routing and the start asked for."""
    return tucka.TuckAConfig(
        r=args.rank,
        k=args.k,
        t=args.t,
        form=args.form,
        init_router="kmeans",
        affinity="cosine",
        init_experts=args.start,
        target_modules=TARGETS,
    )


def training_step(model: nn.Module, batch: dict, optimiser: torch.optim.Optimizer) -> None:
    """One step of the adapter."""
    model(**batch).loss.backward()
    optimiser.step()
    optimiser.zero_grad()


def seconds(function: Callable[[], Any], device: str) -> float:
    """Wall time of a call, its work on the device included."""
    started = time.perf_counter()
    function()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def measure_time(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and train in turn; medians and their ratio."""
    batches = new_batches(args)
    model = tucka.apply(new_model(args), new_config(args), calibration=batches[:1], calibration_samples=args.batch,
                        progress=False)  # fmt: skip
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    calibrations, steps = [], []
    for _ in range(args.rounds):
        calibrations.append(
            seconds(lambda: tucka.initialize(model, batches, samples=args.samples, progress=False), args.device)
        )
        model.train()
        steps += [seconds(lambda b=b: training_step(model, b, optimiser), args.device) for b in batches[:8]]
    calibration, step = statistics.median(calibrations), statistics.median(steps)
    return {
        "calibration_seconds": calibration,
        "step_seconds": step,
        "steps": calibration / step,
        "spread_of_steps": [min(steps), max(steps)],
    }


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak of live tensors, beyond the model, in training steps and in a calibration."""
    batches = new_batches(args)
    model = tucka.apply(new_model(args), new_config(args))
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with LiveBytes() as training:
        for batch in batches[:2]:
            training_step(model, batch, optimiser)
    with LiveBytes() as calibration:
        tucka.initialize(model, batches, samples=args.samples, progress=False)
    return {
        "training_peak_MiB": training.peak / 2**20,
        "calibration_peak_MiB": calibration.peak / 2**20,
        "arithmetic_MiB": held_bytes(args) / 2**20,
    }


def held_bytes(args: argparse.Namespace) -> int:
    """Bytes of the moments of all layers and of the test matrices that they share, in float32."""
    d, wide, clusters = args.width, args.intermediate, args.k * args.t
    attention, up, down = [(d, d)] * 4, [(d, wide)] * 2, [(wide, d)]
    per_block = sum(moment_numbers(*layer, args, clusters) for layer in attention + up + down)
    tests = sum(width * (3 * columns(args.rank) + 1) for width in {d, wide})
    return 4 * (args.layers * per_block + tests)


def moment_numbers(d: int, o: int, args: argparse.Namespace, clusters: int) -> int:
    """How many numbers the moments of one layer hold: formed, C·D·O; sketched, (D + O)·Q + C·(2Q + 1)²."""
    if args.form == "multiplicative":
        o = d
    if d * o <= FORMED_LIMIT:
        return clusters * d * o
    q = columns(args.rank)
    return (d + o) * q + clusters * (2 * q + 1) ** 2


def columns(rank: int) -> int:
    """Columns Q of a range sketch."""
    return 2 * rank + 16


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("what", choices=("time", "memory", "arithmetic"))
    add = parser.add_argument
    add("--width", type=int, default=384, help="hidden size")
    add("--layers", type=int, default=6, help="blocks")
    add("--intermediate", type=int, help="width inside the MLP; default: 2.75 times the hidden size")
    add("--samples", type=int, default=512, help="calibration samples")
    add("--batch", type=int, default=32, help="samples in a batch")
    add("--positions", type=int, default=64, help="tokens of a sample")
    add("--rank", type=int, default=8, help="r")
    add("--k", type=int, default=4, help="groups")
    add("--t", type=int, default=2, help="experts in a group")
    add("--form", choices=tucka.validation.CHOICES["form"], default="additive", help="form of the update")
    add("--start", choices=("identity", "hosvd", "gradient"), default="gradient", help="init_experts")
    add("--dtype", default="float32", help="precision of the base model")
    add("--device", default="cpu", help="where to run")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--rounds", type=int, default=3, help="repetitions")
    args = parser.parse_args(argv)
    args.intermediate = args.intermediate or int(2.75 * args.width)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, and print one line of JSON."""
    args = read_arguments(argv)
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    measures = {
        "time": measure_time,
        "memory": measure_memory,
        "arithmetic": lambda args: {"arithmetic_MiB": held_bytes(args) / 2**20},
    }
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "tucka")}
    result = {**vars(args), **measures[args.what](args), **versions}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
