"""The update of a token while `generate` runs, made ready once for all tokens of a prompt."""

import copy

import pytest
import torch
from conftest import adapted, batch_for
from transformers import LogitsProcessor

import tucka
from tucka import decoding
from tucka.model import layers_of

NEW = 5


@pytest.fixture
def served(monkeypatch):
    """Counts the updates that were ready."""
    counts = []
    add = decoding.Ready.add
    monkeypatch.setattr(decoding.Ready, "add", lambda *args, **options: counts.append(1) or add(*args, **options))
    return counts


def prompt_of(name, samples=3):
    batch = batch_for(name, samples=samples)
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def scores_of(model, prompt, **options):
    """Logits of every token that is written."""
    written = model.eval().generate(
        **prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return written.sequences, torch.stack(written.logits)


def slowly(monkeypatch):
    monkeypatch.setattr(decoding.Ready, "serves", lambda *args: False)


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
@pytest.mark.parametrize("routing", ["sample", "batch"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_tokens_are_those_of_layers_that_make_nothing_ready(name, routing, form, served, monkeypatch):
    model = adapted(name, torch.float64, form=form, routing=routing, k=3, t=2, p=2)
    prompt = prompt_of(name)
    sequences, logits = scores_of(model, prompt)
    assert len(served) >= (NEW - 2) * len(layers_of(model)) / 2  # an encoder's layers run once
    slowly(monkeypatch)
    expected, plain = scores_of(model, prompt)
    assert torch.equal(sequences, expected)
    torch.testing.assert_close(logits, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(use_cache=False)], ids=["beams", "without a cache"])
def test_with_beams_and_without_a_cache(options, served, monkeypatch):
    model, prompt = adapted("llama", torch.float64, k=3), prompt_of("llama")
    sequences, logits = scores_of(model, prompt, **options)
    assert served
    slowly(monkeypatch)
    expected, plain = scores_of(model, prompt, **options)
    assert torch.equal(sequences, expected)
    torch.testing.assert_close(logits, plain, rtol=1e-10, atol=1e-10)


def test_nothing_is_kept_after_a_generation(served):
    """Weights may change before the next one."""
    model, prompt = adapted("llama", k=3), prompt_of("llama")
    scores_of(model, prompt)
    dispatcher = layers_of(model)[0].dispatcher
    assert served and not dispatcher.current.ready
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if n.endswith(".core")):
            parameter.mul_(3)
    _, changed = scores_of(model, prompt)
    _, fresh = scores_of(copy.deepcopy(model), prompt)
    assert torch.equal(changed, fresh)


class Switches(LogitsProcessor):
    """Makes another adapter active in the middle of a generation."""

    def __init__(self, model, name):
        self.model, self.name = model, name

    def __call__(self, input_ids, scores):
        self.model.set_adapter(self.name)
        return scores


def test_an_adapter_that_becomes_active_meanwhile_acts(monkeypatch, tmp_path):
    model = adapted("llama", torch.float64, k=3)
    adapted("llama", torch.float64, k=3, r=2).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")

    def logits():
        model.set_adapter("default")
        return scores_of(model, prompt_of("llama"), logits_processor=[Switches(model, "other")])[1]

    found = logits()
    slowly(monkeypatch)
    torch.testing.assert_close(found, logits(), rtol=1e-10, atol=1e-10)


def test_with_pinned_and_recorded_routes(served, monkeypatch):
    model, prompt = adapted("llama", torch.float64, k=3), prompt_of("llama")
    with tucka.record_routes(model) as routes, tucka.pin_route(model, [0, 2, 1]):
        _, logits = scores_of(model, prompt)
    assert len(routes) == NEW and all(route.group.tolist() == [0, 2, 1] for route in routes)
    slowly(monkeypatch)
    with tucka.pin_route(model, routes[0]):
        torch.testing.assert_close(scores_of(model, prompt)[1], logits, rtol=1e-10, atol=1e-10)
