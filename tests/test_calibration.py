"""Calibration through the public calls: what it takes, what it leaves behind, and when it runs."""

import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import (
    adapter_state,
    assert_same_state,
    batch_for,
    batches_for,
    build,
    first_output,
    router_of,
    started,
    unstarted,
)
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import BatchEncoding, PreTrainedModel

import tucka
from tucka.model import layers_of

KMEANS = dict(init_router="kmeans", init_experts="gradient")


def surroundings(model):
    """All that a calibration must leave as found, beside the adapter."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [module.training for module in model.modules()],
        [[list(getattr(module, kind)) for kind in hooks] for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad is None for parameter in model.parameters()],
        [layer.disable_adapters for layer in layers_of(model)],
        [layer.dispatcher.current.scope for layer in layers_of(model)],
        [vars(module.config).get("use_cache") for module in model.modules() if isinstance(module, PreTrainedModel)],
        torch.get_rng_state().tolist(),
        [*np.random.get_state()[1], np.random.get_state()[2]],
        random.getstate(),
        torch.is_grad_enabled(),
    ]


# --- what a loader may yield -----------------------------------------------------------------------------------------

Named = namedtuple("Named", "input_ids attention_mask")


def as_batch(kind, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return {
        "dict": lambda: {"input_ids": ids, "attention_mask": mask},
        "tuple": lambda: (ids, mask),
        "list": lambda: [ids, mask],
        "named tuple": lambda: Named(ids, mask),
        "BatchEncoding": lambda: BatchEncoding({"input_ids": ids, "attention_mask": mask}),
    }[kind]()


@pytest.mark.parametrize("kind", ["tuple", "list", "named tuple", "BatchEncoding"])
def test_any_form_of_batch_gives_the_same_start(kind):
    expected = adapter_state(started(batches=[as_batch("dict", batch) for batch in batches_for("bert")]))
    assert_same_state(
        adapter_state(started(batches=[as_batch(kind, batch) for batch in batches_for("bert")])), expected
    )


def test_a_single_tensor_is_a_batch():
    batches = [batch["input_ids"] for batch in batches_for("bert")]
    expected = adapter_state(started(batches=[{"input_ids": ids} for ids in batches]))
    assert_same_state(adapter_state(started(batches=batches)), expected)


def test_a_generator_is_read_once_and_no_further_than_needed():
    batches, read = batches_for("bert", samples=20, size=4), []

    def loader():
        for index, batch in enumerate(batches):
            read.append(index)
            yield batch

    model, calls = unstarted(), []
    model.get_base_model().bert.encoder.layer[0].register_forward_pre_hook(lambda *args: calls.append(args[1][0]))
    tucka.initialize(model, loader(), samples=10, progress=False)
    assert read == [0, 1, 2], "as many batches as hold ten samples, each taken from the loader once"
    assert [len(hidden) for hidden in calls] == [4] * 6, "one pass for the features and one for the moments"
    assert_same_state(adapter_state(model), adapter_state(started(batches=batches[:3])))


def test_apply_is_injection_and_start():
    config = unstarted().peft_config["default"]
    torch.manual_seed(0)
    model = tucka.apply(build("bert"), config, calibration=iter(batches_for("bert")), progress=False)
    assert_same_state(adapter_state(model), adapter_state(started()))


def test_a_data_loader_draws_its_own_order_without_moving_the_random_state():
    rows = [{key: value[row] for key, value in batch_for("bert", samples=12).items()} for row in range(12)]

    def collate(chosen):  # as an augmentation would
        assert random.random() >= 0 and np.random.rand() >= 0
        return {key: torch.stack([row[key] for row in chosen]) for key in rows[0]}

    model = unstarted()
    before = surroundings(model)
    tucka.initialize(model, DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate), progress=False)
    assert surroundings(model) == before
    assert router_of(model).initialised


def test_too_few_samples_for_the_experts():
    model = unstarted(k=4)
    before = adapter_state(model)
    with pytest.raises(ValueError, match=r"calibration gives 5 features to find k·t=4·2 centroids in"):
        tucka.initialize(model, batches_for("bert", samples=5), progress=False)
    assert_same_state(adapter_state(model), before)


# --- what is left behind ---------------------------------------------------------------------------------------------


def half_way(batches):
    yield batches[0]
    raise RuntimeError("half way")


FAILURES = {
    "the loader raises": (lambda batches: half_way(batches), {}, RuntimeError, "half way"),
    "the loss is not a number": (
        lambda batches: batches, dict(loss=lambda output, batch: output.loss * float("nan")), ValueError,
        r"the gradient tensor of layer '\S+' is not finite",
    ),
    "the loss raises": (
        lambda batches: batches, dict(loss=lambda output, batch: output.nothing), AttributeError, "nothing",
    ),
    "the second batch is none": (
        lambda batches: [batches[0], {"labels": torch.ones(1)}], {}, ValueError, "exactly one of input_ids or",
    ),
    "there is no loss": (
        lambda batches: [{"input_ids": batch["input_ids"]} for batch in batches], {}, ValueError,
        r"init_experts='gradient' needs a loss, but the model's output has none: give batches with labels, or",
    ),
    "the loss is of something else": (
        lambda batches: batches, dict(loss=lambda output, batch: torch.ones((), requires_grad=False)), ValueError,
        "the loss does not depend on any adapted layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("failure", [None, *FAILURES])
def test_initialize_leaves_everything_else_as_found(failure):
    model = unstarted(init_experts="gradient", modules_to_save=["classifier"]).train()
    model.get_base_model().bert.encoder.eval()
    model.get_base_model().bert.embeddings.word_embeddings.weight.requires_grad_(True)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before, adapter = surroundings(model), adapter_state(model)
    weights = {key: value.clone() for key, value in model.state_dict().items() if ".tucka_" not in key}
    if failure is None:
        tucka.initialize(model, batches_for("bert"), progress=False)
        assert any(not torch.equal(value, adapter[key]) for key, value in adapter_state(model).items())
    else:
        loader, options, error, message = FAILURES[failure]
        with pytest.raises(error, match=message):
            tucka.initialize(model, loader(batches_for("bert")), progress=False, **options)
        assert_same_state(adapter_state(model), adapter)
        assert router_of(model).awaits_start
    assert surroundings(model) == before
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights.items())
    model(**batch_for("bert")).loss.backward()  # and it trains


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_apply_leaves_the_base_model_unwrapped(failure):
    base, batch = build("bert").train(), batch_for("bert")
    base.bert.encoder.requires_grad_(False)
    before, names = surroundings(base), [name for name, _ in base.named_modules()]
    loader, options, error, message = FAILURES[failure]
    with pytest.raises(error, match=message):
        config = tucka.TuckAConfig(r=4, k=2, t=2, **KMEANS, modules_to_save=["classifier"])
        tucka.apply(base, config, calibration=loader(batches_for("bert")), progress=False, **options)
    assert [name for name, _ in base.named_modules()] == names
    assert surroundings(base)[:7] == before[:7]  # all but random states: injection itself draws
    base.eval()
    with torch.no_grad():
        assert torch.equal(base(**batch).logits, build("bert")(**batch).logits)
    assert list(tucka.apply(base, tucka.TuckAConfig(r=4)).peft_config) == ["default"]


def test_a_second_start_replaces_the_first():
    """A later call starts again, as a fresh model would: whatever was there, also after a failure in between."""
    model = started(warm_start=0.5)
    first = adapter_state(model)
    with pytest.raises(RuntimeError, match="half way"):
        tucka.initialize(model, half_way(batches_for("bert")), progress=False)
    assert_same_state(adapter_state(model), first)
    other = batches_for("bert", samples=14, size=7)
    tucka.initialize(model, other, progress=False)
    assert_same_state(adapter_state(model), adapter_state(started(batches=other, warm_start=0.5)))


def test_an_optimiser_built_before_keeps_its_parameters():
    model = unstarted(init_experts="gradient")
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tucka.initialize(model, batches_for("bert"), progress=False)
    before = adapter_state(model)
    model.train()(**batch_for("bert")).loss.backward()
    optimiser.step()
    assert any(
        key.endswith(".core") and not torch.equal(value, before[key]) for key, value in adapter_state(model).items()
    )
    assert {id(p) for group in optimiser.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_embedded_inputs_that_train_receive_no_gradient():
    embedded = torch.randn(8, 7, 32, requires_grad=True)
    started(batches=[{"inputs_embeds": embedded, "labels": torch.arange(8) % 2}], init_experts="gradient")
    assert embedded.grad is None


# --- the started model -----------------------------------------------------------------------------------------------


ROUTERS = [("paper", "kmeans"), ("cosine", "kmeans"), ("distance", "kmeans"), ("cosine", "kmeans_balanced")]


@pytest.mark.parametrize(("affinity", "router"), ROUTERS)
def test_a_start_is_kept_in_training_and_by_files(affinity, router, tmp_path):
    model = started(affinity=affinity, init_router=router, warm_start=0.5).train()
    expected = adapter_state(model)
    model(**batch_for("bert", samples=4)).loss.backward()
    assert_same_state(adapter_state(model), expected)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("bert"), tmp_path, is_trainable=True).train()
    again(**batch_for("bert", samples=4)).loss.backward()
    assert_same_state(adapter_state(again), expected)
    with torch.no_grad():
        batch = batch_for("bert")
        assert torch.equal(first_output(again.eval()(**batch)), first_output(model.eval()(**batch)))


@pytest.mark.parametrize(
    ("name", "affinity", "router"), [("clip", *ROUTERS[0]), *(("bert", *pair) for pair in ROUTERS)]
)
def test_without_calibration(name, affinity, router):
    """Experts start as the base model, the router from samples of the first training batch, once."""
    model = unstarted(name, affinity=affinity, init_router=router, init_experts="gradient")
    batch = batch_for(name, samples=6)
    with torch.no_grad():
        assert torch.equal(first_output(model.eval()(**batch)), first_output(build(name)(**batch)))
    assert all(router.awaits_start for layer in layers_of(model) for router in layer.tucka_router.values())
    model.train()(**batch).loss.backward()
    assert not any(router.awaits_start for layer in layers_of(model) for router in layer.tucka_router.values())
    centroids = router_of(model).centroids.clone()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model(**batch_for(name)).loss.backward()
    assert torch.equal(router_of(model).centroids, centroids)


def test_every_tower_gets_its_own_start():
    """Text and images cluster on their own; projections between the towers route by their own input."""
    model = started("clip", init_experts="gradient", target_modules=["q_proj", "text_projection"])
    routers = {layer.dispatcher.name: layer.dispatcher.router("default") for layer in layers_of(model)}
    assert len(routers) == 3
    widths = [router.centroids.shape[1] for router in routers.values()]
    assert sorted(widths) == [48, 64, 64] and all(router.initialised for router in routers.values())
    spaces = [router.centroids for router in routers.values() if router.centroids.shape[1] == 64]
    assert not torch.equal(*spaces)


def test_a_tower_that_saw_nothing_is_left_alone():
    model = unstarted("clip")
    vision = model.get_base_model().vision_model
    images = [{"pixel_values": batch["pixel_values"]} for batch in batches_for("clip")]
    before = adapter_state(model)
    own = tucka.calibration.run_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tucka.initialization, "run_batch", lambda _, batch, device: own(vision, batch, device))
        patch.setattr(tucka.calibration, "run_batch", lambda _, batch, device: own(vision, batch, device))
        tucka.initialize(model, images, progress=False)
    changed = {key for key, value in adapter_state(model).items() if not torch.equal(value, before[key])}
    assert changed and all("vision_model" in key for key in changed)
