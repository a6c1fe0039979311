"""Ranks during training: the tensor lasso, and a schedule that lowers ranks until a budget holds."""

import warnings

import pytest
import tensorly as tl
import torch
from conftest import adapted, adapter_state, assert_same_state, batch_for, build, first_output, plain_config
from peft import PeftModel
from tltorch.tensor_hooks import tensor_lasso
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import tucka
from tucka import ops
from tucka.model import layers_of
from tucka.ranks import adapter_parameters, lasso_penalty, truncate
from tucka.ranks.schedule import RankSchedule

ARCHITECTURES = ["bert", "vit", "gpt2", "llama", "t5"]


def weights_of(model):
    return [w for layer in layers_of(model) for w in layer.tucka_experts["default"].lasso_weights]


def set_weights(model):
    """Any weights, among them zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in weights_of(model):
            weight.copy_(torch.rand(weight.shape, generator=generator))
            weight[-1] = 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_penalty_is_in_the_loss_of_training_alone(name, tmp_path):
    plain = adapted(name, share_factors=True)
    model = tucka.apply(
        build(name), plain_config(r=4, k=3, share_factors=True, lasso=0.5), calibration=[batch_for(name)]
    )
    model.load_state_dict(adapter_state(plain), strict=False)
    batch = batch_for(name)
    for modes in (True, False):
        difference = model.train(modes)(**batch).loss - plain.train(modes)(**batch).loss
        assert float(difference.detach()) == pytest.approx(0.5 if modes else 0.0, abs=1e-5)
    set_weights(model)
    values = torch.cat([weight.flatten() for weight in weights_of(model)])
    assert float(lasso_penalty(model)) == pytest.approx(0.5 * float(values.abs().mean()), rel=1e-6)
    with torch.no_grad():
        expected = first_output(model.eval()(**batch))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_same_state(adapter_state(loaded), adapter_state(model))
    with torch.no_grad():
        assert torch.equal(first_output(loaded(**batch)), expected)


def test_a_training_without_a_loss_to_add_it_to_warns():
    model = tucka.apply(build("bert"), plain_config(lasso=0.5), calibration=[batch_for("bert")]).train()
    unlabelled = {key: value for key, value in batch_for("bert").items() if key != "labels"}
    with pytest.warns(UserWarning, match="returned no loss to add the penalty of lasso"):
        model(**unlabelled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(**unlabelled)


def test_weights_act_as_tensorly_torchs_lasso():
    """The formed tensor and the penalty are those of tltorch's TuckerLasso with the same weights."""
    model = adapted("bert", torch.float64, lasso=0.25, form="additive", tie_factors=False, shared_expert=False)
    set_weights(model)
    experts = layers_of(model)[0].tucka_experts["default"]
    regularizer = tensor_lasso("tucker", penalty=0.25)
    core, factors = ops.scale_core(experts.core, (1, 2, 3), experts.normalize), experts.factors
    parameters = [torch.ones(len(core), dtype=torch.float64), *experts.lasso_weights]
    lassoed = regularizer.apply_lasso(type("T", (), dict(core=core, factors=factors)), parameters)
    with tl.backend_context("pytorch", local_threadsafe=True):
        formed = tl.tucker_to_tensor((lassoed.core, lassoed.factors))
    torch.testing.assert_close(formed, experts.to_tensor())


def test_weights_stay_in_range_and_small_ones_become_zero():
    model = adapted("bert", lasso=1e-3).train()
    first = weights_of(model)[1]
    with torch.no_grad():
        first[0], first[1], first[2], first[3] = 3.0, -0.5, 1e-7, -1e-7
    model(**batch_for("bert")).loss.backward()
    assert first.tolist() == [1.0, -0.5, 0.0, 0.0]
    assert bool(first.grad.isfinite().all()) and first.grad[1] != 0


def test_columns_of_no_weight_are_truncated_away():
    model = adapted("bert", torch.float64, lasso=0.1, normalize="bounded", init_experts="kaiming")
    with torch.no_grad():
        for layer in layers_of(model):
            experts = layer.tucka_experts["default"]
            experts.lasso_input[1:3] = 0
        expected = first_output(model.eval()(**batch_for("bert")))
    report = truncate(model, energy=1.0)
    assert {line.rank for line in report.layers} == {2}
    assert all(bool((weight == 1).all()) for weight in weights_of(model))
    with torch.no_grad():
        torch.testing.assert_close(first_output(model(**batch_for("bert"))), expected, rtol=1e-6, atol=1e-6)


def test_the_lasso_leaves_with_the_adapter_and_is_off_by_default():
    model = adapted("bert", lasso=0.1)
    base = model.unload()
    assert not base._forward_hooks and not base._forward_pre_hooks
    plain = adapted("bert")
    assert not any("lasso" in name for name in plain.state_dict())
    with pytest.raises(ValueError, match="no active adapter has a tensor lasso; set lasso above 0"):
        lasso_penalty(plain)
    with pytest.raises(ValueError, match=r"lasso=-1\.0 is a penalty: it must not be below 0"):
        tucka.TuckAConfig(lasso=-1.0)


def test_lasso_drives_weights_down():
    model = adapted("bert", lasso=5.0).train()
    optimizer = torch.optim.SGD(weights_of(model), 0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch_for("bert")).loss.backward()
        optimizer.step()
    assert float(torch.cat(weights_of(model)).detach().mean()) < 0.97


# --- the schedule ----------------------------------------------------------------------------------------------------


class Texts(Dataset):
    def __init__(self, name):
        batch = batch_for(name, samples=16, **({} if name == "vit" else {"padded": False}))
        self.items = [{key: value[index] for key, value in batch.items()} for index in range(16)]

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return self.items[index]


def trainer(model, tmp_path, schedule, name="bert", **options):
    plain = dict(
        max_steps=8, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    arguments = TrainingArguments(str(tmp_path), **{**plain, **options})
    return Trainer(model, arguments, train_dataset=Texts(name), callbacks=[schedule])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_budget_holds_at_the_end(name, tmp_path):
    model = adapted(name, normalize="bounded", init_experts="kaiming", share_factors=True)
    before = adapter_parameters(model)
    schedule = RankSchedule(int(0.6 * before), start=1, end=6, every=2)
    running = trainer(model, tmp_path, schedule, name)
    running.train()
    assert adapter_parameters(model) <= 0.6 * before
    steps = [step for step, _ in schedule.reports]
    assert steps == sorted(steps) and steps[-1] <= 6
    for parameter, state in running.optimizer.state.items():
        assert all(value.shape == parameter.shape for value in state.values() if value.ndim)
    for layer in layers_of(model):
        core = layer.tucka_experts["default"].core
        found = running.optimizer.optimizer.state[core]
        assert float(found["step"]) == 8 and bool(found["exp_avg_sq"].any())
    model.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(build(name), tmp_path / "saved").eval()
    assert_same_state(adapter_state(loaded), adapter_state(model))


def test_with_gradient_accumulation_and_the_lasso(tmp_path):
    model = adapted("bert", normalize="bounded", init_experts="kaiming", lasso=1e-2)
    schedule = RankSchedule(4000, end=5, every=1)
    trainer(model, tmp_path, schedule, gradient_accumulation_steps=2).train()
    assert adapter_parameters(model) <= 4000


def test_a_run_that_resumes_ends_as_one_that_was_not_interrupted(tmp_path):
    model = adapted("bert", normalize="bounded", init_experts="kaiming", share_factors=True)
    budget = int(0.5 * adapter_parameters(model))
    schedule = RankSchedule(budget, end=7, every=1)
    trainer(model, tmp_path, schedule, save_strategy="steps", save_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    resumed = PeftModel.from_pretrained(build("bert"), checkpoint, is_trainable=True)
    assert budget < adapter_parameters(resumed) < schedule.first
    again = RankSchedule(budget, end=7, every=1)
    trainer(resumed, tmp_path, again).train(resume_from_checkpoint=str(checkpoint))
    assert again.first == schedule.first
    assert [step for step, _ in again.reports] == [step for step, _ in schedule.reports if step > 4]
    assert_same_state(adapter_state(resumed), adapter_state(model))


def test_the_cubic_schedule():
    schedule = RankSchedule(1000, start=2, end=10)
    schedule.first = 9000
    assert [schedule.allowed(step) for step in (0, 2, 6, 10, 50)] == [9000, 9000, 2000, 1000, 1000]


def test_what_cannot_be_scheduled(tmp_path):
    for arguments, message in (
        (dict(budget=0, end=5), "budget=0 is not a whole number of at least 1"),
        (dict(budget=10, end=5, start=5), "end=5 is not a whole number of at least 6"),
        (dict(budget=10, end=5, every=0), "every=0 is not"),
    ):
        with pytest.raises(ValueError, match=message):
            RankSchedule(**arguments)
    with pytest.raises(ValueError, match=r"budget=10 parameters are too few: with rank 1 in every layer it has \d+"):
        trainer(adapted("bert"), tmp_path, RankSchedule(10, end=5)).train()
    with pytest.raises(ValueError, match="normalize=True cannot keep its function at other ranks"):
        trainer(adapted("bert", normalize=True), tmp_path, RankSchedule(5000, end=5)).train()
