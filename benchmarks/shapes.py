"""Models of well-known sizes with random weights, and the batches they are measured on."""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    ViTConfig,
)

from tucka.targets import DEFAULT_TARGETS

NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
ENDLESS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
"""Generation stops at the number of tokens asked for and nowhere else."""
PATCH = 16


class Shape(NamedTuple):
    """A kind of model, its sizes, and the batch it is measured on unless another is asked for."""

    config: type[PretrainedConfig]
    head: Any
    sizes: dict[str, Any]
    batch: int
    positions: int


def _llama(width: int, layers: int, heads: int, groups: int, inside: int, vocabulary: int, tied: bool) -> dict:
    attention = dict(num_attention_heads=heads, num_key_value_heads=groups)
    sizes = dict(hidden_size=width, num_hidden_layers=layers, intermediate_size=inside, vocab_size=vocabulary)
    return {**sizes, **attention, **ENDLESS, "tie_word_embeddings": tied, "max_position_embeddings": 4096}


# Else the first forward would write it, and a compiled model would be compiled again.
_CLASSES = dict(**NO_DROPOUT, problem_type="single_label_classification")
_TEXT = (BertConfig, AutoModelForSequenceClassification)
_CAUSAL = (LlamaConfig, AutoModelForCausalLM)

SHAPES: dict[str, Shape] = {
    "bert": Shape(*_TEXT, _CLASSES, batch=8, positions=128),
    "vit": Shape(ViTConfig, AutoModelForImageClassification, _CLASSES, batch=8, positions=197),
    "llama": Shape(*_CAUSAL, _llama(768, 12, 12, 12, 2048, 32000, True), batch=8, positions=128),
    "minilm": Shape(
        *_TEXT,
        dict(**_CLASSES, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        batch=8,
        positions=128,
    ),
    "llama-1b": Shape(*_CAUSAL, _llama(2048, 16, 32, 8, 8192, 128256, True), batch=8, positions=1024),
    "llama-7b": Shape(*_CAUSAL, _llama(4096, 32, 32, 32, 11008, 32000, False), batch=4, positions=1024),
}
"""Sizes of BERT-base, ViT-base/16, a Llama of the same width, all-MiniLM-L6, Llama 3.2 1B and Llama 2 7B."""


@dataclass(frozen=True)
class Setting:
    """What all arms of a measurement share."""

    model: str
    layers: int
    batch: int
    positions: int
    rank: int
    targets: Optional[str] = None  # None: the architecture's default
    dtype: str = "float32"
    device: str = "cpu"
    compiled: bool = False
    threads: int = 1

    @property
    def details(self) -> dict[str, Any]:
        """All but model, precision and device, which name a measurement beside it."""
        return {name: value for name, value in asdict(self).items() if name not in ("model", "dtype", "device")}

    @property
    def target_modules(self) -> list[str] | str:
        """The modules that every arm adapts."""
        if self.targets is None:
            return DEFAULT_TARGETS[SHAPES[self.model].config.model_type]
        return self.targets if self.targets == "all-linear" else self.targets.split(",")


def setting_of(args: argparse.Namespace) -> Setting:
    """The setting of a command line; what it leaves open is the shape's own."""
    shape = SHAPES[args.model]
    return Setting(
        model=args.model,
        layers=args.layers or shape.config(**shape.sizes).num_hidden_layers,
        batch=args.batch or shape.batch,
        positions=args.positions or shape.positions,
        rank=args.rank,
        targets=args.targets,
        dtype=args.dtype,
        device=args.device,
        compiled=args.compile,
        threads=args.threads,
    )


def new_model(setting: Setting) -> nn.Module:
    """A model of that shape with random weights, nothing of it to be trained."""
    shape = SHAPES[setting.model]
    sizes = {**shape.sizes, "num_hidden_layers": setting.layers}
    if shape.config is ViTConfig:
        sizes |= {"image_size": image_size(setting.positions), "patch_size": PATCH}
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = shape.head.from_config(shape.config(**sizes), dtype=getattr(torch, setting.dtype))
    return model.requires_grad_(False)


def image_size(positions: int) -> int:
    """Height and width of the image that gives a vision transformer so many positions.

    Raises
    ------
    ValueError
        If they are no square and one more.
    """
    side = round((positions - 1) ** 0.5)
    if side < 1 or side**2 + 1 != positions:
        raise ValueError(f"a square image has n² patches and one class token; positions={positions} is no n² + 1")
    return PATCH * side


def new_batch(setting: Setting) -> dict[str, Tensor]:
    """Random inputs without padding, and their labels; half of a causal model's tokens are a prompt."""
    generator = torch.Generator().manual_seed(0)
    shape, size = SHAPES[setting.model], (setting.batch, setting.positions)
    if shape.config is ViTConfig:
        side = image_size(setting.positions)
        pixels = torch.randn(setting.batch, 3, side, side, generator=generator).to(getattr(torch, setting.dtype))
        batch = {"pixel_values": pixels, "labels": torch.arange(setting.batch) % 2}
    else:
        tokens = torch.randint(1000, size, generator=generator)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": torch.arange(size[0]) % 2}
        if shape.config is LlamaConfig:
            batch["labels"] = torch.where(torch.arange(size[1]) < size[1] // 2, -100, tokens)
    return {name: value.to(setting.device) for name, value in batch.items()}


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy to adapt, whose parameters and buffers are the model's own: arms find them where the others left them."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
