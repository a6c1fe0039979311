"""What can be done to the fields of a configuration, and to its JSON."""

import json
import math
from random import Random

from .directories import CONFIG, WEIGHTS, Directory, Tensor
from .registry import BOMBS, EXPRESSIONS, NUMBERS, PATHS, SIZES, TEXTS, mutation


def _anything(rng: Random, depth: int = 2):
    """Any JSON value."""
    what = rng.randrange(9 if depth else 6)
    if what < 2:
        return rng.choice(NUMBERS)
    if what < 4:
        return rng.choice(TEXTS)
    if what < 6:
        return None if what == 4 else rng.random() < 0.5
    items = [_anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    return items if what < 8 else {rng.choice(TEXTS): item for item in items}


@mutation
def field_types(directory: Directory, rng: Random) -> Directory:
    names = rng.sample(sorted(directory.config), rng.choice((1, 1, 2, 5)))
    return directory.with_fields(**{name: _anything(rng) for name in names})


@mutation
def field_sizes(directory: Directory, rng: Random) -> Directory:
    names = ("r", "k", "t", "p", "alpha", "temperature", "router_depth", "lasso", "format_version", "balance_rate")
    return directory.with_fields(**{name: rng.choice(NUMBERS) for name in rng.sample(names, rng.choice((1, 1, 2)))})


@mutation
def sizes_without_weights(directory: Directory, rng: Random) -> Directory:
    """Huge sizes, and no tensor that could contradict them."""
    fields = {name: rng.choice(SIZES) for name in rng.sample("rktp", rng.choice((1, 2, 4)))}
    changed = directory.with_fields(**fields)
    other = [Tensor("base_model.model.x.weight", "F32", [1], bytes(4))]
    return rng.choice((changed.without(WEIGHTS), changed.with_tensors([]), changed.with_tensors(other)))


@mutation
def unknown_fields(directory: Directory, rng: Random) -> Directory:
    names = (
        "self", "cls", "kwargs", "__class__", "__post_init__", "_name", "x", "", "runtime_config", "auto_mapping",
        "trainable_token_indices", "target_parameters", "trust_remote_code", "tokenizer_kwargs", "megatron_config",
        "init_lora_weights", "adapters", "peft_version", "from_published_code", "weights_beside", "ec_perturb_scale",
        "use_kaiming_init_ec", "use_alb", "alb_gamma", "router_name", "dump_input_and_ec", "log_expert_load",
    )  # fmt: skip
    return directory.with_fields(**{name: _anything(rng) for name in rng.sample(names, rng.randint(1, 3))})


@mutation
def missing_fields(directory: Directory, rng: Random) -> Directory:
    config = directory.config
    for name in rng.sample(sorted(config), rng.randint(1, len(config))):
        del config[name]
    return directory.with_config(config)


@mutation
def patterns(directory: Directory, rng: Random) -> Directory:
    """Regular expressions that are none, or that never end."""
    bomb = rng.choice((rng.choice(BOMBS), rng.choice(EXPRESSIONS)))
    shapes = dict(
        target_modules=rng.choice((bomb, [bomb], [bomb, "query"])),
        exclude_modules=rng.choice((bomb, [bomb])),
        rank_pattern=rng.choice(({bomb: 2}, {bomb: 3, "query": 2}, {f"x{i}": 2 for i in range(3000)})),
        modules_to_save=[bomb],
        layers_pattern=rng.choice((bomb, [bomb])),
    )
    name = rng.choice(sorted(shapes))
    extra = dict(layers_to_transform=[0]) if name == "layers_pattern" else {}
    return directory.with_fields(**{name: shapes[name]}, **extra)


TASKS = ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")


@mutation
def selections(directory: Directory, rng: Random) -> Directory:
    """Modules to adapt, to leave alone and to save, chosen so that they collide."""
    names = (
        "query", "value", "classifier", "", "r", "dense", "word_embeddings", "layer", "0", "er", "pooler", "base_layer",
        "nowhere", "tucka_experts", "default", "query.base_layer", "layer.1", "all-linear", *PATHS,
    )  # fmt: skip
    few, many = rng.sample(names, rng.randint(1, 3)), rng.sample(names, 2) * 50
    some = rng.choice((list(names), few, few, many, rng.choice(names)))
    fields = dict(
        target_modules=some,
        exclude_modules=some,
        modules_to_save=some if isinstance(some, list) else [some],
        router_module=rng.choice(names),
        layers_to_transform=rng.choice((0, [0, 1], [], -1, list(range(10**5)), [2**63], ["0"], [None], 1.0, {"0": 1})),
        layers_pattern=some,
        bias=rng.choice(("all", "tucka_only")),
        router_depth=rng.choice((1, 2, 10**9)),
        task_type=rng.choice(TASKS),
    )
    return directory.with_fields(**{name: fields[name] for name in rng.sample(sorted(fields), rng.randint(1, 2))})


@mutation
def options(directory: Directory, rng: Random) -> Directory:
    """Values that are allowed, but not those the weights were made with."""
    choices = dict(
        form=("additive", "multiplicative"), routing=("batch", "sample"), affinity=("paper", "cosine", "distance"),
        pooling=("mean", "mean_std"), normalize=(True, False, "bounded"), share_factors=(True, False),
        tie_factors=(True, False), shared_expert=(True, False), trainable=("all", "core"), balance_bias=(True, False),
        init_router=("kaiming", "kmeans_balanced"), lasso=(0.0, 0.1), expert_shares=(True, False), warm_start=(1.0,),
        inference_mode=(True, False), init_weights=(True, False), init_experts=("kaiming", "gradient"),
        sync_route=(True,),
    )  # fmt: skip
    names = rng.sample(sorted(choices), rng.randint(1, 4))
    return directory.with_fields(**{name: rng.choice(choices[name]) for name in names})


@mutation
def names(directory: Directory, rng: Random) -> Directory:
    """Paths where a configuration has names."""
    path = rng.choice((*PATHS, *TEXTS))
    mapping = {"base_model_class": path, "parent_library": rng.choice(("os", "antigravity", "subprocess", path))}
    texts = ("base_model_name_or_path", "revision", "router_module", "peft_version", "task_type")
    places = dict(auto_mapping=mapping, factor_owners={path: path}, rank_pattern={path: 2}, target_modules=[path])
    fields = {**dict.fromkeys(texts, path), **places}
    return directory.with_fields(**{name: fields[name] for name in rng.sample(sorted(fields), rng.randint(1, 3))})


@mutation
def owners(directory: Directory, rng: Random) -> Directory:
    """Who shares whose factors: circles, itself, layers that are not there."""
    layers = sorted({t.key.removeprefix("base_model.model.").partition(".tucka_")[0] for t in directory.tensors})
    drawn = {rng.choice(layers): rng.choice((*layers, *PATHS, None, 3, ["x"])) for _ in range(4)}
    circle = dict(zip(layers, [*layers[1:], layers[0]]))
    fields = rng.choice((drawn, circle, {layer: layer for layer in layers}, {f"x{i}": "y" for i in range(10**4)}))
    without = [t for t in directory.tensors if not t.key.endswith(("input_factor", "output_factor", "tucka_u"))]
    changed = directory.with_fields(factor_owners=fields, share_factors=rng.random() < 0.5)
    return changed.with_tensors(without) if rng.random() < 0.5 else changed


@mutation
def methods(directory: Directory, rng: Random) -> Directory:
    """Another PEFT method's name, or none."""
    others = ("LORA", "XLORA", "PROMPT_TUNING", "VBLORA", "tucka", "TuckA", "TUCKA\x00", "")
    return directory.with_fields(peft_type=rng.choice((*others, None, 3, ["TUCKA"], {"TUCKA": 1})))


@mutation
def versions(directory: Directory, rng: Random) -> Directory:
    odd = (0, 2, 99, 10**400, -1, 1.0, "1", None, True, [1], math.nan)
    return directory.with_fields(format_version=rng.choice(odd))


@mutation
def deep(directory: Directory, rng: Random) -> Directory:
    """JSON nested so deep that a recursive reader gives up."""
    depth = rng.choice((10, 500, 1000, 5000, 100_000))
    closed = ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth)
    deep_text = rng.choice((*closed, "[" * depth, '{"a":' * depth))
    fields = ("target_modules", "auto_mapping", "rank_pattern", "r", "x", "peft_type", "factor_owners")
    text = json.dumps({**directory.config, rng.choice(fields): "DEEP"}).replace('"DEEP"', deep_text)
    return directory.with_file(CONFIG, rng.choice((text, text, deep_text)).encode())


@mutation
def encodings(directory: Directory, rng: Random) -> Directory:
    text = directory.files[CONFIG].decode()
    odd = (
        text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-32"), b"\xff\xfe\x00", b"", b" \n",
        b"null", b"[]", b'"TUCKA"', b"3", b"NaN", b"{}", b'["peft_type"]', b'{"peft_type": "TUCKA"}', b"\x00" * 64,
        text.replace('"', "'").encode(), text.replace("}", ',"r": 3, "r": 999999}').encode(), text.encode() + b"\x00",
        b"[" + text.encode() + b"]",
        b'{"peft_type": "TUCKA", "k": ' + b"9" * 5000 + b"}", text.replace("query", "\\ud800").encode(),
        (text + " " * 10**6).encode(), b'"peft_type runtime_config"',
    )  # fmt: skip
    return directory.with_file(CONFIG, rng.choice(odd))


@mutation
def large(directory: Directory, rng: Random) -> Directory:
    """A configuration with very much in it."""
    count = rng.choice((1000, 4000, 10**4, 10**5))
    fields = dict(
        target_modules=[f"layer.{i}" for i in range(count)],
        rank_pattern={f"layer.{i}": 2 for i in range(count)},
        factor_owners={f"layer.{i}": "layer.0" for i in range(count)},
        exclude_modules=[f"layer.{i}" for i in range(count)],
        auto_mapping={f"{i}": i for i in range(count)},
        modules_to_save=[f"layer.{i}" for i in range(count)],
        router_module="x" * count,
        x=list(range(count)),
    )
    return directory.with_fields(**{name: fields[name] for name in [rng.choice(sorted(fields))]})
