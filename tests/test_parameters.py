"""The closed forms of `analysis.parameters` against what PEFT reports on small, randomly initialised models."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from conftest import plain_config
from peft import HRAConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM

from analysis.parameters import METHODS, LayerShape, count, layer_shapes, oft, tucka, tucka_router

# PEFT warns where it adjusts an OFT size, where a layer stores its weight transposed, and where HRA's r is odd.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Invalid `:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed:UserWarning"),
]


def tiny_bert() -> nn.Module:
    """Square, widening and narrowing layers."""
    config = BertConfig(
        hidden_size=24,
        intermediate_size=60,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=8,
    )
    return BertModel(config)


def tiny_gpt2() -> nn.Module:
    """Conv1D layers, which store their weight as in_features × out_features."""
    return GPT2Model(GPT2Config(n_embd=20, n_layer=2, n_head=2, vocab_size=30, n_positions=8))


def tiny_llama() -> nn.Module:
    """Grouped-query attention (key and value narrower than the query), gated MLP and an output head."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=30,
        max_position_embeddings=8,
    )
    return LlamaForCausalLM(config)


BUILDERS = {"bert": tiny_bert, "gpt2": tiny_gpt2, "llama": tiny_llama}

TARGETS = [
    ("bert", ["query", "value", "dense"]),
    ("bert", r".*layer\.1\..*\.(key|dense)"),
    ("gpt2", {"c_attn", "c_proj"}),
    ("llama", ["q_proj", "k_proj", "down_proj"]),
    ("llama", "all-linear"),
]

# PEFT adapts Conv1D with the first three only.
CONFIGS: dict[str, Callable[..., PeftConfig]] = {
    "lora": LoraConfig,
    "dora": lambda **fields: LoraConfig(use_dora=True, **fields),
    "vera": VeraConfig,
    "hra": HRAConfig,
    "oft": lambda **fields: OFTConfig(oft_block_size=0, **fields),
}
CONV1D_METHODS = ("lora", "dora", "vera")

CASES = [
    pytest.param(method, model, targets, id=f"{method}-{model}-{index}")
    for method in CONFIGS
    for index, (model, targets) in enumerate(TARGETS)
    if model != "gpt2" or method in CONV1D_METHODS
]


def trainable_per_layer(adapted: PeftModel) -> dict[str, int]:
    """What each adapted layer trains, but for a router it may hold; what layers share is counted at the first."""
    counted: set[nn.Parameter] = set()
    layers = {}
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            own = {p for key, p in module.named_parameters() if p.requires_grad and not key.startswith("tucka_router.")}
            layers[name] = sum(parameter.numel() for parameter in own - counted)
            counted |= own
    return layers


def trainable_in_total(adapted: PeftModel) -> int:
    """The number PEFT prints as trainable."""
    return adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("r", [1, 4, 7])
@pytest.mark.parametrize(("method", "model", "targets"), CASES)
def test_count_equals_peft(method: str, model: str, targets: Any, r: int) -> None:
    base = BUILDERS[model]()
    counted = count(layer_shapes(base, targets), method, r=r)
    adapted = get_peft_model(base, CONFIGS[method](r=r, target_modules=targets))
    assert counted.layers == trainable_per_layer(adapted)
    assert counted.total == trainable_in_total(adapted)
    assert (counted.method, counted.once) == (method, 0)


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_rank_above_the_features_is_counted_where_peft_trains_it(method: str) -> None:
    base = tiny_llama()
    counted = count(layer_shapes(base, ["k_proj"]), method, r=40)
    adapted = get_peft_model(base, CONFIGS[method](r=40, target_modules=["k_proj"]))
    assert counted.layers == trainable_per_layer(adapted)


@pytest.mark.parametrize("block_size", [1, 4, 5, 9, 16, 24])
def test_oft_block_size_equals_peft(block_size: int) -> None:
    base = tiny_bert()
    counted = count(layer_shapes(base, ["query", "dense"]), "oft", block_size=block_size)
    adapted = get_peft_model(base, OFTConfig(r=0, oft_block_size=block_size, target_modules=["query", "dense"]))
    assert counted.layers == trainable_per_layer(adapted)
    assert counted.total == trainable_in_total(adapted)


@pytest.mark.parametrize(("block_size", "used"), [(5, 4), (7, 6), (10, 8), (18, 12), (19, 24)])
def test_oft_takes_the_nearest_divisor(block_size: int, used: int) -> None:
    shape = LayerShape("query", 24, 24)
    assert oft(shape, block_size=block_size) == 24 * (used - 1) // 2 == oft(shape, r=24 // used)


# Selection of layers


@pytest.mark.parametrize(("model", "targets"), TARGETS)
def test_shapes_are_those_peft_adapts(model: str, targets: Any) -> None:
    base = BUILDERS[model]()
    shapes = layer_shapes(base, targets)
    adapted = get_peft_model(base, LoraConfig(target_modules=targets))
    layers = [(n, m) for n, m in adapted.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)]
    assert shapes == [(name, layer.in_features, layer.out_features) for name, layer in layers]


def test_shapes_of_conv1d_are_in_then_out() -> None:
    assert layer_shapes(tiny_gpt2(), ["c_attn"])[0] == LayerShape("h.0.attn.c_attn", 20, 60)


def test_all_linear_leaves_the_output_head_out() -> None:
    names = [shape.name for shape in layer_shapes(tiny_llama(), "all-linear")]
    assert len(names) == 14
    assert "lm_head" not in names


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
        {"target_modules": ["dense"], "modules_to_save": ["pooler"]},
        {"target_modules": ["query"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.attention\..*"},
    ],
)
def test_shapes_take_the_selection_of_a_config(selection: dict[str, Any]) -> None:
    base = tiny_bert()
    config = HRAConfig(**selection)
    before = config.to_dict()
    names = [shape.name for shape in layer_shapes(base, config)]
    assert config.to_dict() == before
    assert names == list(trainable_per_layer(get_peft_model(base, config)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["no_such_layer"], "target_modules={'no_such_layer'} match no module of BertModel"),
        (["LayerNorm"], "only Linear and Conv1D are counted, but 'embeddings.LayerNorm' is a LayerNorm"),
        (LoraConfig(), "target_modules must name the layers to count, got None from LoraConfig"),
    ],
)
def test_shapes_reject_a_selection_that_cannot_be_counted(targets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        layer_shapes(tiny_bert(), targets)


def test_shapes_reject_an_adapted_model() -> None:
    adapted = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"before adaptation, but 2 are adapted, first '.*self\.query'"):
        layer_shapes(adapted, ["query"])


# Rejected arguments


SHAPES = [LayerShape("query", 24, 60), LayerShape("value", 12, 60)]


@pytest.mark.parametrize(
    ("method", "hyper", "message"),
    [
        ("lokr", {"r": 4}, "method is one of lora, dora, vera, hra, oft, tucka, got 'lokr'"),
        ("lora", {"r": 4, "block_size": 2}, "method 'lora' takes r, got r=4, block_size=2"),
        ("vera", {"rank": 4}, "method 'vera' takes r, got rank=4"),
        ("dora", {}, "method 'dora' takes r, got nothing"),
        ("oft", {}, "oft takes exactly one of r and block_size, got r=None and block_size=None"),
        ("oft", {"r": 2, "block_size": 4}, "oft takes exactly one of r and block_size, got r=2 and block_size=4"),
        ("oft", {"r": 13}, "number of blocks r=13 exceeds in_features=12 of 'value'"),
        ("oft", {"block_size": 16}, "block_size=16 exceeds in_features=12 of 'value'"),
        ("oft", {"block_size": 0}, "block_size=0 of 'query' is below 1"),
        ("hra", {"r": 20}, "rank r=20 exceeds in_features=12 of 'value'"),
        ("lora", {"r": 0}, "rank r=0 of 'query' is below 1"),
        ("vera", {"r": -1}, "rank r=-1 of 'query' is below 1"),
    ],
)
def test_count_rejects(method: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        count(SHAPES, method, **hyper)


@pytest.mark.parametrize(("shapes", "numbers"), [([], "got 0 with 0 names"), (SHAPES[:1] * 2, "got 2 with 1 names")])
def test_count_rejects_layers_it_cannot_tell_apart(shapes: list[LayerShape], numbers: str) -> None:
    with pytest.raises(ValueError, match=f"^layers are at least one and have distinct names, {numbers}$"):
        count(shapes, "lora", r=2)


# TuckA


def tucka_config(**fields: Any) -> PeftConfig:
    """A plain config with every size different, so that no two can be confused."""
    plain = {"r": 4, "k": 2, "t": 3, "p": 5, "pooling": "mean", "shared_expert": False}
    return plain_config(**{**plain, "target_modules": ["query", "dense"], **fields})


TUCKA_FIELDS: list[dict[str, Any]] = [
    {"router_depth": 1},
    {"router_depth": 1, "shared_expert": True, "form": "additive", "share_factors": True},
    {},
    {"routing": "batch"},
    {"pooling": "mean_std"},
    {"router_module": "1.output.dense"},
    {"tie_factors": False},
    {"form": "additive"},
    {"shared_expert": True},
    {"share_factors": True},
    {"share_factors": True, "tie_factors": False},
    {"share_factors": True, "form": "additive"},
    {"lasso": 0.1},
    {"lasso": 0.1, "tie_factors": False},
    {"lasso": 0.1, "router_depth": 1, "form": "additive", "share_factors": True},
    {"trainable": "core"},
    {"trainable": "core", "shared_expert": True, "form": "additive"},
    {"trainable": "core", "share_factors": True},
    {"k": 1, "t": 1, "p": 1},
    {"rank_pattern": {"query": 7, r"layer\.1\.output\.dense": 2}},
    {"rank_pattern": {r"layer\.1\..*dense": 3}, "share_factors": True},
]


@pytest.mark.parametrize("fields", TUCKA_FIELDS, ids=str)
def test_tucka_equals_the_adapted_bert(fields: dict[str, Any]) -> None:
    config = tucka_config(**fields)
    base = tiny_bert()
    counted = count(layer_shapes(base, config), "tucka", config=config)
    adapted = get_peft_model(base, config)
    assert counted.layers == trainable_per_layer(adapted)
    assert counted.total == trainable_in_total(adapted)


@pytest.mark.parametrize("form", ["multiplicative", "additive"])
@pytest.mark.parametrize("share_factors", [False, True])
@pytest.mark.parametrize(("model", "targets"), TARGETS)
def test_tucka_equals_every_model(model: str, targets: Any, share_factors: bool, form: str) -> None:
    config = tucka_config(target_modules=targets, share_factors=share_factors, form=form)
    base = BUILDERS[model]()
    counted = count(layer_shapes(base, config), "tucka", config=config)
    adapted = get_peft_model(base, config)
    assert counted.layers == trainable_per_layer(adapted)
    assert counted.total == trainable_in_total(adapted)


@pytest.mark.parametrize(
    ("fields", "layer", "router"),
    [
        ({}, 24 * 4 + 2 * 5 * 4 * 4 + 3 * 5, 2 * 3 * 24),
        ({"tie_factors": False}, 2 * 24 * 4 + 2 * 5 * 4 * 4 + 3 * 5, 2 * 3 * 24),
        ({"form": "additive"}, (24 + 60) * 4 + 2 * 5 * 4 * 4 + 3 * 5, 2 * 3 * 24),
        ({"shared_expert": True}, 24 * 4 + (2 * 5 + 1) * 4 * 4 + 3 * 5, 2 * 3 * 24),
        ({"trainable": "core"}, 2 * 5 * 4 * 4 + 3 * 5, 2 * 3 * 24),
        ({"pooling": "mean_std"}, 24 * 4 + 2 * 5 * 4 * 4 + 3 * 5, 2 * 3 * 48),
        ({"rank_pattern": {"query": 2}}, 24 * 2 + 2 * 5 * 2 * 2 + 3 * 5, 2 * 3 * 24),
    ],
    ids=str,
)
def test_tucka_terms(fields: dict[str, Any], layer: int, router: int) -> None:
    config = tucka_config(**fields)
    assert tucka(SHAPES[0], config) == layer
    assert tucka_router(SHAPES[0], config) == router


def test_tucka_shared_factors_need_one_kind_width_and_rank() -> None:
    shapes = [
        LayerShape("0.query", 24, 24),
        LayerShape("0.value", 24, 24),
        LayerShape("1.query", 24, 24),
        LayerShape("2.query", 24, 48),
        LayerShape("3.query", 24, 24),
    ]
    config = tucka_config(share_factors=True, rank_pattern={"3.query": 3})
    counted = count(shapes, "tucka", config=config)
    core = 2 * 5 * 4 * 4 + 3 * 5
    assert counted.layers == {
        "0.query": 24 * 4 + core,
        "0.value": 24 * 4 + core,
        "1.query": core,
        "2.query": 24 * 4 + core,
        "3.query": 24 * 3 + 2 * 5 * 3 * 3 + 3 * 5,
    }
    assert counted.total == sum(counted.layers.values()) + 2 * 3 * 24


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        (LayerShape("query", 3, 60), {}, "rank r=4 exceeds in_features=3 of 'query'"),
        (LayerShape("query", 24, 3), {"form": "additive"}, "rank r=4 exceeds out_features=3 of 'query'"),
        (LayerShape("query", 24, 24), {"rank_pattern": {"query": 25}}, "rank r=25 exceeds in_features=24 of 'query'"),
    ],
)
def test_tucka_rejects_a_rank_above_the_layer(shape: LayerShape, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        count([shape], "tucka", config=tucka_config(**fields))


def test_tucka_router_has_the_width_of_the_layer_it_is_given() -> None:
    shapes = [LayerShape("0.query", 24, 24), LayerShape("0.output.dense", 60, 24)]
    assert count(shapes, "tucka", config=tucka_config()).once == 2 * 3 * 24
    assert count(shapes, "tucka", config=tucka_config(router_module="output.dense")).once == 2 * 3 * 60
    with pytest.raises(ValueError, match=r"^router_module='head' must match one adapted layer, but matches 0 of 2$"):
        count(shapes, "tucka", config=tucka_config(router_module="head"))


def test_tucka_takes_a_config_only() -> None:
    with pytest.raises(ValueError, match=r"^method 'tucka' takes config, got r=4$"):
        count(SHAPES, "tucka", r=4)


def test_every_method_but_tucka_is_held_against_peft() -> None:
    assert METHODS.keys() == CONFIGS.keys() | {"tucka"}
