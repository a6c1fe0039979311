"""Causal language models route by the prompt in training, as they do when they generate."""

import pytest
import torch
from conftest import adapted, build, plain_config
from hypothesis import given, settings
from hypothesis import strategies as st

import tucka
from tucka.inputs import Inputs
from tucka.units import as_units

PROMPT, ANSWER = 5, 3


def a_batch(seed=0, pad=0):
    """Prompts and answers, the first `pad` tokens of the first sample padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (4, PROMPT + ANSWER), generator=generator)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prompts_of(batch):
    return {name: batch[name][:, :PROMPT] for name in ("input_ids", "attention_mask")}


def route_of(model, batch):
    with tucka.record_routes(model) as routes, torch.no_grad():
        model(**batch)
    return routes[0]


@pytest.mark.parametrize(("name", "pad"), [("gpt2", 0), ("llama", 0), ("llama", 2)])
def test_a_training_forward_routes_as_generation_does(name, pad):
    model, batch = adapted(name).train(), a_batch(pad=pad)
    trained = route_of(model, batch)
    model.eval()
    with tucka.record_routes(model) as routes:
        model.generate(**prompts_of(batch), max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(trained.gates, routes[0].gates)
    assert torch.equal(trained.group, routes[0].group)


def test_the_answer_does_not_matter_to_the_route():
    model, batch = adapted("llama"), a_batch()
    other = {name: value.clone() for name, value in batch.items()}
    other["input_ids"][:, PROMPT:] = 7
    other["labels"][:, PROMPT:] = 7
    torch.testing.assert_close(route_of(model, batch).scores, route_of(model, other).scores)


def test_answers_are_pooled_where_it_is_asked_for():
    model, batch = adapted("llama", pool_answers=True), a_batch()
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    torch.testing.assert_close(route_of(model, batch).scores, route_of(model, unlabelled).scores)
    assert not torch.allclose(route_of(model, batch).scores, route_of(model, prompts_of(batch)).scores)


def test_samples_without_a_prompt_count_whole():
    model, batch = adapted("llama"), a_batch()
    batch["labels"][1] = batch["input_ids"][1]
    whole = {name: value for name, value in batch.items() if name != "labels"}
    found, expected = route_of(model, batch).scores, route_of(model, whole).scores
    torch.testing.assert_close(found[1], expected[1])
    assert not torch.allclose(found[0], expected[0])


def test_batches_are_routed_whole():
    """As in the paper."""
    model, batch = adapted("llama", routing="batch"), a_batch()
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    torch.testing.assert_close(route_of(model, batch).scores, route_of(model, unlabelled).scores)


def test_labels_of_other_models_say_nothing_of_prompts():
    from transformers import BertForTokenClassification

    torch.manual_seed(0)
    base = BertForTokenClassification(build("bert").config)
    model = tucka.apply(base, plain_config(r=2, k=2, target_modules=["query"]))
    batch = a_batch()
    batch["labels"] = batch["labels"].clamp_max(1)
    unlabelled = {name: value for name, value in batch.items() if name != "labels"}
    torch.testing.assert_close(route_of(model, batch).scores, route_of(model, unlabelled).scores)


def test_calibration_finds_the_prompts_too():
    batches = [a_batch(seed) for seed in range(4)]
    model = tucka.apply(build("llama"), plain_config(r=2, k=2, t=1, affinity="cosine", init_router="kmeans"),
                        calibration=batches, progress=False)  # fmt: skip
    again = tucka.apply(build("llama"), plain_config(r=2, k=2, t=1, affinity="cosine", init_router="kmeans"),
                        calibration=[prompts_of(batch) for batch in batches], progress=False)  # fmt: skip
    routers = [next(m for m in each.modules() if isinstance(m, tucka.routing.Router)) for each in (model, again)]
    torch.testing.assert_close(routers[0].center, routers[1].center)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
def test_every_sample_keeps_a_token_unless_all_is_padding(samples, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.where(torch.rand(samples, tokens, generator=generator) < 0.5, -100, 5)
    mask = (torch.rand(samples, tokens, generator=generator) < 0.7).long()
    inputs = Inputs(samples, tokens, mask, labels=labels)
    x = torch.zeros(samples, tokens, 3)
    _, keep = as_units(x, inputs, "layer", per_sample=True, pool_padding=False, pool_answers=False)
    for row in range(samples):
        unpadded = mask[row].bool()
        prompt = unpadded & (labels[row] == -100)
        assert torch.equal(keep[row].bool(), prompt if prompt.any() else unpadded)


@pytest.mark.parametrize("routing", ["sample", "batch"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_an_assistant_drafts_does_not_enter_the_route(name, routing):
    """The first forward of assisted decoding reads prompt and drafts at once."""
    model = adapted(name, torch.float64, routing=routing, axis_block_size=2).eval()
    prompt = {key: value[:1] for key, value in prompts_of(a_batch()).items()}
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    seen = []
    for assistant in (None, build(name, torch.float64, seed=3)):
        with tucka.record_routes(model) as routes:
            tokens = model.generate(**prompt, assistant_model=assistant, **options)
        seen.append((tokens, routes[0].gates))
    assert torch.equal(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-12, atol=0)
