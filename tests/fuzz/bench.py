"""Ways to load an adapter directory, each of which checks what became of the model."""

import contextlib
import copy
import functools
import re
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

import tucka
from analysis.adapters import read_adapter

from .base import base_model, batch
from .directories import CONFIG, WEIGHTS, Directory

ADAPTERS = dict(
    usual=dict(r=3, k=2, target_modules=["query", "value"], task_type="SEQ_CLS"),
    plain=dict(
        r=3, k=3, t=2, p=2, form="multiplicative", normalize=False, share_factors=False, balance_bias=True, lasso=0.1,
        affinity="paper", init_router="perturb", init_experts="kaiming", rank_pattern={"layer.1.*query": 2},
        target_modules=r".*\.(query|value)", bias="all",
    ),
    deep=dict(
        r=2, k=2, t=2, router_depth=1, target_modules=["query", "dense"], exclude_modules=["pooler.dense"],
        modules_to_save=["pooler"],
    ),
)  # fmt: skip
"""Configurations of the adapters that are mutated."""

PUBLISHED = dict(core="tucka_g", expert_factor="tucka_c", input_factor="tucka_u", centroids="tucka_ec")


@functools.cache
def sources() -> tuple[Directory, ...]:
    """Good adapters: of several configurations, and one as the paper's published code saves them."""
    with tempfile.TemporaryDirectory() as path, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [_saved(tucka.TuckAConfig(**fields), Path(path) / name) for name, fields in ADAPTERS.items()]
        paper = _saved(tucka.TuckAConfig.paper(r=3, target_modules=["query", "value"]), Path(path) / "paper")
    own = ("peft_type", "r", "k", "t", "p", "alpha", "target_modules", "task_type", "bias", "inference_mode")
    config = {name: paper.config[name] for name in own} | dict(ec_perturb_scale=1, use_alb=False, router_name="")
    parts = [(tensor, *tensor.key.partition(".tucka_")[::2]) for tensor in paper.tensors]
    renamed = [
        tensor._replace(key=f"{layer}.{PUBLISHED[end]}")
        for tensor, layer, part in parts
        for end in [part.rpartition(".")[2]]
        if end in PUBLISHED
    ]
    return (*made, paper.with_config(config).with_tensors(renamed))


def _saved(config: tucka.TuckAConfig, path: Path) -> Directory:
    model = tucka.apply(base_model(), config)
    model.train()(**batch())  # starts the router
    model.save_pretrained(path)
    return Directory({name: (path / name).read_bytes() for name in (CONFIG, WEIGHTS)})


class Changed(Exception):
    """An error left the model other than it was: what differs, and the error."""

    def __init__(self, what: str, cause: BaseException) -> None:
        super().__init__(what)
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.args[0]} after {type(self.cause).__name__}: {self.cause}"


class Replaced(Exception):
    """Loading replaced a weight of the base model."""


class Wrapped(Changed):
    """An error left the base model with the layers of an adapter, its weights as they were."""


class Bench:
    """A base model, and a model that has an adapter; both are put back to what they were after each load."""

    def __init__(self) -> None:
        config = tucka.TuckAConfig(r=2, k=2, target_modules=["query"], init_experts="identity", init_router="kaiming")
        self.pristine = dict(base=base_model(), wrapped=tucka.apply(base_model(), config))
        self.before = {name: state_of(model) for name, model in self.pristine.items()}
        self.held = copy.deepcopy(self.pristine)

    def load(self, path: Path) -> None:
        """`PeftModel.from_pretrained`, as users call it."""
        self._load("base", path, lambda base: PeftModel.from_pretrained(base, path))

    def checked(self, path: Path) -> None:
        """The same after tucka has read the configuration, so that nothing else decides what is loaded."""
        config = tucka.TuckAConfig.from_pretrained(path)
        self._load("base", path, lambda base: PeftModel.from_pretrained(base, path, config=config))

    def trainable(self, path: Path) -> None:
        """The same for training on; PEFT has wrapped the layers before an adapter is found not to fit."""
        config = tucka.TuckAConfig.from_pretrained(path)
        try:
            self._load(
                "base", path, lambda base: PeftModel.from_pretrained(base, path, config=config, is_trainable=True)
            )
        except Changed as error:
            if error.args[0].startswith("parameter"):
                raise
            raise Wrapped(error.args[0], error.cause) from None

    def second(self, path: Path) -> None:
        """`PeftModel.load_adapter`, beside an adapter that is there."""

        def load(model):
            model.load_adapter(path, "other")
            return model

        self._load("wrapped", path, load)

    def by_transformers(self, path: Path) -> None:
        """transformers' own `load_adapter`, which asks tucka nothing, after tucka's check."""
        tucka.TuckAConfig.from_pretrained(path)
        base, self.held["base"] = self.held["base"], copy.deepcopy(self.pristine["base"])
        base.load_adapter(str(path))

    @staticmethod
    def read(path: Path) -> None:
        """What the analysis reads."""
        read_adapter(path)

    def _load(self, which: str, path: Path, load) -> None:
        model = self.held[which]
        try:
            loaded = load(model)
        except BaseException as error:
            changed = difference(state_of(model), self.before[which])
            if changed:
                self.held[which] = copy.deepcopy(self.pristine[which])
                raise Changed(changed, error) from None
            raise
        self.held[which] = copy.deepcopy(self.pristine[which])
        require_base_weights(loaded, self.pristine["base"], path)
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # an adapter that runs, or says why not
            loaded(**batch())


def state_of(model: nn.Module) -> dict:
    """Modules, hooks, parameters and whether they train; and the adapters there are."""
    found: dict = {
        name: (
            type(module),
            len(module._forward_pre_hooks) + len(module._forward_hooks),
            [(key, p.requires_grad, p.detach().clone()) for key, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }
    return found | {f"adapter {name}": (str, 0, []) for name in getattr(model, "peft_config", {})}


def difference(found: dict, expected: dict) -> str:
    """The first module that differs, or nothing; a parameter of the base model first of all."""
    plain = {
        f"{name}.{key}".replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, (_, _, parameters) in found.items()
        for key, _, value in parameters
        if ".tucka_" not in f"{name}.{key}" and ".modules_to_save." not in f"{name}.{key}"
    }
    for name, (_, _, parameters) in expected.items():
        for key, _, value in parameters:
            here = f"{name}.{key}".replace(".base_layer.", ".")
            if ".tucka_" not in here and not torch.equal(plain[here], value):
                return f"parameter {here}"
    if found.keys() != expected.keys():
        return f"modules {sorted(found.keys() ^ expected.keys())[:3]}"
    for name, (kind, hooks, parameters) in expected.items():
        if (kind, hooks) != found[name][:2]:
            return f"module {name} ({found[name][:2]})"
        for (key, trains, value), (_, still, now) in zip(parameters, found[name][2]):
            if trains != still or not torch.equal(value, now):
                return f"tensor {name}.{key}"
    return ""


def require_base_weights(model: nn.Module, base: nn.Module, path: Path) -> None:
    """Weights of the base model are what they were, but for biases that the adapter trains, and embeddings."""
    trains_biases = tucka.TuckAConfig.from_pretrained(path).bias != "none"
    found = {
        re.sub(r"(base_layer|original_module)\.", "", key.removeprefix("base_model.model.")): value
        for key, value in model.state_dict().items()
        if ".tucka_" not in key and ".modules_to_save." not in key
    }
    for key, value in base.state_dict().items():
        trained = (trains_biases and key.endswith(".bias")) or key.startswith("word_embeddings.")
        if not trained and not torch.equal(found[key], value):
            raise Replaced(key)
