"""LoRA adapters, as PEFT makes and saves them, imported as experts."""

import json
import logging
import shutil

import pytest
import torch
from conftest import (
    adapter_state,
    assert_same_state,
    batch_for,
    batches_for,
    build,
    first_output,
    randomise,
    router_of,
)
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tucka
from tucka.loras import from_loras
from tucka.model import layers_of
from tucka.state import published_name

DOUBLE = torch.float64
TARGETS = dict(
    bert=["query", "dense"], vit=["q_proj", "fc1"], gpt2=["c_attn", "c_fc"], llama=["q_proj", "v_proj"], t5=["q", "wo"]
)  # fmt: skip
TOPICS = ((3, 18), (18, 33), (33, 48))
"""Tokens of three kinds of text that a router can tell apart."""


def saved(directory, name="bert", seed=0, dtype=DOUBLE, **fields):
    """A LoRA with random weights, saved by PEFT; the model that runs it."""
    fields = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS.get(name), **fields}
    model = randomise(get_peft_model(build(name, dtype), LoraConfig(**fields)), seed=seed + 1)
    model.save_pretrained(directory)
    return model.eval()


def three(tmp_path, name="bert", **fields):
    """Three LoRAs of unlike ranks, scalings and layers: their directories by name, and their models."""
    one = TARGETS.get(name, "all-linear")
    kinds = [
        dict(r=2),
        dict(r=3, use_rslora=True, rank_pattern={r".*\.1\..*": 2}, alpha_pattern={r".*\.0\..*": 9}),
        dict(r=4, lora_alpha=1, target_modules=one[:1] if isinstance(one, list) else one),
    ]
    models = {f"lora{i}": saved(tmp_path / f"lora{i}", name, i, **{**kind, **fields}) for i, kind in enumerate(kinds)}
    return {key: str(tmp_path / key) for key in models}, models


def import_(base, loras, **options):
    return from_loras(base, loras, progress=False, **options)


def topic(index, samples=20, seed=0):
    """Batches of texts of one kind."""
    generator = torch.Generator().manual_seed(100 * seed + index)
    ids = torch.randint(*TOPICS[index], (samples, 7), generator=generator)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(5)]


def updates_of(lora):
    """ΔW of every layer, as PEFT would merge it, (O, D), by layer name."""
    found = {}
    for name, module in lora.base_model.model.named_modules():
        if "default" in (getattr(module, "lora_A", None) or {}):
            delta = module.get_delta_weight("default").detach()
            found[name] = delta.mT if module.fan_in_fan_out else delta
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_every_expert_is_its_lora_and_a_copy_is_saved_and_trains(name, tmp_path):
    loras, models = three(tmp_path, name)
    batch = batch_for(name, dtype=DOUBLE)
    model, report = import_(build(name, DOUBLE), loras)
    model.save_pretrained(tmp_path / "tucka")
    loaded = PeftModel.from_pretrained(build(name, DOUBLE), tmp_path / "tucka")
    assert report.names == tuple(loras) and report.error < 1e-12
    for lora, expected in models.items():
        for each in (model.eval(), loaded.eval()):
            with torch.no_grad(), tucka.pin_route(each, report.route(lora)):
                torch.testing.assert_close(
                    first_output(each(**batch)), first_output(expected(**batch)), rtol=1e-8, atol=1e-8
                )
    with tucka.pin_route(model.train(), report.route(1)):
        model(**batch).loss.backward()
    before = adapter_state(model)
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2).step()
    moved = {key for key, value in adapter_state(model).items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[2] for key in moved} >= {"core", "input_factor", "output_factor"}
    first = layers_of(model)[0].tucka_experts["default"].core
    assert first.grad[1].any() and not first.grad[[0, 2]].any()


def test_a_batch_of_mixed_tasks_in_single_precision(tmp_path):
    loras, models = three(tmp_path, dtype=torch.float32)
    model, report = import_(build("bert"), list(loras.values()), shared_expert=True)
    batch = batch_for("bert", samples=3)
    with torch.no_grad(), tucka.pin_route(model.eval(), report.route("lora2", 0, "lora1")):
        found = model(**batch).logits
    for row, lora in enumerate(("lora2", "lora0", "lora1")):
        with torch.no_grad():
            torch.testing.assert_close(found[row], models[lora](**batch).logits[row], rtol=1e-5, atol=1e-5)
    assert model.peft_config["default"].shared_expert and report.error < 1e-12


@pytest.mark.parametrize(("name", "rank"), [("bert", 4), ("gpt2", 1), ("gpt2", 9)])
def test_the_reported_error_is_the_true_one(name, rank, tmp_path):
    loras, models = three(tmp_path, name)
    model, report = import_(build(name, DOUBLE), loras, rank=rank)
    deltas = [updates_of(lora) for lora in models.values()]
    norms = [sum(float(value.square().sum()) for value in delta.values()) ** 0.5 for delta in deltas]
    for layer, line in zip(layers_of(model), report.layers):
        experts = layer.tucka_experts["default"].to_tensor()[:, 0].mT.detach()
        assert line.layer == layer.name and line.rank <= rank
        zero = torch.zeros(layer.out_features, layer.in_features, dtype=DOUBLE)
        wanted = torch.stack([delta.get(layer.name, zero) for delta in deltas])
        left = (experts - wanted).flatten(1).norm(dim=1)
        assert line.errors == pytest.approx(
            (left / wanted.flatten(1).norm(dim=1).clamp_min(1e-300)).tolist(), abs=1e-12
        )
        # No worse than the bound of a truncated HOSVD, with all LoRAs divided by their norms.
        weight = torch.tensor(norms, dtype=DOUBLE).reciprocal()
        scaled = wanted * weight.view(-1, 1, 1)
        tails = [
            torch.linalg.svdvals(x)[rank:].square().sum() for x in (torch.cat(list(scaled)), torch.cat(list(scaled), 1))
        ]
        assert (left * weight).square().sum() <= sum(tails) + 1e-12
    assert (report.error > 0.01) == (rank < 9)


def test_less_rank_is_more_error_and_fewer_parameters(tmp_path):
    loras, _ = three(tmp_path, target_modules=["value"])
    errors, sizes = [], []
    for rank in (1, 3, None):
        model, report = import_(build("bert", DOUBLE), loras, rank=rank)
        errors.append(report.error)
        sizes.append(tucka.ranks.adapter_parameters(model))
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)
    assert "relative error" in str(tucka.truncate(model, ranks=3))


def test_equal_loras_need_the_rank_of_one(tmp_path):
    saved(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    _, report = import_(build("bert", DOUBLE), [tmp_path / "a", tmp_path / "b"])
    assert {line.rank for line in report.layers} == {3} and report.error < 1e-6


def test_narrow_layers_are_reported(tmp_path, caplog):
    loras = [tmp_path / name for name in ("a", "b")]
    for seed, directory in enumerate(loras):
        saved(directory, seed=seed, r=2, target_modules=["classifier", "query"])
    with caplog.at_level(logging.WARNING, "tucka"):
        _, report = import_(build("bert", DOUBLE), loras)
    worst = max(report.layers, key=lambda line: max(line.errors))
    assert worst.layer == "classifier" and worst.rank == 2 and report.error > 0.01
    assert (
        "exceed the widths of layer 'classifier'" in caplog.text and "no samples seeded the router: use" in caplog.text
    )
    assert f"{max(worst.errors):.3e}" in str(report) and "not seeded" in str(report)


def test_positions_that_samples_share_ask_for_batch_routing(tmp_path, caplog):
    lora = saved(tmp_path / "a", "deberta", target_modules=["query_proj", "key_proj"])
    batch = batch_for("deberta")
    for routing in ("sample", "batch"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tucka"):
            model, report = import_(build("deberta", DOUBLE), [tmp_path / "a"], routing=routing)
        with torch.no_grad(), tucka.pin_route(model.eval(), report.route("a")):
            exact = torch.allclose(model(**batch).logits, lora(**batch).logits, rtol=0, atol=1e-8)
        assert exact == (routing == "batch") and ("what all samples share" in caplog.text) != exact


# --- the router ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affinity", ["cosine", "distance"])
def test_the_router_picks_each_samples_lora(affinity, tmp_path):
    loras, models = three(tmp_path, "llama")
    loaders = dict(zip(loras, map(topic, range(3))))
    model, report = import_(build("llama", DOUBLE), loras, samples=loaders, affinity=affinity)
    (seeding,) = report.seeding.values()
    assert min(seeding.share) > 0.9 and min(seeding.gate) > 0.98
    assert report.temperature == model.peft_config["default"].temperature == router_of(model).config.temperature
    batch = {key: torch.cat([topic(i, 5, seed=1)[0][key] for i in range(3)]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad(), tucka.record_routes(model.eval()) as routes:
        found = model(**batch).logits
    group, gates = routes[0].group, routes[0].gates[:, 0]
    assert group.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and gates.median() > 0.999
    for index, lora in enumerate(models.values()):
        rows = ((group == index) & (gates > 0.999)).nonzero().flatten()
        with torch.no_grad():
            torch.testing.assert_close(found[rows], lora(**batch).logits[rows], rtol=0, atol=5e-3)
    assert "100.0% of its samples routed to it, mean gate" in str(report)


def test_loaders_and_groups_say_the_same(tmp_path):
    loras, _ = three(tmp_path)
    together = [batch for i in range(3) for batch in topic(i)]
    ids = [i for i in range(3) for _ in range(20)]
    keyed = [{**batch, "whose": torch.tensor(ids[5 * i : 5 * i + 5])} for i, batch in enumerate(together)]
    named = [{**batch, "whose": [f"lora{j}" for j in ids[5 * i : 5 * i + 5]]} for i, batch in enumerate(together)]
    given = [
        dict(samples=[topic(i) for i in range(3)]), dict(samples=keyed, groups="whose"),
        dict(samples=iter(together), groups=ids), dict(samples=named, groups="whose"),
    ]  # fmt: skip
    found = [import_(build("bert", DOUBLE), loras, **options) for options in given]
    for model, report in found[1:]:
        assert_same_state(adapter_state(model), adapter_state(found[0][0]))
        assert report.seeding == found[0][1].seeding
    few, _ = import_(build("bert", DOUBLE), loras, samples=[topic(i) for i in range(3)], samples_each=5)
    assert not torch.equal(router_of(few).centroids, router_of(found[0][0]).centroids)
    assert import_(build("bert", DOUBLE), loras, **given[0], temperature=0.3)[1].temperature == 0.3


def test_loras_count_alike_however_many_samples_they_have(tmp_path):
    loras, _ = three(tmp_path)
    even, _ = import_(build("bert", DOUBLE), loras, samples=[topic(i, 10) for i in range(3)])
    uneven, report = import_(build("bert", DOUBLE), loras, samples=[topic(0, 10) * 6, topic(1, 10), topic(2, 10)])
    torch.testing.assert_close(router_of(uneven).center, router_of(even).center)
    assert min(report.seeding[""].share) > 0.8


def test_towers_have_a_router_each(tmp_path):
    for seed, name in enumerate("ab"):
        saved(tmp_path / name, "clip", seed, target_modules=["q_proj", "fc2"])
    loaders = [batches_for("clip", 6, dtype=DOUBLE), batches_for("clip", 5, dtype=DOUBLE)]
    model, report = import_(build("clip", DOUBLE), [tmp_path / "a", tmp_path / "b"], samples=loaders)
    assert set(report.seeding) == set(report.towers) == {"text_model", "vision_model"}
    assert all(bool(layer.tucka_router["default"].initialised) for layer in layers_of(model) if layer.tucka_router)
    expected = PeftModel.from_pretrained(build("clip", DOUBLE), tmp_path / "b").eval()
    batch = batch_for("clip", dtype=DOUBLE)
    with torch.no_grad(), tucka.pin_route(model.eval(), report.route("b")):
        torch.testing.assert_close(model(**batch).logits_per_text, expected(**batch).logits_per_text)


# --- files -----------------------------------------------------------------------------------------------------------


def test_heads_are_kept_where_they_agree_and_chosen_where_not(tmp_path):
    models = {name: saved(tmp_path / name, seed=seed, task_type="SEQ_CLS") for seed, name in enumerate("ab")}
    loras = {name: tmp_path / name for name in models}
    batch = batch_for("bert")
    base = build("bert", DOUBLE)
    with pytest.raises(ValueError, match=r"'a' and 'b' hold different weights of 'classifier'.* head_of=…"):
        import_(base, loras)
    model, report = import_(base, loras, head_of="b")
    model.save_pretrained(tmp_path / "tucka")
    loaded = PeftModel.from_pretrained(build("bert", DOUBLE), tmp_path / "tucka")
    for each in (model.eval(), loaded.eval()):
        with torch.no_grad(), tucka.pin_route(each, report.route("b")):
            torch.testing.assert_close(each(**batch).logits, models["b"](**batch).logits)
    weights = load_file(tmp_path / "b" / "adapter_model.safetensors")
    heads = {key: value for key, value in weights.items() if "classifier" in key}
    assert heads
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({**load_file(path), **heads}, path)
    model, _ = import_(build("bert", DOUBLE), loras)
    held = model.base_model.model.classifier.modules_to_save["default"].weight
    assert torch.equal(held, heads["base_model.model.classifier.weight"]) and model.peft_config["default"].task_type


def test_names_that_transformers_has_changed_since(tmp_path):
    expected = saved(tmp_path / "a", "vit")
    path, base = tmp_path / "a" / "adapter_model.safetensors", build("vit", DOUBLE)
    weights, old = load_file(path), {}
    for key, value in weights.items():
        layer, _, end = key.removeprefix("base_model.model.").partition(".lora_")
        old[f"base_model.model.{published_name(base, layer)}.lora_{end}"] = value
    assert old.keys().isdisjoint(weights)
    save_file(old, path)
    model, report = import_(base, [tmp_path / "a"])
    batch = batch_for("vit", dtype=DOUBLE)
    with torch.no_grad(), tucka.pin_route(model.eval(), report.route("a")):
        torch.testing.assert_close(model(**batch).logits, expected(**batch).logits)


def test_ids_of_the_hub_go_through_its_client(tmp_path, monkeypatch):
    saved(tmp_path / "poems")
    asked = []

    def download(repository, filename, **options):
        asked.append((repository, filename))
        return str(tmp_path / "poems" / filename)

    monkeypatch.setattr("peft.config.hf_hub_download", download)
    monkeypatch.setattr("tucka.loras.reading.hf_hub_download", download)
    _, report = import_(build("bert", DOUBLE), ["somebody/poems"])
    assert report.names == ("poems",) and report.error < 1e-12
    assert asked == [("somebody/poems", f) for f in ("adapter_config.json", "adapter_model.safetensors")]


def edit_config(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory, change):
    path = directory / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file({key: value.contiguous() for key, value in weights.items()}, path)


FIRST, BIAS = "base_model.model.bert.encoder.layer.0.attention.self.query", "bert.pooler.dense.bias"


def _pickle(directory):
    torch.save({}, directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()


def _rename(old, new):
    def change(weights):
        for key in [key for key in weights if old in key]:
            weights[key.replace(old, new)] = weights.pop(key)

    return change


BROKEN = {
    "dora": (lambda d: edit_config(d, use_dora=True), "adapter 'b' sets use_dora=True, which experts cannot carry"),
    "biases": (lambda d: edit_config(d, bias="all"), r"adapter 'b' trains biases \(bias='all'\)"),
    "pissa": (lambda d: edit_config(d, init_lora_weights="pissa"), "init_lora_weights='pissa', which changes the base"),
    "rank": (lambda d: edit_config(d, r=5), r"query' has rank 3 in the file of its adapter, 5 in its configuration"),
    "base": (lambda d: edit_config(d, base_model_name_or_path="other"),
             "'a' and 'b' have different base models, 'mine' and 'other'; .* check_base=False"),
    "json": (lambda d: (d / "adapter_config.json").write_text("{"), "'b': .* holds no configuration that PEFT reads"),
    "method": (lambda d: (shutil.rmtree(d), get_peft_model(build("bert"), IA3Config(target_modules=["query"],
               feedforward_modules=[])).save_pretrained(d)), "adapter 'b' is of type .*IA3; experts are made of LORA"),
    "pickle": (_pickle, r"adapter_model.bin is a pickle; only adapter_model.safetensors is read"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "'b': .* holds no adapter_model.safetensors"),
    "damaged": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 99), "is not a whole safetensors file"),
    "shape": (lambda d: edit_weights(d, lambda w: w.update({f"{FIRST}.lora_B.weight": torch.zeros(31, 3)})),
              r"A and B of .*query' have shapes \(\(3, 32\), \(31, 3\)\), the layer asks for \(\(3, 32\), \(32, 3\)\)"),
    "half a pair": (lambda d: edit_weights(d, lambda w: w.pop(f"{FIRST}.lora_B.weight")), "query holds no pair of"),
    "no layer": (lambda d: edit_weights(d, _rename("encoder", "nowhere")), "adapts 6 layers that the model does not"),
    "a norm": (lambda d: edit_weights(d, _rename("attention.self.query", "attention.output.LayerNorm")),
               "adapts '.*LayerNorm', a LayerNorm, which experts cannot"),
    "embedding": (lambda d: edit_weights(d, lambda w: w.update({"base_model.model.e.lora_embedding_A": torch.ones(1)})),
                  "adapts an embedding"),
    "not finite": (lambda d: edit_weights(d, lambda w: w[f"{FIRST}.lora_A.weight"].fill_(float("nan"))), "not finite"),
    "the base's": (lambda d: edit_weights(d, lambda w: w.update({f"base_model.model.{BIAS}": torch.ones(32)})),
                   f"changes '{BIAS}' of the base model"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_imported_leaves_the_model_alone(fault, tmp_path):
    break_it, message = BROKEN[fault]
    for name in "ab":
        saved(tmp_path / name, dtype=torch.float32, target_modules=["query", "value", "intermediate.dense"])
        edit_config(tmp_path / name, base_model_name_or_path="mine")
    break_it(tmp_path / "b")
    base = build("bert")
    before = {name: (type(module), module.training) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=message):
        import_(base, [tmp_path / "a", tmp_path / "b"])
    assert {name: (type(module), module.training) for name, module in base.named_modules()} == before
    if fault == "base":
        assert import_(base, [tmp_path / "a", tmp_path / "b"], check_base=False)[1].error < 1e-6


def test_tensors_that_are_the_bases_own_are_passed_over(tmp_path):
    saved(tmp_path / "a")
    own = build("bert", DOUBLE).bert.pooler.dense.bias.detach()
    edit_weights(tmp_path / "a", lambda w: w.update({f"base_model.model.{BIAS}": own}))
    assert import_(build("bert", DOUBLE), [tmp_path / "a"])[1].error < 1e-12


def test_arguments_that_do_not_fit(tmp_path):
    loras, _ = three(tmp_path)
    base, batches = build("bert", DOUBLE), topic(0)
    flags = [parameter.requires_grad for parameter in base.parameters()]
    for options, message in (
        (dict(loras=[]), "loras is empty"),
        (dict(loras=str(tmp_path)), "is one adapter; give a list"),
        (dict(loras=[loras["lora0"]] * 2), "an adapter is given twice"),
        (dict(rank=0), "rank=0 is not a whole number of at least 1"),
        (dict(samples_each=0), "samples_each=0 is not a whole number"),
        (dict(head_of="x"), r"head_of='x' is not one of the adapters \['lora0', 'lora1', 'lora2'\]"),
        (dict(t=2), "t cannot be set: the LoRAs say what the experts are"),
        (dict(affinity="paper"), "affinity='paper' gives one expert in a group a gate"),
        (dict(groups="topic"), "groups say whose the samples of one loader are"),
        (dict(samples={"x": batches}), r"samples are given for \['x'\], but the adapters are"),
        (dict(samples=[batches]), "samples must be 3 loaders"),
        (dict(samples=batches, groups=[0, 7]), "groups name 7, which is neither one of"),
        (dict(samples=batches, groups="topic"), "groups='topic' is no key of the batches"),
        (dict(samples=batches, groups=[0, 1, 2]), "groups hold 3 entries for the 5 samples of a batch"),
        (dict(samples=batches, groups=[0] * 20), r"no sample of adapter 1 \(of 0 to 2\) reached the router"),
        (dict(samples=[[], [], []]), "no sample reached a router"),
    ):
        with pytest.raises(ValueError, match=message):
            import_(base, **{"loras": loras, **options})
        assert not layers_of(base) and not base._forward_pre_hooks
        assert [parameter.requires_grad for parameter in base.parameters()] == flags
    model, report = import_(base, loras)
    with pytest.raises(ValueError, match="the model is wrapped already"):
        import_(model, loras)
    with pytest.raises(ValueError, match=r"'x' is not one of the adapters \['lora0', 'lora1', 'lora2'\]"):
        report.route("lora0", "x")
