"""The paper's published settings (arXiv 2511.06859), as data.

What its scripts do and these examples do not: they evaluate images with the training's random flip, and keep the epoch
that is best on the split that is scored. Published for the baselines are their sizes and scales, not their learning
rates: those are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.training import Recipe


@dataclass(frozen=True)
class Preset:
    """How one dataset was trained.

    Attributes
    ----------
    model : str
        On the hub.
    targets : tuple of str
        Layers to adapt, by the names transformers 5 gives them.
    tucka : dict
        Fields of `TuckAConfig.paper`.
    recipe : Recipe
        Learning rate of TuckA, schedule and length.
    baselines : dict of dict
        Fields of the methods that TuckA was compared with.
    length : int, optional
        Tokens of a text.
    pad : bool
        Whether texts are padded to that length, as the published route counts padding.
    bf16 : bool
        Whether to compute in bfloat16.
    """

    model: str
    targets: tuple[str, ...]
    tucka: Mapping[str, Any]
    recipe: Recipe
    baselines: Mapping[str, Mapping[str, Any]]
    length: int | None = None
    pad: bool = False
    bf16: bool = False


def _baselines(r: int, lora_alpha: float) -> dict[str, dict[str, Any]]:
    """The same rank, or block, for every baseline."""
    return {
        "lora": {"r": r, "lora_alpha": lora_alpha},
        "dora": {"r": r, "lora_alpha": lora_alpha},
        "vera": {"r": r, "vera_dropout": 0.1},
        "hra": {"r": r},
        "oft": {"oft_block_size": r},
        "boft": {"boft_block_size": r},
    }


GLUE = Preset(
    model="microsoft/deberta-v3-base",
    targets=("query_proj", "value_proj", "dense"),
    tucka=dict(r=8, k=2, t=2, p=2, alpha=2.0, perturb_scale=10.0, pool_padding=True),
    recipe=Recipe(6e-3, epochs=5, batch_size=16, schedule="linear", warmup=500, weight_decay=0.01, evaluate_every=500),
    baselines=_baselines(r=8, lora_alpha=2),
    length=512,
    pad=True,
)


def _images(t: int) -> Preset:
    return Preset(
        model="google/vit-base-patch16-224-in21k",
        targets=("q_proj", "v_proj", "o_proj", "fc1", "fc2"),
        tucka=dict(r=2, k=5, t=t, p=2, alpha=1.0, perturb_scale=10.0),
        recipe=Recipe(4e-3, epochs=20, batch_size=32, schedule="linear", warmup=20),
        baselines=_baselines(r=2, lora_alpha=16),
    )


PRESETS: dict[str, Preset] = {
    **dict.fromkeys(("cola", "mrpc", "qnli", "qqp", "rte", "sst2"), GLUE),
    "cifar100": _images(t=2),
    "food101": _images(t=3),
    "caltech256": _images(t=2),
    "metamath": Preset(
        model="meta-llama/Llama-2-7b-hf",
        targets=("q_proj", "v_proj"),
        tucka=dict(r=16, k=4, t=2, p=2, alpha=512.0, perturb_scale=20.0),
        recipe=Recipe(1e-3, epochs=2, batch_size=32, schedule="cosine", warmup=0.03),
        baselines=_baselines(r=32, lora_alpha=64),  # their α on this dataset is ours
        length=512,
        bf16=True,
    ),
}
"""The published settings by dataset."""


def preset_of(dataset: str) -> Preset:
    """The published settings of a dataset.

    Raises
    ------
    ValueError
        If none were published.
    """
    if dataset not in PRESETS:
        raise ValueError(f"--preset paper is for {', '.join(PRESETS)}; {dataset!r} has no published settings")
    return PRESETS[dataset]
