"""The Trainer callback: what it logs against a direct count, and what stays when training ends early."""

import math

import pytest
import torch
import transformers as tf
from conftest import VOCABULARY, adapted, batch_for

import tucka
from tucka.callbacks import BalanceCallback, load_metrics


def examples(count):
    generator = torch.Generator().manual_seed(count)
    rows = torch.randint(3, VOCABULARY, (count, 7), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": i % 2} for i, row in enumerate(rows)]


def trainer_of(model, directory, callbacks, **options):
    options = {"max_steps": 6, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, **options}
    sizes = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=0.05)
    args = tf.TrainingArguments(
        str(directory), **sizes, **options, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    return tf.Trainer(model, args, train_dataset=examples(24), eval_dataset=examples(10), callbacks=callbacks)


def recordings(model):
    """What holds on to the routes of a model's towers."""
    return [entry for layer in tucka.model.layers_of(model) for entry in layer.dispatcher.current.recordings]


def expected_metrics(groups, count, prefix):
    """The logged numbers from the groups that the units of a phase chose, by the formulas."""
    share = [groups.count(group) / len(groups) for group in range(count)]
    entropy = -sum(s * math.log(s) for s in share if s) / math.log(count)
    deviation = math.sqrt(sum((s * count - 1) ** 2 for s in share) / count)
    names = {"max_violation": max(share) * count - 1, "entropy": entropy, "cv": deviation, "units": len(groups)}
    names.update({f"group_{group}": share[group] for group in range(count)})
    return {f"{prefix}/{name}": value for name, value in names.items()}


class Direct(tf.TrainerCallback):
    """Collects the groups of every forward in plain lists, and at each log what they come to."""

    def __init__(self, model):
        self.model, self.units, self.found = model, {True: [], False: []}, []

    def append(self, route):
        self.units[self.model.training].extend(route.group.tolist())

    def on_log(self, args, state, control, logs=None, **kwargs):
        expected = {}
        for training, prefix in ((True, "load"), (False, "eval_load")):
            if self.units[training]:
                expected.update(expected_metrics(self.units[training], 3, prefix))
        self.found.append(expected)
        self.units = {True: [], False: []}


def only_loads(logs):
    return {key: value for key, value in logs.items() if "load/" in key}


@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_the_log_holds_what_a_direct_count_gives(tmp_path, routing):
    model = adapted("bert", routing=routing)
    direct, callback = Direct(model), BalanceCallback()
    trainer = trainer_of(model, tmp_path, [direct, callback])
    dispatcher = tucka.model.layers_of(model)[0].dispatcher
    with dispatcher.recording("default", direct):
        trainer.train()
    logged = [only_loads(logs) for logs in trainer.state.log_history]
    assert len(logged) == len(direct.found) == 6
    for found, expected in zip(logged, direct.found):
        assert found == pytest.approx(expected, abs=1e-6)
    steps = {"loss": "load", "eval_loss": "eval_load"}
    for logs in trainer.state.log_history:
        for loss, prefix in steps.items():
            assert loss not in logs or f"{prefix}/entropy" in logs
    units = [logs.get("load/units", 0) for logs in trainer.state.log_history]
    assert sum(units) == (24 if routing == "sample" else 6), "no forward is lost or counted twice"
    assert recordings(model) == []


def test_a_reporter_sees_the_load_when_the_callback_comes_first(tmp_path):
    class Reporter(tf.TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen = (*self.seen, dict(logs))

    reporter, callback = Reporter(), BalanceCallback()
    trainer = trainer_of(adapted("bert"), tmp_path, [reporter])
    callback.add_to(trainer)
    callback.add_to(trainer)
    assert [each for each in trainer.callback_handler.callbacks if each is callback] == [callback]
    output = trainer.train()
    assert all(
        "load/entropy" in logs or "eval_load/entropy" in logs for logs in reporter.seen if "train_loss" not in logs
    )
    assert [only_loads(logs) for logs in reporter.seen] == [only_loads(logs) for logs in trainer.state.log_history]
    assert only_loads(output.metrics) == only_loads(trainer.state.log_history[-1])


def test_several_evaluation_sets(tmp_path):
    model = adapted("bert")
    trainer = trainer_of(model, tmp_path, [BalanceCallback()], max_steps=3, logging_steps=3)
    trainer.eval_dataset = {"short": examples(5), "long": examples(9)}
    trainer.train()
    found = {key: value for logs in trainer.state.log_history for key, value in logs.items() if key.endswith("/units")}
    assert found == {"load/units": 12, "eval_short_load/units": 5, "eval_long_load/units": 9}


def test_towers_are_told_apart():
    model, callback = adapted("clip").train(), BalanceCallback()
    state, logs = tf.TrainerState(), {}
    callback.on_train_begin(None, state, None, model=model)
    model(**batch_for("clip", samples=5))
    callback.on_log(None, state, None, logs=logs)
    assert logs["load/text_model/units"] == logs["load/vision_model/units"] == 5
    callback.on_train_end(None, state, None)
    assert recordings(model) == []


class Interrupt(tf.TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def test_a_training_that_raised_leaves_nothing_doubled(tmp_path):
    model, callback, interrupt = adapted("bert"), BalanceCallback(), Interrupt(3)
    trainer = trainer_of(model, tmp_path, [callback, interrupt], eval_strategy="no", logging_steps=6)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert int(callback.loads[""].training.load().units) == 12, "what was counted can still be read"
    interrupt.at = -1
    for _ in range(2):
        trainer.train()
        assert trainer.state.log_history[0]["load/units"] == 24
    assert recordings(model) == []


def test_stop_and_recordings_of_others(tmp_path):
    """The callback ends its own recording alone, in whatever order recordings end."""
    model, callback = adapted("bert"), BalanceCallback()
    trainer = trainer_of(model, tmp_path, [callback, Interrupt(1)], eval_strategy="no")
    with tucka.record_routes(model) as routes:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        callback.stop()
        callback.stop()
        assert len(routes) == 1 and all(to is routes for _, to in recordings(model))
    trainer.callback_handler.callbacks.pop(-2)
    with pytest.raises(KeyboardInterrupt), tucka.record_routes(model):
        trainer_of(model, tmp_path, [callback, Interrupt(1)]).train()
    callback.stop()
    assert recordings(model) == []


def test_one_callback_for_two_models(tmp_path):
    first, second, callback = adapted("bert"), adapted("bert", k=4), BalanceCallback()
    for model, groups in ((first, 3), (second, 4)):
        trainer = trainer_of(model, tmp_path, [callback], eval_strategy="no")
        trainer.train()
        shares = [key for key in trainer.state.log_history[0] if "load/group_" in key]
        assert len(shares) == groups and recordings(model) == []


def test_a_collapsed_model_is_revived_in_training(tmp_path):
    model = adapted("bert", affinity="distance", init_router="perturb", k=3)
    router = next(r for layer in tucka.model.layers_of(model) for r in layer.tucka_router.values())
    with torch.no_grad():
        router.centroids.view(3, 2, -1)[1:] += 100
    calibration = [
        {key: torch.stack([torch.as_tensor(row[key]) for row in examples(24)]) for key in ("input_ids", "labels")}
    ]
    callback = BalanceCallback(revive_every=4, calibration=calibration, threshold=0.2)
    trainer = trainer_of(model, tmp_path, [callback], eval_strategy="no", max_steps=8)
    trainer.train()
    logs = {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}
    assert logs[2]["load/max_violation"] == 2 and logs[2]["load/revived"] == 0
    assert logs[4]["load/revived"] == 2 and logs[4]["load/units"] == 8, "the calibration counts for no load"
    assert logs[6]["load/max_violation"] < 2 and logs[6]["load/revived"] == 0
    assert [step for step, _ in callback.revivals] == [4, 8]
    assert [dead for dead, _ in callback.revivals[0][1][""].pairs] == [1, 2]


def test_an_empty_load_has_no_metrics():
    assert load_metrics(tucka.balance.LoadMeter(3, 2).load()) == {}


def test_what_cannot_be_built():
    with pytest.raises(ValueError, match="revive_every=0 is not a number of steps of at least 1"):
        BalanceCallback(revive_every=0, calibration=[])
    with pytest.raises(ValueError, match="revive_every=5 needs calibration batches to split the busiest group by"):
        BalanceCallback(revive_every=5)
    with pytest.raises(ValueError, match="calibration is an iterator, which can be read once"):
        BalanceCallback(revive_every=5, calibration=iter([]))
