"""Hostile adapter directories: a loaded adapter or a clear error, and nothing else happens."""

import os
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import adapted, build, plain_config, stored
from fuzz import hostile
from fuzz.base import base_model
from fuzz.bench import ADAPTERS, Bench, difference, sources, state_of
from fuzz.directories import CONFIG, PICKLE, WEIGHTS, Tensor
from fuzz.on_files import MARKER, PAYLOAD
from fuzz.registry import MUTATIONS
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft.utils.other import get_pattern_key

import tucka
from analysis.adapters import read_adapter
from tucka import fields, patterns, weights
from tucka.fitting import expected_shapes
from tucka.plan import plan_adapter

forks = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux tells it")


@pytest.fixture(scope="module")
def good():
    """A good adapter, as data."""
    warnings.simplefilter("ignore")
    return sources()[0]


@pytest.fixture(scope="module")
def bench():
    return Bench()


# --- many -----------------------------------------------------------------------------------------------------------


@forks
def test_mutated_directories_are_loaded_or_refused():
    results = hostile.run(600, seed=1, progress=False)
    assert not hostile.failures(results), hostile.failures(results)[0]
    counts = Counter(result.outcome for result in results)
    assert counts["loaded"] > 100 and counts["refused"] > 500, counts
    assert {result.kind for result in results} >= MUTATIONS.keys()


@forks
def test_what_must_not_happen_is_noticed(monkeypatch):
    """The run above can fail: loading that crashes, hangs, writes, … is reported as such."""

    def misbehave(bench, path):
        acts = [
            lambda: Path("left-behind").write_text(""),
            lambda: (path / "other").mkdir(),
            lambda: {}["no such key"],
            lambda: os._exit(3),
            lambda: bytearray(130 << 20),
            lambda: subprocess.run([sys.executable, "-c", ""]),
            lambda: time.sleep(60),
            lambda: Path(MARKER).write_text(""),
            lambda: torch.load(path / WEIGHTS),
        ]
        acts[int(path.name.rpartition("-")[2])]()

    monkeypatch.setattr(Bench, "checked", misbehave)
    monkeypatch.setattr(hostile, "SECONDS", 1.5)
    monkeypatch.setattr(hostile, "STALLS", 1)
    outcomes = {}
    for result in hostile.run(9, progress=False):
        if result.outcome in hostile.FAILURES:
            outcomes.setdefault(result.index, result.outcome)
    expected = ["written", "written", "unclear error", "crash", "memory", "written", "hang", "executed", "written"]
    assert outcomes == dict(enumerate(expected))


@pytest.mark.parametrize("change", ["weight", "hook", "layer"])
def test_a_changed_base_is_noticed(change):
    model, before = base_model(), state_of(base_model())
    assert not difference(state_of(model), before)
    if change == "weight":
        model.layer[0].query.weight.data[0, 0] += 1e-3
    elif change == "hook":
        model.register_forward_hook(lambda *_: None)
    else:
        get_peft_model(model, tucka.TuckAConfig(r=2, target_modules=["query"]))
    assert difference(state_of(model), before)


# --- one at a time --------------------------------------------------------------------------------------------------


def changed_tensor(directory, end, **changes):
    """The directory with the first tensor whose key ends so replaced."""
    tensors = directory.tensors
    place = next(i for i, tensor in enumerate(tensors) if tensor.key.endswith(end))
    tensors[place] = tensors[place]._replace(**changes)
    return directory.with_tensors(tensors)


def nan_in(directory, end):
    tensor = next(tensor for tensor in directory.tensors if tensor.key.endswith(end))
    return changed_tensor(directory, end, data=b"\x00\x00\xc0\x7f" + tensor.data[4:])


def with_tensor(directory, name, shape):
    extra = Tensor(f"base_model.model.{name}", "F32", shape, bytes(4 * torch.Size(shape).numel()))
    return directory.with_tensors([*directory.tensors, extra])


def text_of(directory, change):
    return directory.with_file(CONFIG, change(directory.files[CONFIG].decode()).encode())


BOMB = r"(?:\w|.|[^x]|[^y]|\S)*!"
DEEP = "[" * 100_000 + "]" * 100_000
REFUSED = {
    "a pickle in place of the weights": (
        lambda d: d.without(WEIGHTS).with_file(PICKLE, PAYLOAD), r"adapter_model\.bin is a pickle; adapters are read",
    ),
    "a pickle by the name of the weights": (lambda d: d.with_file(WEIGHTS, PAYLOAD), "is not a whole safetensors file"),
    "a pipe": (lambda d: d.with_special(WEIGHTS, "fifo"), "it is no regular file"),
    "a link to nowhere": (lambda d: d.with_special(WEIGHTS, "link", "nowhere"), "is not a whole safetensors file"),
    "no weights": (lambda d: d.without(WEIGHTS), "no adapter_model.safetensors beside the configuration"),
    "huge sizes, no weights": (lambda d: d.without(WEIGHTS).with_fields(k=10**9), "needs [0-9]+ numbers, but the 4"),
    "huge sizes, other weights": (
        lambda d: d.with_fields(k=10**9).with_tensors([Tensor("x", "F32", [1], bytes(4))]),
        "holds 1 tensors, none with a core",
    ),
    "groups that squared are too many": (
        lambda d: changed_tensor(d, "core", shape=[10**5, 1, 0, 0], data=b"").with_fields(k=10**5),
        "k=100000 groups take 100000² numbers to work with, but .* holds",
    ),
    "not a number": (lambda d: nan_in(d, "core"), "core holds 1 of 32 values that are not finite"),
    "not a number in the head": (lambda d: nan_in(d, "classifier.weight"), "classifier.weight holds 1 of 32 values"),
    "integers": (
        lambda d: changed_tensor(d, "core", dtype="I32"), "core is of type I32, not F64 or F32 or F16 or BF16",
    ),
    "a head in eight bits": (
        lambda d: changed_tensor(d, "classifier.weight", dtype="F8_E5M2", data=b"\x7f" * 32),
        "classifier.weight is of type F8_E5M2, not F64, F32,",
    ),
    "a flag that is none": (lambda d: changed_tensor(d, "initialised", dtype="U8"), "is of type U8, not BOOL"),
    "a weight of the base model": (
        lambda d: with_tensor(d, "dense.weight", [16, 16]),
        "1 tensors the model has no place for, as base_model.model.dense.weight; an adapter replaces no weights",
    ),
    "a weight beneath the adapter": (
        lambda d: with_tensor(d, "layer.0.query.base_layer.weight", [16, 16]), "query.base_layer.weight; an adapter",
    ),
    "a head that is missing": (
        lambda d: d.with_tensors([t for t in d.tensors if "classifier.weight" not in t.key]),
        "lacks 1 of 27 tensors, base_model.model.classifier.weight",
    ),
    "a head of another shape": (
        lambda d: changed_tensor(d, "classifier.weight", shape=[4, 8]),
        r"classifier.weight has shape \(4, 8\) in the adapter file, \(2, 16\) in the model",
    ),
    "a wider model's": (
        lambda d: changed_tensor(d, "input_factor", shape=[24, 3], data=bytes(288)),
        r"input_factor has shape \(24, 3\) in the adapter file, \(16, 3\) in the model",
    ),
    "an expression without end": (
        lambda d: d.with_fields(target_modules=BOMB),
        r"target_modules='.*' cannot be matched with [0-9]+ names of modules within 0.2 s; repeat no group",
    ),
    "a rank's expression without end": (lambda d: d.with_fields(rank_pattern={BOMB: 2}), "rank_pattern='.*' cannot be"),
    "an exclusion without end": (lambda d: d.with_fields(exclude_modules=BOMB), "exclude_modules='.*' cannot be"),
    "a module to save without end": (lambda d: d.with_fields(modules_to_save=[BOMB]), "modules_to_save='.*' cann"),
    "no expression": (lambda d: d.with_fields(target_modules="(a"), r"target_modules='\(a' is no regular expression"),
    "parentheses without end": (
        lambda d: d.with_fields(target_modules="(" * 3000 + ")" * 3000), "is no regular expression: maximum recursion",
    ),
    "a long expression": (lambda d: d.with_fields(target_modules="x" * 10**6), "has 1000000 characters; an expression"),
    "many names": (lambda d: d.with_fields(target_modules=["x"] * 30_000), r"\['x', .*… is not .*, or at most 20000"),
    "names that are none": (lambda d: d.with_fields(target_modules=[["x"]]), r"target_modules=.* is not one expre"),
    "a head by no name": (lambda d: d.with_fields(modules_to_save=[""]), r"modules_to_save=.* is not a list of at mo"),
    "a container to save": (lambda d: d.with_fields(modules_to_save=["layer"], target_modules=["dense"]),
                            "names 'layer', but no ModuleList is called"),
    "an adapted module to save": (lambda d: d.with_fields(modules_to_save=["ooler"], target_modules=["dense"]),
                                  "names 'pooler', but 'pooler.dense' in it is adapted"),
    "the adapter itself to save": (lambda d: d.with_fields(modules_to_save=["base_layer"]), "reaches into adapted lay"),
    "a task that the model has not": (
        lambda d: d.with_fields(task_type="CAUSAL_LM"), "task_type='CAUSAL_LM' generates, but a TinyForSequenceClassi",
    ),
    "a number that no float holds": (lambda d: d.with_fields(alpha=10**400), "alpha=1000.* is not a finite number"),
    "a mapping where names are": (lambda d: d.with_fields(factor_owners={"a": {"b": 1}}), "is not a flat dictionary"),
    "a path that is none": (lambda d: d.with_fields(base_model_name_or_path=["/etc"]), "is not a text"),
    "another field for itself": (lambda d: d.with_fields(self=1), "holds a field 'self', which no configuration has"),
    "much": (lambda d: text_of(d, lambda text: text + " " * (33 << 20)), "bytes, but a configuration has at most"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_the_cause_and_nothing_touched(what, good, bench, tmp_path, monkeypatch):
    change, message = REFUSED[what]
    change(good).write(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    for way in (bench.checked, bench.load, bench.second):  # each of them checks the model
        with pytest.raises(ValueError, match=message):
            way(tmp_path / "adapter")
    assert not Path(MARKER).exists()


BEFORE_TUCKA = {
    "depth": (lambda d: text_of(d, lambda text: DEEP), "is not a JSON file: maximum recursion depth"),
    "depth in a field": (lambda d: text_of(d, lambda text: text.replace("null", DEEP, 1)), "maximum recursion depth"),
    "no object": (lambda d: text_of(d, lambda text: "[1]"), "holds a JSON list, but a configuration is an object"),
    "another method": (lambda d: d.with_fields(peft_type="LORA"), "configures an adapter of type 'LORA', not 'TUCKA'"),
    "no method": (lambda d: d.with_fields(peft_type=None), "configures an adapter of type None"),
    "a method that is a list": (lambda d: d.with_fields(peft_type=["TUCKA"]), r"of type \['TUCKA'\], not 'TUCKA'"),
    "another encoding": (
        lambda d: d.with_file(CONFIG, '{"peft_type": "TUCKA"}'.encode("utf-16")),
        "is not a JSON file",
    ),
}


@pytest.mark.parametrize("what", BEFORE_TUCKA)
def test_what_peft_would_ask_first(what, good, bench, tmp_path):
    """PEFT reads the method before tucka is asked; asked first, tucka says what is wrong."""
    change, message = BEFORE_TUCKA[what]
    change(good).write(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        bench.checked(tmp_path / "adapter")
    with pytest.raises(ValueError):
        read_adapter(tmp_path / "adapter")


def test_a_task_whose_head_is_not_in_the_file(good, bench, tmp_path):
    """PEFT saves the heads of some tasks whole, whether or not `modules_to_save` names them."""
    headless = good.with_tensors([tensor for tensor in good.tensors if "classifier" not in tensor.key])
    headless.with_fields(task_type="TOKEN_CLS", modules_to_save=None).write(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"lacks 2 of 27 tensors, base_model\.model\.classifier"):
        bench.checked(tmp_path / "adapter")


def test_an_adapter_to_train_on_that_does_not_fit_leaves_the_weights(good, tmp_path):
    """PEFT has wrapped the layers by then; not a weight is other than it was."""
    with_tensor(good, "dense.weight", [16, 16]).write(tmp_path / "adapter")
    base, expected = base_model(), base_model().state_dict()
    with pytest.raises(ValueError, match=r"holds 1 weights of the base model, as base_model\.model\.dense\.weight"):
        PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    found = {key.replace("base_layer.", ""): value for key, value in base.state_dict().items()}
    found |= {key.replace(".original_module", ""): value for key, value in found.items()}
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_configuration_may_start_a_new_adapter_elsewhere(good, tmp_path):
    good.write(tmp_path / "adapter")
    config = tucka.TuckAConfig.from_pretrained(tmp_path / "adapter")
    config.inference_mode, config.task_type = False, None
    assert tucka.model.layers_of(get_peft_model(build("bert"), config))


def test_owners_that_own_nothing(good, tmp_path):
    layers = {t.key.removeprefix("base_model.model.").partition(".tucka_")[0] for t in good.tensors if "core" in t.key}
    good.with_fields(factor_owners=dict.fromkeys(layers, "layer.1.query")).write(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"shares the factors of 'layer.1.query', which has none of its own"):
        read_adapter(tmp_path / "adapter")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_field_is_read_or_refused(good, tmp_path, data):
    names = data.draw(st.lists(st.sampled_from(sorted(good.config)), min_size=1, max_size=3, unique=True))
    path = tmp_path / CONFIG
    path.write_bytes(good.with_fields(**{name: data.draw(VALUES) for name in names}).files[CONFIG])
    warnings.simplefilter("ignore")
    try:
        config = tucka.TuckAConfig.from_pretrained(tmp_path)
    except ValueError as error:
        assert str(error)
    else:
        assert config.to_dict() and fields.check_fields(config) is None


# --- what must stay allowed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields_of", [*ADAPTERS.values(), dict(expert_shares=True, init_router="kmeans_balanced"),
                                       dict(form="multiplicative", share_inputs=True, tie_factors=False),
                                       dict(share_factors=False, shared_expert=False, pooling="mean")])  # fmt: skip
def test_the_tensors_expected_of_an_adapter_are_those_it_saves(fields_of):
    """`expected_shapes` and the layers that allocate must not drift apart."""
    config = tucka.TuckAConfig(**{"r": 2, "target_modules": ["query", "value"], **fields_of, "modules_to_save": None})
    config.task_type, config.bias = None, "none"
    model = get_peft_model(base_model(), config)
    plans = plan_adapter(model.base_model, base_model(), config, None)
    found = {key: tuple(value.shape) for key, value in stored(model).items()}
    assert found == expected_shapes(base_model(), config, plans)


@pytest.mark.parametrize("bias", ["all", "tucka_only"])
def test_biases_and_embeddings_beside_saved_modules_are_loaded(bias, tmp_path):
    """PEFT writes them once for each place in its wrappers."""
    model = adapted("bert", bias=bias, modules_to_save=["pooler", "word_embeddings"], target_modules=["query"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    again = PeftModel.from_pretrained(build("bert"), tmp_path)
    assert all(torch.equal(value, stored(again)[key]) for key, value in stored(model).items())


USUAL = (
    r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$",
    r"^(?!.*vision).*self_attn\.(q|v)_proj",
    r"model\.layers\.\d+\..*proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.up_proj)",
)
NAMES = [f"model.language_model.layers.{i}.{part}" for i in range(80) for part in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.mark.parametrize("expression", USUAL)
def test_expressions_in_use_are_allowed(expression):
    patterns.require_quick_matching(plain_config(target_modules=expression), NAMES)


def test_plain_expressions_start_no_process(monkeypatch):
    monkeypatch.setattr(patterns.subprocess, "run", None)
    ranks = {f"^{re.escape(name)}": 2 for name in NAMES}
    for expression in USUAL[:3]:
        patterns.require_quick_matching(plain_config(target_modules=expression, rank_pattern=ranks), NAMES)


def test_ranks_are_looked_up_as_peft_does():
    ranks = {"up_proj": 3, r"layers\.1.*q_proj": 4, "q_proj": 5, f"^{re.escape(NAMES[4])}": 6, "a+b": 7}
    rank_of = patterns.rank_lookup(plain_config(r=2, rank_pattern=ranks))
    names = [*NAMES, "a+b", "x.k_proj", "xq_proj"]
    assert [rank_of(name) for name in names] == [ranks.get(get_pattern_key(list(ranks), name), 2) for name in names]
    assert len({rank_of(name) for name in names}) == 5


# --- the hub --------------------------------------------------------------------------------------------------------


def hub(monkeypatch, directory, found):
    """A hub whose repository "some/adapter" is that directory; `found` says what asking for the weights comes to."""

    def download(repository, name, subfolder=None, **_):
        if name == WEIGHTS and isinstance(found, type):
            raise found("not there")
        return str(directory / (subfolder or "") / name)

    monkeypatch.setattr("peft.config.hf_hub_download", download)
    monkeypatch.setattr(weights, "hf_hub_download", download)
    monkeypatch.setattr(weights, "file_exists", lambda repository, name, **_: (directory / name).exists())


def test_weights_on_the_hub_are_checked_as_those_in_a_directory(good, tmp_path, monkeypatch):
    nan_in(good, "core").write(tmp_path / "adapter")
    hub(monkeypatch, tmp_path / "adapter", None)
    with pytest.raises(ValueError, match="core holds 1 of 32 values that are not finite"):
        tucka.TuckAConfig.from_pretrained("some/adapter", revision="main")


def test_pickles_on_the_hub_are_refused(good, tmp_path, monkeypatch):
    good.without(WEIGHTS).with_file(PICKLE, PAYLOAD).write(tmp_path / "adapter")
    hub(monkeypatch, tmp_path / "adapter", EntryNotFoundError)
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        tucka.TuckAConfig.from_pretrained("some/adapter")
    hub(monkeypatch, tmp_path / "adapter", LocalEntryNotFoundError)  # offline, the configuration alone in the cache
    assert tucka.TuckAConfig.from_pretrained("some/adapter").weights_beside is None


def test_the_same_seed_gives_the_same_directory():
    first, second = (hostile.directory_of(3, 17) for _ in range(2))
    assert first == second and first != hostile.directory_of(3, 18)
    assert all(MUTATIONS[kind](sources()[1], Random(0)) for kind in MUTATIONS)
