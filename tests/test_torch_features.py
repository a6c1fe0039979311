"""What users of torch expect of any module: compile, export, functional calls, copies, pickles, dtypes, state dicts."""

import copy
import io
import pickle
import shutil
import sys

import pytest
import torch
import torch.multiprocessing as mp
import transformers as tf
from conftest import (
    NO_DROPOUT,
    VOCABULARY,
    adapted,
    adapter_state,
    assert_same_state,
    batch_for,
    build,
    first_output,
    plain_config,
    randomise,
    router_of,
    text_batch,
)
from peft import PeftModel
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize

import tucka

SIZES = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40)


def one_block(name="bert", **fields):
    """A model of a single block with a randomised adapter: tracing takes long."""
    if name == "bert":
        config = tf.BertConfig(**SIZES, **NO_DROPOUT, vocab_size=VOCABULARY, max_position_embeddings=32)
        base = tf.BertForSequenceClassification(config)
    else:
        base = tf.ViTForImageClassification(tf.ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1))
    return randomise(tucka.apply(base, plain_config(**{"r": 4, "k": 3, "init_router": "kaiming", **fields}))).eval()


def plain_layers(**fields):
    """Two adapted linear layers and nothing around them."""
    base = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    fields = {"r": 3, "k": 3, "init_router": "kaiming", "target_modules": ["0", "2"], **fields}
    return randomise(tucka.apply(base, plain_config(**fields)))


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients_of(model, call, **batch):
    """Output and gradients of one training step."""
    model.zero_grad()
    output = call(**batch)
    first_output(output).square().mean().backward()
    return first_output(output).detach(), {name: p.grad.clone() for name, p in trained(model).items()}


def assert_alike(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **tolerances, msg=lambda m, key=key: f"{key}: {m}")


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


def test_one_graph_serves_training_at_any_batch_size(dynamo):
    """Without a break (the base model has none either), and without being compiled again."""
    model = one_block(target_modules=["query", "intermediate.dense"]).train()
    run = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for samples, positions in ((3, 7), (5, 9), (2, 6)):
        batch = text_batch(samples, positions)
        (found, others), (expected, gradients) = (gradients_of(model, call, **batch) for call in (run, model))
        torch.testing.assert_close(found, expected)
        assert_alike(others, gradients)
    assert dynamo["stats"]["unique_graphs"] == 1 and not dynamo["graph_break"]


def test_batch_routing_of_images_compiles_without_break(dynamo):
    model = one_block("vit", routing="batch", target_modules="all-linear").train()
    run, pixels = torch.compile(model, fullgraph=True, backend="eager"), batch_for("vit")["pixel_values"]
    (expected, gradients), (found, others) = (gradients_of(model, call, pixel_values=pixels) for call in (model, run))
    torch.testing.assert_close(found, expected)
    assert_alike(others, gradients)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductors_code_computes_the_same(dynamo):
    model, x = plain_layers(), torch.randn(3, 5, 6)
    outputs = []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        output = call(x)
        output.square().mean().backward()
        outputs.append({"": output.detach(), **{name: p.grad.clone() for name, p in trained(model).items()}})
    assert_alike(outputs[1], outputs[0])


# --- torch.export ----------------------------------------------------------------------------------------------------


def exported(model, example, dynamic):
    """The exported program of a model that is called with positional tensors."""
    shapes = tuple(dict.fromkeys(range(value.ndim), torch.export.Dim.AUTO) for value in example)
    shapes = {"args": shapes} if isinstance(model, PeftModel) else shapes
    program = torch.export.export(model, tuple(example), dynamic_shapes=shapes if dynamic else None, strict=False)
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    return torch.export.load(saved).module()


@torch.no_grad()
def test_an_exported_model_routes_batches_of_any_size():
    model = one_block(target_modules=["query"])
    program = exported(model, text_batch(3, 7).values(), dynamic=True)
    chosen = set()
    for samples, positions in ((5, 7), (2, 9), (8, 4)):
        batch = text_batch(samples, positions)
        with tucka.record_routes(model) as routes:
            expected = model(**batch).logits
        torch.testing.assert_close(program(*batch.values()).logits, expected)
        chosen |= set(routes[0].group.tolist())
    assert len(chosen) > 1


@torch.no_grad()
def test_a_merged_and_a_pinned_model_export():
    model, batch = one_block(target_modules=["query"]), text_batch(3)
    with tucka.pin_route(model, tucka.Route(torch.tensor([1]), torch.ones(1, 2))):
        pinned, expected = exported(model, batch.values(), dynamic=False), model(**batch).logits
    torch.testing.assert_close(pinned(*batch.values()).logits, expected)
    merged = model.merge_and_unload(route=1)
    program = exported(merged, batch.values(), dynamic=False)
    torch.testing.assert_close(program(*batch.values()).logits, merged(**batch).logits)


# --- torch.func ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_factors", [False, True])
def test_functional_calls_with_other_parameters(share_factors):
    model, batch = adapted("bert", share_factors=share_factors).train(), batch_for("bert")
    model(**batch).loss.backward()
    expected = {name: p.grad for name, p in trained(model).items()}
    held = {name: p.detach() for name, p in trained(model).items()}
    found = grad(lambda parameters: functional_call(model, parameters, (), batch).loss)(held)
    assert_alike(found, expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained(other).values():
            parameter.mul_(1.5)
        found = functional_call(model, {name: 1.5 * value for name, value in held.items()}, (), batch)
        torch.testing.assert_close(found.logits, other(**batch).logits)
        assert not torch.equal(found.logits, model(**batch).logits)


def test_gradients_of_every_sample_by_vmap():
    """Of layers alone: transformers' own masking does not trace under vmap."""
    model, x = plain_layers(), torch.randn(4, 6)
    held = {name: p.detach() for name, p in trained(model).items()}

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample.unsqueeze(0),)).square().mean()

    every = vmap(grad(loss), in_dims=(None, 0))(held, x)
    assert_alike({name: value[2] for name, value in every.items()}, grad(loss)(held, x[2]), rtol=1e-4, atol=1e-5)


# --- copies ----------------------------------------------------------------------------------------------------------


COPIES = dict(
    deepcopy=copy.deepcopy,
    pickle=lambda model: pickle.loads(pickle.dumps(model)),
    torch_save=lambda model: torch.load(_saved(model), weights_only=False),
)


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("name", "how"),
    [("t5", "deepcopy"), ("deberta", "deepcopy"), ("clip", "deepcopy"), ("deberta", "pickle"), ("clip", "pickle"),
     ("t5", "torch_save")],
)  # fmt: skip
def test_a_copy_is_whole_and_alone(name, how):
    model, batch = adapted(name, share_factors=True).eval(), batch_for(name)
    with torch.no_grad():
        expected = first_output(model(**batch))
    other = COPIES[how](model)
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    with torch.no_grad(), tucka.record_routes(other) as routes:
        torch.testing.assert_close(first_output(other(**batch)), expected, rtol=0, atol=0)
    assert all(routes.values()) if isinstance(routes, dict) else routes
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
        assert torch.equal(first_output(model(**batch)), expected)
    other.train()(**batch).loss.backward()
    assert not any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_generates_by_its_own_prompts_route(how):
    model, prompt = adapted("llama").eval(), text_batch(2, left=True)
    other = COPIES[how](model)
    options = dict(max_new_tokens=4, do_sample=False)
    with tucka.record_routes(other) as routes:
        found = other.generate(**prompt, **options)
    assert torch.equal(found, model.generate(**prompt, **options))
    assert len(routes) == 4 and len({tuple(route.group.tolist()) for route in routes}) == 1


def test_an_average_of_models():
    model, batch = adapted("bert").eval(), batch_for("bert")
    average = torch.optim.swa_utils.AveragedModel(model)
    first = {name: p.detach().clone() for name, p in trained(model).items()}
    for scale in (0.0, 0.3):
        average.update_parameters(randomise(model, scale))
    mean = {name: (first[name] + p.detach()) / 2 for name, p in trained(model).items()}
    assert_alike({name: average.module.get_parameter(name).detach() for name in mean}, mean)
    with torch.no_grad():
        torch.testing.assert_close(average(**batch).logits, functional_call(model, mean, (), batch).logits)


def _run_in_process(index, model, batch, found):
    with torch.no_grad(), tucka.record_routes(model) as routes:
        found.copy_(model(**batch).logits)
    assert len(routes) == 1


def test_a_model_is_sent_to_another_process():
    model, batch = adapted("bert").eval(), batch_for("bert")
    found = torch.zeros(3, 2).share_memory_()
    mp.spawn(_run_in_process, (model, batch, found), nprocs=1)
    with torch.no_grad():
        torch.testing.assert_close(found, model(**batch).logits)


# --- dtypes and devices ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "dtype", "tolerance"),
    [
        (lambda model: model.to(torch.bfloat16), torch.bfloat16, 3e-2),
        (lambda model: model.half(), torch.float16, 3e-3),
        (lambda model: model.double(), torch.float64, 1e-6),
    ],
    ids=["bfloat16", "half", "double"],
)
@pytest.mark.parametrize("normalize", [False, "bounded"])
def test_another_dtype(change, dtype, tolerance, normalize):
    fields = dict(affinity="cosine", init_router="kmeans", t=1, normalize=normalize)
    model, batch = adapted("bert", **fields).eval(), batch_for("bert")
    with torch.no_grad(), tucka.record_routes(model) as routes:
        expected = model(**batch).logits
        changed = change(model)(**batch).logits
    assert changed.dtype == dtype and routes[1].scores.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(routes[1].group, routes[0].group)
    torch.testing.assert_close(changed.double(), expected.double(), rtol=0, atol=tolerance)
    model.train()(**batch).loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in trained(model).values())


def test_to_the_meta_device_and_back():
    model, x = plain_layers(balance_bias=True).eval(), torch.randn(3, 5, 6)
    expected, state = model(x).detach(), copy.deepcopy(model.state_dict())
    assert all(value.is_meta for value in model.to("meta").state_dict().values())
    emptied = copy.deepcopy(model).to_empty(device="cpu")
    emptied.load_state_dict(state)
    model.load_state_dict(state, assign=True)
    for each in (emptied, model):
        assert torch.equal(each(x), expected)


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [dict(), dict(share_factors=True, trainable="core", lasso=0.1)], ids=["plain", "held"]
)
def test_a_state_dict_goes_round_whole(fields):
    model, batch = adapted("bert", **fields).eval(), batch_for("bert")
    state = torch.load(_saved(model.state_dict()), weights_only=True)
    other = tucka.apply(build("bert", seed=5), plain_config(r=4, k=3, **fields)).eval()
    assert router_of(other).awaits_start
    assert str(other.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert not router_of(other).awaits_start
    assert_same_state(adapter_state(other), adapter_state(model))
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, model(**batch).logits)
    state.pop(next(key for key in state if key.endswith(".core")))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state, strict=True)


def test_parameters_are_plain():
    """Neither parametrised nor subclassed nor registered twice, so that whatever walks parameters can."""
    model = adapted("bert", share_factors=True, normalize="bounded")
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    held = list(model.named_parameters(remove_duplicate=False))
    assert len({id(parameter) for _, parameter in held}) == len(held)
    assert all(type(parameter) is torch.nn.Parameter for parameter in trained(model).values())
    vector = torch.nn.utils.parameters_to_vector(trained(model).values())
    torch.nn.utils.vector_to_parameters(2 * vector, trained(model).values())
    assert torch.equal(torch.nn.utils.parameters_to_vector(trained(model).values()), 2 * vector)


# --- optimiser groups ------------------------------------------------------------------------------------------------


def test_groups_hold_every_parameter_once_and_drive_the_trainer(tmp_path):
    model = tucka.apply(build("bert"), plain_config(r=4, lasso=1e-3, task_type="SEQ_CLS", init_router="kaiming"))
    groups = tucka.param_groups(
        model, 1e-2, core_lr=1e-1, expert_lr=0.0, factor_lr=1e-3, router_lr=0.0, weight_decay=0.1
    )
    held = [name for group in groups for name in group["parameter_names"]]
    assert sorted(held) == sorted(trained(model)) and len(held) == len(set(held))
    kinds = {group["name"]: {name.rsplit(".", 1)[1] for name in group["parameter_names"]} for group in groups}
    assert kinds["expert_factor"] == {"expert_factor"} and kinds["cores"] == {"core", "shared_core"}
    assert kinds["factors"] == {"input_factor", "lasso_expert", "lasso_input"} and kinds["router"] == {"centroids"}
    before = copy.deepcopy(model.state_dict())
    batch = batch_for("bert", samples=4)
    args = tf.TrainingArguments(str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
    data = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    optimizer = torch.optim.AdamW(groups)
    tf.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()
    moved = {
        name.rsplit(".", 1)[1] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved >= {"core", "input_factor", "weight"} and not moved & {"expert_factor", "centroids"}
