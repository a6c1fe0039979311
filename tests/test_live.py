"""The TensorBoard callback: what it writes, and that training does not notice it."""

import logging
import random
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import adapted, adapter_state, assert_same_state, batch_for
from test_callbacks import recordings, trainer_of

from analysis import live
from analysis.live import FigureCallback
from tucka.callbacks import BalanceCallback


@pytest.fixture
def tensorboard():
    return pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard: pip install tensorboard")


class Recorder:
    """Stands in for the writer of TensorBoard."""

    def __init__(self):
        self.figures, self.scalars, self.closed = {}, {}, False

    def add_figure(self, tag, figure, step, close):
        assert figure.axes and not close
        self.figures.setdefault(tag, []).append(step)

    def add_scalar(self, tag, value, step):
        self.scalars.setdefault(tag, []).append((step, value))

    def flush(self):
        pass

    def close(self):
        self.closed = True


@pytest.fixture
def recorder(monkeypatch):
    """A stand-in package, so that what is written is seen with or without TensorBoard."""
    recorder = Recorder()
    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = lambda directory: recorder
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return recorder


FROM_WEIGHTS = {f"experts/{name}" for name in live.FROM_WEIGHTS}


def labelled(count=6):
    return {**batch_for("bert", count), "domain": [f"d{index % 2}" for index in range(count)]}


def test_figures_and_loads_at_the_steps_asked_for(recorder, tmp_path):
    model, batch = adapted("bert"), labelled()
    callback = FigureCallback(tmp_path / "board", every=2, calibration=[batch], labels="domain")
    trainer_of(model, tmp_path, [callback], eval_strategy="no").train()
    data = {"experts/movement", "experts/router-map", "experts/flow"}
    assert recorder.figures == {tag: [2, 4, 6] for tag in FROM_WEIGHTS | data} and recorder.closed
    loads = np.array([[value for _, value in recorder.scalars[f"calibration_load/group_{g}"]] for g in range(3)])
    assert loads.shape == (3, 3) and loads.sum(0) == pytest.approx(1)


def test_after_evaluations_and_from_weights_alone(recorder, tmp_path):
    trainer_of(adapted("bert"), tmp_path, [FigureCallback(tmp_path / "board")]).train()
    assert recorder.figures == {tag: [3, 6] for tag in FROM_WEIGHTS} and recorder.scalars == {}


def test_towers_are_told_apart(recorder, tmp_path):
    model = adapted("clip")
    callback = FigureCallback(tmp_path, calibration=[batch_for("clip", 4)])
    state = tf.TrainerState()
    callback.on_train_begin(None, state, None)
    callback.show(model, 5)
    towers = [tag.removeprefix("experts/router-map/") for tag in recorder.figures if "router-map/" in tag]
    assert len(towers) == 2 and all(f"calibration_load/{tower}/group_0" in recorder.scalars for tower in towers)


def trained(tmp_path, *callbacks, name="bert"):
    """A model with dropout after a training, and the losses on its way."""
    torch.manual_seed(0)
    model = adapted(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    trainer = trainer_of(model, tmp_path, list(callbacks), logging_steps=1)
    trainer.train()
    logs = [
        {k: v for k, v in logs.items() if "runtime" not in k and "per_second" not in k}
        for logs in trainer.state.log_history
    ]
    return model, logs


def test_training_goes_on_as_without_it(recorder, tmp_path):
    plain, expected = trained(tmp_path, BalanceCallback())
    callback = FigureCallback(tmp_path / "board", every=1, calibration=[labelled()], labels="domain")
    shown, found = trained(tmp_path, BalanceCallback(), callback)
    assert recorder.figures and found == expected, "the same losses and the same counted loads"
    assert_same_state(adapter_state(shown), adapter_state(plain))
    assert recordings(shown) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_found(training, recorder, tmp_path):
    model = adapted("bert").train(training)
    batch = labelled()
    model(**{key: value for key, value in batch.items() if key != "domain"}).loss.backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    callback = FigureCallback(tmp_path, calibration=[batch], labels="domain")
    callback.on_train_begin(None, tf.TrainerState(), None)
    callback.show(model, 1)
    assert recorder.figures
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
    assert (np.random.get_state()[1] == drawn[2]).all()
    for name, parameter in model.named_parameters():
        expected = gradients[name]
        assert (parameter.grad is None) == (expected is None)
        assert expected is None or torch.equal(parameter.grad, expected)


def test_what_cannot_be_drawn_is_said_and_skipped(recorder, tmp_path, caplog):
    model = adapted("bert")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "centroids" in name).fill_(torch.nan)
    callback = FigureCallback(tmp_path, calibration=[labelled()])
    callback.on_train_begin(None, tf.TrainerState(), None)
    callback.show(model, 7)
    assert set(recorder.figures) >= FROM_WEIGHTS and "experts/router-map" not in recorder.figures
    assert "figure router-map of step 7 is not logged" in caplog.text


def test_a_wrong_entry_does_not_end_the_training(recorder, tmp_path, caplog):
    callback = FigureCallback(tmp_path, every=3, calibration=[labelled()], labels="genre")
    trainer_of(adapted("bert"), tmp_path, [callback]).train()
    assert "labels='genre' is no entry of the batch" in caplog.text and recorder.figures == {}


def test_without_tensorboard_it_warns_once_and_does_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    callback = FigureCallback(tmp_path / "board", every=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            trainer_of(adapted("bert"), tmp_path, [callback], max_steps=2).train()
    assert caplog.text.count("tensorboard is missing") == 1 and not (tmp_path / "board").exists()


def test_other_processes_run_the_batches_and_write_nothing(recorder, tmp_path, monkeypatch):
    seen = []
    observe = live.observe
    monkeypatch.setattr(live, "observe", lambda *args, **kwargs: seen.append(1) or observe(*args, **kwargs))
    callback = FigureCallback(tmp_path, calibration=[labelled()])
    callback.on_train_begin(None, tf.TrainerState(is_world_process_zero=False), None)
    callback.show(adapted("bert"), 1)
    assert seen == [1] and recorder.figures == {}


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(every=0), "every=0 is not a number of steps"),
        (dict(calibration=iter([])), "can be read once"),
        (dict(labels="domain"), "there are none"),
    ],
)
def test_wrong_options(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        FigureCallback(tmp_path, **options)


def test_tensorboard_reads_what_was_written(tensorboard, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = FigureCallback(tmp_path / "board", every=3, calibration=[labelled()])
    trainer_of(adapted("bert"), tmp_path, [callback], eval_strategy="no").train()
    read = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = read.Tags()
    assert FROM_WEIGHTS | {"experts/movement", "experts/router-map"} == set(tags["images"])
    assert [image.step for image in read.Images("experts/spectra")] == [3, 6]
    assert len(read.Images("experts/core-slices")[0].encoded_image_string) > 2000
    assert sum(read.Scalars(f"calibration_load/group_{g}")[0].value for g in range(3)) == pytest.approx(1)
