"""Training loops of others: resuming bit for bit, the best model, early stopping, accelerate, TRL, and kills."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from conftest import VOCABULARY, assert_same_tensors, build, stored
from kill_steps import exit_code, fork, kill
from peft import PeftModel, load_peft_weights
from torch.utils.data import DataLoader

import tucka
from tucka.callbacks import BalanceCallback
from tucka.resuming import last_checkpoint

CHECKPOINT_FILES = {
    "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "training_args.bin",
}  # fmt: skip


def examples(count):
    """Texts of several lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(4, 10, (count,), generator=generator).tolist()
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    return [{"input_ids": row, "labels": int(row.sum()) % 2} for row in rows]


def collate(rows):
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([r["labels"] for r in rows])}


def model_with_dropout(calibrate=True, seed=0, **fields):
    """The library's defaults on a tiny BERT that drops out."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    base = tf.BertForSequenceClassification(tf.BertConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=32))
    torch.manual_seed(seed)
    config = tucka.TuckAConfig(task_type="SEQ_CLS", **fields)
    return tucka.apply(base, config, calibration=[collate(examples(16))] if calibrate else None, progress=False)


def trainer_of(model, directory, callbacks=(), **options):
    """12 steps in 2 epochs, a checkpoint at every third."""
    defaults = dict(
        num_train_epochs=2, per_device_train_batch_size=4, learning_rate=0.02, logging_steps=1, save_steps=3
    )
    quiet = dict(report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="steps")
    args = tf.TrainingArguments(str(directory), **{**defaults, **quiet, **options})
    data = dict(train_dataset=examples(24), eval_dataset=examples(10), data_collator=collate)
    trainer = tf.Trainer(model, args, **data, callbacks=list(callbacks))
    trainer.remove_callback(tf.PrinterCallback)
    return trainer


def curve(trainer):
    """All that was logged, but for times and what counts only one session."""
    session = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")
    return [{key: value for key, value in row.items() if key not in session} for row in trainer.state.log_history]


def whole_state(trainer):
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


# --- resuming ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A training of the library's defaults that was never interrupted: its directory, curve and last state."""
    directory = tmp_path_factory.mktemp("run")
    trainer = trainer_of(model_with_dropout(), directory)
    trainer.train()
    assert {path.name for path in (directory / "checkpoint-9").iterdir()} >= CHECKPOINT_FILES
    return directory, curve(trainer), whole_state(trainer)


def assert_ends_alike(resumed, curve_of_whole, state_of_whole):
    assert curve(resumed) == curve_of_whole and len(curve_of_whole) == 13
    assert_same_tensors(whole_state(resumed), state_of_whole)


def test_a_resumed_training_continues_bit_for_bit(whole_run, tmp_path):
    """The model that resumes was built from another seed and never calibrated: all is in the checkpoint."""
    directory, *expected = whole_run
    resumed = trainer_of(model_with_dropout(False, seed=5), tmp_path)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-3"))
    assert_ends_alike(resumed, *expected)


def test_a_model_read_from_the_checkpoint_resumes_too(whole_run, tmp_path):
    directory, *expected = whole_run
    base = model_with_dropout(False).unload()
    model = PeftModel.from_pretrained(base, directory / "checkpoint-9", is_trainable=True)
    resumed = trainer_of(model, tmp_path)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-9"))
    assert_ends_alike(resumed, *expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"balance_bias": True, "balance_rate": 0.05, "t": 2, "p": 2},
        {"k": 8, "init_router": "kmeans_balanced", "trainable": "core", "share_factors": False, "lasso": 0.1},
    ],
)
def test_what_moves_beside_the_optimiser_is_resumed(fields, tmp_path):
    """A router that starts in the first batch, a balancing bias, revived groups, the loads in the log."""

    def trainer(seed):
        revive = BalanceCallback(revive_every=4, calibration=[collate(examples(24))], threshold=0.6)
        return trainer_of(model_with_dropout(False, seed, **fields), tmp_path, [revive])

    whole = trainer(seed=0)
    whole.train()
    assert sum(row.get("load/revived", 0) for row in curve(whole)) > 0
    resumed = trainer(seed=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_ends_alike(resumed, curve(whole), whole_state(whole))


# --- killed ------------------------------------------------------------------------------------------------------


def kill_while_it_saves(child, run, rng):
    """Kill a training within moments of its beginning to write one of its next two checkpoints."""
    begun = [int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")]
    awaited = run / f"checkpoint-{max(begun, default=0) + rng.randint(1, 2)}"
    deadline = time.monotonic() + 120
    while not awaited.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02))
    assert kill(child) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork") or torch.cuda.is_available(), reason="forks processes that train on CPU")
def test_a_training_that_is_killed_ends_as_if_it_had_not_been(tmp_path):
    def train(run):
        trainer = trainer_of(model_with_dropout(False), run, save_steps=1, save_total_limit=3, max_steps=8)
        trainer.train(resume_from_checkpoint=last_checkpoint(run))
        trainer.save_model(str(run / "result"))
        (run / "curve.json").write_text(json.dumps(curve(trainer)))

    rng, whole, killed, resumed_from = random.Random(1), tmp_path / "whole", tmp_path / "killed", []
    assert exit_code(fork(lambda: train(whole))) == 0
    for _ in range(3):
        kill_while_it_saves(fork(lambda: train(killed)), killed, rng)
        resumed_from.append(last_checkpoint(killed))
    assert exit_code(fork(lambda: train(killed))) == 0
    assert any(resumed_from), "it was resumed, not started anew each time"
    results = [load_peft_weights(run / "result", device="cpu") for run in (killed, whole)]
    assert_same_tensors(*results)
    curves = [json.loads((run / "curve.json").read_text()) for run in (killed, whole)]
    assert curves[0] == curves[1] and len(curves[0]) == 9


def cut(path, size=None):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if size is None else size])


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda last: (last / "trainer_state.json").unlink(), "no trainer_state.json"),
        (lambda last: cut(last / "trainer_state.json"), "trainer_state.json cannot be read"),
        (lambda last: cut(last / "adapter_model.safetensors"), "not a whole safetensors file"),
        (lambda last: cut(last / "adapter_model.safetensors", 0), "not a whole safetensors file"),
        (lambda last: (last / "adapter_model.safetensors").unlink(), "no weights"),
        (lambda last: cut(last / "adapter_config.json"), "adapter_config.json cannot be read"),
        (lambda last: cut(last / "optimizer.pt"), "optimizer.pt cannot be read"),
        (lambda last: cut(last / "scheduler.pt", 0), "scheduler.pt cannot be read"),
        (lambda last: cut(last / "rng_state.pth"), "rng_state.pth cannot be read"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(whole_run, damage, told, tmp_path, caplog):
    run = shutil.copytree(whole_run[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-[36]"))
    (run / "checkpoint-best").mkdir()
    (run / "checkpoint-99").write_text("a file")
    assert last_checkpoint(run) == str(run / "checkpoint-12") and not caplog.records
    damage(run / "checkpoint-12")
    assert last_checkpoint(str(run)) == str(run / "checkpoint-9")
    assert "checkpoint-12 is not whole" in caplog.text and told in caplog.text
    shutil.rmtree(run / "checkpoint-9")
    assert last_checkpoint(run) is None and last_checkpoint(tmp_path / "missing") is None


# --- the best model ----------------------------------------------------------------------------------------------


def scored(model, directory, scores, callbacks=(), **options):
    """A Trainer whose evaluations, every third step, are scored in turn."""
    turn = iter(scores)
    trainer = trainer_of(
        model, directory, callbacks, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True, **options,
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {"score": next(turn)}
    return trainer


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = model_with_dropout(False, balance_bias=True)
    trainer = scored(model, tmp_path, [1.0, 3.0, 2.0, 2.5], save_total_limit=2)
    trainer.train()
    assert trainer.state.global_step == 12 and Path(trainer.state.best_model_checkpoint).name == "checkpoint-6"
    best, last = (load_peft_weights(tmp_path / f"checkpoint-{step}", device="cpu") for step in (6, 12))
    assert_same_tensors(stored(model), best)
    assert any(not torch.equal(best[key], last[key]) for key in best)
    before = stored(model)
    model.train()(**collate(examples(4)))
    changed = {key.rpartition(".")[2] for key, value in stored(model).items() if not torch.equal(value, before[key])}
    assert changed <= {"balance_bias"}, "the router it loaded does not start again"


def test_early_stopping_goes_on_counting_after_a_resumption(tmp_path):
    def trainer(scores, seed):
        stopping = tf.EarlyStoppingCallback(early_stopping_patience=2)
        options = dict(num_train_epochs=4, restore_callback_states_from_checkpoint=True)
        return scored(model_with_dropout(False, seed), tmp_path, scores, [stopping], **options)

    whole, resumed = trainer([3.0, 4.0, 2.0, 1.0, 9.0], seed=0), trainer([1.0, 9.0], seed=5)
    whole.train()
    assert whole.state.global_step == 12
    assert_same_tensors(stored(whole.model), load_peft_weights(tmp_path / "checkpoint-6", device="cpu"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert resumed.state.global_step == 12
    assert_same_tensors(stored(resumed.model), stored(whole.model))


# --- other loops -------------------------------------------------------------------------------------------------


def prepared(seed):
    """A model, its optimiser, schedule and loader in accelerate's hands."""
    accelerator = Accelerator(cpu=True)
    model = model_with_dropout(False, seed=seed, balance_bias=True)
    optimizer = torch.optim.AdamW(tucka.param_groups(model, lr=0.02))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    loader = DataLoader(examples(24), batch_size=4, collate_fn=collate)
    return accelerator, *accelerator.prepare(model, optimizer, schedule, loader)


def losses_of(accelerator, model, optimizer, schedule, loader):
    found = []
    for batch in loader:
        loss = model.train()(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_accelerate_puts_a_state_back_bit_for_bit(tmp_path):
    accelerator, model, *others = prepared(seed=0)
    before = losses_of(accelerator, model, *others)
    accelerator.save_state(tmp_path)
    after = losses_of(accelerator, model, *others)
    assert before != after
    fresh, copy, *others = prepared(seed=5)
    fresh.load_state(tmp_path)
    assert losses_of(fresh, copy, *others) == after
    assert_same_tensors(copy.state_dict(), model.state_dict())
    tucka.saving.save(fresh.unwrap_model(copy), tmp_path / "adapter")
    assert_same_tensors(load_peft_weights(tmp_path / "adapter", device="cpu"), stored(model))


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_trainer_of_trl(wrapped, tmp_path):
    """`SFTTrainer` with an adapted model, and with a base model and a configuration."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rng = random.Random(0)
    rows = [[" ".join(f"w{rng.randrange(40)}" for _ in range(3 + i % 3)) for _ in range(2)] for i in range(16)]
    data = Dataset.from_list([{"prompt": f"{prompt} ", "completion": answer} for prompt, answer in rows])
    sizes = dict(max_steps=6, per_device_train_batch_size=4, learning_rate=0.02, logging_steps=1, save_steps=3)
    quiet = dict(report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, dataloader_pin_memory=False)

    def trainer(seed):
        base, config = build("llama"), tucka.TuckAConfig(r=8, task_type="CAUSAL_LM")
        torch.manual_seed(seed)
        choice = dict(model=tucka.apply(base, config)) if wrapped else dict(model=base, peft_config=config)
        arguments = trl.SFTConfig(str(tmp_path), **sizes, **quiet)
        made = trl.SFTTrainer(**choice, args=arguments, train_dataset=data, processing_class=word_tokenizer())
        made.remove_callback(tf.PrinterCallback)
        return made

    whole = trainer(seed=0)
    with tucka.record_routes(whole.model) as routes:
        whole.train()
    assert {route.group.shape for route in routes} == {(4,)}, "each sample has its route"
    resumed = trainer(seed=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.log_history[0]["loss"] == whole.state.log_history[0]["loss"]
    assert [row["loss"] for row in curve(resumed) if "loss" in row] == [
        row["loss"] for row in curve(whole) if "loss" in row
    ]
    assert_same_tensors(stored(resumed.model), stored(whole.model))
    whole.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    assert_same_tensors(stored(loaded), stored(whole.model))
