"""Reduced precision: what stays in float32, what keeps its dtype, and that nothing turns into NaN."""

import itertools
import random
from contextlib import nullcontext

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import adapted, batch_for, build, first_output, plain_config, randomise, router_of, stored
from peft import PeftModel
from torch import nn

import tucka

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
PRECISIONS = [(SINGLE, None), (SINGLE, BRAIN), (SINGLE, HALF), (BRAIN, None), (HALF, None), (HALF, HALF)]
"""Type of the base model, and of autocast."""


def cast_to(dtype):
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def one_layer(dtype=SINGLE, width=16, outputs=12, calibrate=False, **fields):
    base = nn.Sequential(nn.Linear(width, outputs)).to(dtype)
    batches = [torch.randn(4, 3, width).to(dtype)] if calibrate else None
    return tucka.apply(base, plain_config(**{"r": 4, "k": 3, "target_modules": ["0"], **fields}), calibration=batches)


def experts_of(model):
    return tucka.model.layers_of(model)[0].tucka_experts["default"]


def check_finite(model, output, loss, *others):
    """Everything finite, and adapter weights and gradients in float32."""
    assert output.isfinite().all() and loss.isfinite()
    for name, parameter in model.named_parameters():
        if ".tucka_" in name:
            assert parameter.dtype == SINGLE, name
            assert parameter.grad is None or parameter.grad.dtype == SINGLE, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all(other.isfinite().all() for other in others)


# --- inputs that divide by zero ------------------------------------------------------------------------------------

INPUTS = dict(
    ordinary=lambda: torch.randn(3, 4, 16),
    zero=lambda: torch.zeros(3, 4, 16),
    constant=lambda: torch.ones(3, 4, 16),
    one_zero_sample=lambda: torch.cat([torch.zeros(1, 4, 16), torch.randn(2, 4, 16)]),
    no_sample=lambda: torch.zeros(0, 4, 16),
    no_token=lambda: torch.zeros(2, 0, 16),
    huge=lambda: torch.full((3, 4, 16), 1e4),
)
SETTINGS = dict(
    form=["additive", "multiplicative"], routing=["sample", "batch"], affinity=["paper", "cosine", "distance"],
    pooling=["mean", "mean_std"], normalize=[False, True, "bounded"], t=[1, 2], experts=["zero", "zero core", "random"],
)  # fmt: skip


@pytest.mark.parametrize("base,cast", PRECISIONS, ids=str)
def test_no_nan(base, cast):
    """Every value of every setting, many of their combinations, on inputs and parameters that divide by zero."""
    combinations = list(itertools.product(*SETTINGS.values()))
    for combination in random.Random(0).sample(combinations, 24):
        fields = dict(zip(SETTINGS, combination))
        experts = fields.pop("experts")
        model = one_layer(base, init_experts="kaiming", p=fields["t"], **fields).train()
        tensor = experts_of(model)
        with torch.no_grad():
            for parameter in tensor.parameters() if experts == "zero" else [tensor.core, tensor.shared_core]:
                parameter.mul_(float(experts == "random"))
        for name, make in INPUTS.items():
            model.zero_grad()
            x = make().to(base).requires_grad_()
            with cast_to(cast):
                output = model(x)
            loss = output.float().sum() * 1e-3  # unscaled gradients of large outputs would leave half's range
            loss.backward()
            check_finite(model, output, loss, x.grad)
            assert output.dtype == (cast or base), (name, combination)


@pytest.mark.parametrize("start", ["perturb", "kmeans"])
def test_a_first_batch_without_samples_leaves_the_router_waiting(start):
    model = one_layer(init_router=start, affinity="cosine", init_experts="kaiming").train()
    assert model(torch.zeros(0, 4, 16)).shape == (0, 4, 12) and router_of(model).awaits_start
    output = model(torch.randn(3, 4, 16))
    output.square().mean().backward()
    check_finite(model, output, output.sum(), *router_of(model).state_dict().values())
    assert not router_of(model).awaits_start


@pytest.mark.parametrize("base,cast", PRECISIONS[1:], ids=str)
@pytest.mark.parametrize("name,routing", [("llama", "sample"), ("llama", "batch"), ("bert", "sample")])
def test_a_row_of_padding_alone(name, routing, base, cast):
    fields = dict(form="additive") if routing == "sample" else dict(normalize=True)
    fields = dict(fields, routing=routing, affinity="cosine" if routing == "sample" else "paper")
    targets = ["query", "value", "dense"] if name == "bert" else "all-linear"
    model = adapted(name, base, init_experts="kaiming", target_modules=targets, **fields)
    batch = {key: value.clone() for key, value in batch_for(name).items()}
    batch["attention_mask"][1] = 0
    if name == "llama":
        batch["labels"][1] = -100
    with cast_to(cast):
        output = model.train()(**batch)
    output.loss.backward()
    check_finite(model, first_output(output), output.loss)
    if routing == "sample":
        others = {key: value[[0, 2]] for key, value in batch.items()}
        with cast_to(cast), torch.no_grad():
            expected, found = first_output(model.eval()(**others)), first_output(model(**batch))[[0, 2]]
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


# --- what is computed in which precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_the_update_is_the_one_of_single_precision(dtype, form):
    """Values and gradients, for a base in that precision and under autocast, up to its rounding."""
    x, weights = torch.randn(3, 5, 16).to(dtype), torch.randn(3, 5, 12)
    reference = randomise(one_layer(form=form, t=2, p=2, normalize="bounded", calibrate=True))
    state = reference.state_dict()

    def run(base, cast):
        model = one_layer(base, form=form, t=2, p=2, normalize="bounded", calibrate=True)
        model.load_state_dict({key: value.to(model.state_dict()[key].dtype) for key, value in state.items()})
        with cast_to(cast), tucka.record_routes(model) as routes:
            output = model(x.to(base))
        (output.float() * weights).sum().backward()
        return output, routes[0], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, route, gradients = run(SINGLE, None)
    near = dict(rtol=0, atol=(0.06 if dtype == BRAIN else 0.01) * expected.abs().max().item())
    for base, cast in ((dtype, None), (SINGLE, dtype)):
        output, found, grads = run(base, cast)
        assert output.dtype == dtype and torch.equal(found.group, route.group)
        torch.testing.assert_close(output.float(), expected, **near)
        assert grads.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (grads[name] - gradient).norm() <= (0.03 if dtype == BRAIN else 0.005) * gradient.norm(), name


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
@pytest.mark.parametrize("cast", [False, True], ids=["half base", "half autocast"])
def test_large_activations_stay_in_the_range_of_half_precision(form, cast):
    """x U alone would leave it, though neither x nor the output comes near: inf times a zero core is NaN."""
    model = one_layer(width=1024, form=form, normalize="bounded", calibrate=True)
    direction = experts_of(model).input_mode.detach()[:, 0]
    x = (direction / direction.abs().max() * 1e4).expand(3, 4, -1)
    assert (x @ direction).abs().max() > 65504
    for core in (0.0, 0.01):
        with torch.no_grad():
            experts_of(model.float()).core.fill_(core)
            expected = model(x)
            layer = tucka.model.layers_of(model)[0].base_layer
            with cast_to(HALF if cast else None):
                output = model(x) if cast else (layer.half(), model(x.half()))[1]
        assert output.dtype == HALF and expected.abs().max() < 2e4
        assert (output.float() - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_autocast_flips_no_route(name, dtype):
    """The router reads in float32 what the layers before it computed in float32."""
    model, batch = adapted(name, t=2, routing="sample").eval(), batch_for(name, samples=8)
    with tucka.record_routes(model) as routes, torch.no_grad():
        model(**batch)
        with torch.autocast("cpu", dtype):
            model(**batch)
    assert routes[1].gates.dtype == SINGLE and routes[0].group.unique().numel() > 1
    for plain, cast in zip(*routes):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_small_gradients_do_not_vanish_from_the_start(dtype):
    """A mean over thousands of tokens, as of a real batch; here a small factor of the loss stands for it."""
    starts = []
    for precision in (SINGLE, dtype):
        model = tucka.apply(
            build("llama", precision),
            plain_config(r=2, k=2, form="additive", init_router="kmeans", init_experts="gradient"),
            calibration=[batch_for("llama", samples=6)],
            loss=lambda output, batch: output.loss * 1e-3,
            progress=False,
        )
        starts.append([layer.tucka_experts["default"].output_mode for layer in tucka.model.layers_of(model)])
    for found, expected in zip(*starts):
        cosines = torch.linalg.svdvals(torch.linalg.qr(found)[0].mT @ torch.linalg.qr(expected)[0])
        assert cosines.min() > 0.95


# --- training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def learner():
    config = tucka.TuckAConfig(r=4, k=2)
    return tucka.apply(build("llama"), config, calibration=[batch_for("llama", samples=6)], progress=False)


def test_gradient_scaling_in_half_precision():
    model, batch = learner().train(), batch_for("llama", samples=6)
    optimizer = torch.optim.AdamW(tucka.param_groups(model, lr=1e-2))
    scaler = torch.amp.GradScaler("cpu")
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", HALF):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        check_finite(model, loss, loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert scaler.get_scale() >= 65536 and losses[-1] < losses[0] - 0.05


def test_the_trainer_in_bfloat16(tmp_path, fresh_accelerator):
    batch = batch_for("llama", samples=6)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(6)]
    model = learner()
    arguments = tf.TrainingArguments(
        str(tmp_path / "run"), use_cpu=True, bf16=True, max_steps=6, learning_rate=1e-2, logging_steps=1,
        per_device_train_batch_size=6, report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = tf.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    assert {value.dtype for value in stored(model).values()} == {SINGLE, torch.bool}
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    with torch.no_grad(), torch.autocast("cpu", BRAIN):
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_accelerate_in_bfloat16(fresh_accelerator):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, batch = learner(), batch_for("llama", samples=6)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(tucka.param_groups(model, lr=1e-2)))
    losses = []
    for _ in range(6):
        with tucka.record_routes(model) as routes:
            output = model(**batch)
        accelerator.backward(output.loss)
        check_finite(model, output.logits, output.loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0] - 0.05 and routes[0].gates.dtype == SINGLE
    assert router_of(model).centroids.dtype == SINGLE
