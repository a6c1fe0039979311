"""The adapter on eight architectures: identity start, training, saving, switching, generation, towers, precision."""

import pytest
import torch
import transformers as tf
from conftest import (
    ARCHITECTURES,
    EOS,
    adapted,
    assert_same_tensors,
    batch_for,
    build,
    first_output,
    plain_config,
    randomise,
    stored,
    text_batch,
)
from peft import PeftModel, get_peft_model

import tucka

HEADS = {"bert": "classifier", "deberta": "classifier", "vit": "classifier"}
"""Heads that the default configuration trains beside the adapter."""

GENERATORS = ["gpt2", "llama", "t5", "bart"]
CONFIGS = {"default": None, "all-linear": dict(r=4, target_modules="all-linear")}
OTHER = dict(r=2, k=2, t=3, p=1, alpha=2.0, routing="batch", pooling="mean", shared_expert=False)
"""An adapter that differs from the default one in every size."""

every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def wrapped(name, fields=None, seed=0, **options):
    """A tiny model with an adapter at its start."""
    torch.manual_seed(seed)
    return tucka.apply(build(name), None if fields is None else plain_config(**fields), **options)


def outputs(model, batch):
    with torch.no_grad():
        return first_output(model(**batch))


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestStart:
    """Before the first step the adapted model is the base model, and can leave it."""

    @every_architecture
    @pytest.mark.parametrize("config", CONFIGS)
    def test_forward_equals_the_base_bit_for_bit(self, name, config):
        base, model, batch = build(name), wrapped(name, CONFIGS[config]).eval(), batch_for(name)
        assert torch.equal(outputs(model, batch), outputs(base, batch))
        base.train(), model.train()  # the first forward that can train also starts the router
        assert torch.equal(model(**batch).loss, base(**batch).loss)

    @every_architecture
    @pytest.mark.parametrize("config", CONFIGS)
    def test_backward_reaches_the_cores_first_and_then_everything(self, name, config):
        model, batch = wrapped(name, CONFIGS[config]).train(), batch_for(name)
        model(**batch).loss.backward()
        head = HEADS.get(name) if config == "default" else None
        moved = {key for key, p in trainable(model).items() if p.grad.any()}
        expected = {key for key in trainable(model) if key.endswith("core") or (head and f".{head}." in key)}
        assert moved == expected and any(key.endswith(".core") for key in moved)

        randomise(model).zero_grad()
        model(**batch).loss.backward()
        # The expert factor of one expert is a single number, and divided by its norm a sign.
        parameters = {key: p for key, p in trainable(model).items() if p.numel() > 1}
        still = [key for key, p in parameters.items() if p.grad is None or not p.grad.any()]
        assert not still
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    @every_architecture
    def test_only_the_adapter_and_the_head_train(self, name):
        model = wrapped(name)
        head = HEADS.get(name)
        assert all(".tucka_" in key or (head and f".{head}.modules_to_save." in key) for key in trainable(model))
        assert any(head and f".{head}." in key for key in trainable(model)) == (head is not None)


class Overfit:
    """Runs of transformers' Trainer on a tiny data set that lives in memory."""

    def __init__(self, name, directory, samples=8, **arguments):
        batch = batch_for(name, samples)
        self.extra = {key: batch.pop(key) for key in list(batch) if not isinstance(batch[key], torch.Tensor)}
        self.rows = [{key: value[row] for key, value in batch.items()} for row in range(samples)]
        defaults = dict(max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2)
        quiet = dict(report_to="none", use_cpu=True, disable_tqdm=True, log_level="error")
        self.arguments = {**defaults, **quiet, **arguments, "output_dir": str(directory)}

    def collate(self, rows):
        return {**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}, **self.extra}

    def run(self, model, resume=None):
        arguments = tf.TrainingArguments(**self.arguments)
        trainer = tf.Trainer(model, arguments, train_dataset=self.rows, data_collator=self.collate)
        trainer.train(resume_from_checkpoint=resume)
        return trainer


class TestTrainer:
    """transformers' Trainer: checkpoints, resuming, learning."""

    @every_architecture
    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, name, tmp_path):
        self.check(name, None, tmp_path)

    @pytest.mark.parametrize(
        "fields",
        [
            dict(trainable="core", share_factors=True),
            dict(balance_bias=True, balance_rate=0.1, routing="batch"),
            dict(bias="tucka_only", tie_factors=False),
        ],
        ids=lambda fields: "-".join(fields),
    )
    def test_so_does_one_with_other_tensors_to_save(self, fields, tmp_path):
        self.check("bert", dict(r=4, target_modules=["query", "value"], **fields), tmp_path)

    def check(self, name, fields, directory):
        whole = wrapped(name, fields)
        start = stored(whole)
        Overfit(name, directory).run(whole)
        moved = [key for key, value in stored(whole).items() if not torch.equal(value, start[key])]
        assert any(key.endswith(".core") for key in moved) and any(key.endswith("centroids") for key in moved)

        resumed = wrapped(name, fields, seed=9)  # its random start must not survive
        trainer = Overfit(name, directory).run(resumed, resume=str(directory / "checkpoint-2"))
        assert trainer.state.global_step == 4
        assert_same_tensors(stored(resumed), stored(whole))
        batch = batch_for(name)
        assert torch.equal(outputs(resumed.eval(), batch), outputs(whole.eval(), batch))

    @pytest.mark.parametrize("name", ["t5", "clip"])
    def test_the_loss_goes_down_while_the_base_stays(self, name, tmp_path):
        model, base = wrapped(name, dict(r=8, target_modules="all-linear")), build(name)
        trainer = Overfit(name, tmp_path, samples=4, max_steps=40, save_strategy="no", learning_rate=3e-2).run(model)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 40 and losses[-1] < 0.5 * losses[0]
        unwrapped = model.unload().state_dict()
        assert_same_tensors(unwrapped, base.state_dict())

    @pytest.mark.parametrize("name", ["llama", "t5"])
    def test_checkpointed_blocks_learn_the_same(self, name, tmp_path):
        found = []
        for checkpointing in (False, True):
            model = wrapped(name, dict(r=4, target_modules="all-linear"))
            Overfit(name, tmp_path, save_strategy="no", gradient_checkpointing=checkpointing).run(model)
            found.append(stored(model))
        for key, value in found[0].items():
            torch.testing.assert_close(found[1][key], value, msg=lambda text, key=key: f"{key}: {text}")

    def test_the_best_checkpoint_comes_back_at_the_end(self, tmp_path):
        model = wrapped("bert")
        run = Overfit("bert", tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
        run.arguments.update(
            metric_for_best_model="eval_loss", greater_is_better=True
        )  # the loss falls: the first wins
        arguments = tf.TrainingArguments(**run.arguments)
        trainer = tf.Trainer(model, arguments, train_dataset=run.rows, eval_dataset=run.rows, data_collator=run.collate)
        trainer.train()
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
        best = PeftModel.from_pretrained(build("bert"), tmp_path / "checkpoint-2")
        last = PeftModel.from_pretrained(build("bert"), tmp_path / "checkpoint-4")
        assert_same_tensors(stored(model), stored(best))
        assert any(not torch.equal(value, stored(last)[key]) for key, value in stored(best).items())


class TestSaving:
    """save_pretrained and from_pretrained on a fresh copy of the base."""

    @every_architecture
    @pytest.mark.parametrize("fields", [{}, dict(form="additive", share_factors=True)])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_every_tensor_and_the_outputs_come_back(self, name, fields, low_cpu_mem_usage, tmp_path):
        model, batch = adapted(name, **fields).eval(), batch_for(name)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(name), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert_same_tensors(stored(loaded), stored(model))
        assert all(tensor.device.type == "cpu" for tensor in loaded.state_dict().values())
        assert torch.equal(outputs(loaded, batch), outputs(model, batch))
        assert not torch.equal(outputs(loaded, batch), outputs(build(name), batch))

    @every_architecture
    def test_a_named_adapter_loads_under_another_name(self, name, tmp_path):
        torch.manual_seed(0)
        batch = batch_for(name)
        model = tucka.apply(build(name), calibration=[batch_for(name, samples=8)], adapter_name="first")
        randomise(model).eval().save_pretrained(tmp_path)
        expected = outputs(model, batch)
        second = PeftModel.from_pretrained(build(name), tmp_path / "first", adapter_name="second")
        assert second.active_adapter == "second"
        assert_same_tensors(stored(second, "second"), stored(model, "first"))
        assert torch.equal(outputs(second, batch), expected)
        by_subfolder = PeftModel.from_pretrained(build(name), tmp_path, subfolder="first")
        assert torch.equal(outputs(by_subfolder, batch), expected)

    @every_architecture
    def test_a_loaded_adapter_is_frozen_unless_it_is_to_train(self, name, tmp_path):
        model, batch = adapted(name), batch_for(name)
        model.save_pretrained(tmp_path)
        assert not trainable(PeftModel.from_pretrained(build(name), tmp_path))
        loaded = PeftModel.from_pretrained(build(name), tmp_path, is_trainable=True).train()
        assert trainable(loaded).keys() == trainable(model).keys()
        before = stored(loaded)
        loaded(**batch).loss.backward()  # a trained router must not start again from this batch
        assert_same_tensors(stored(loaded), before)


class TestSwitching:
    """Two adapters of different sizes on one model."""

    def two(self, name):
        model = wrapped(name, dict(r=4, k=3), calibration=[batch_for(name)], adapter_name="one")
        model.add_adapter("two", plain_config(**OTHER))
        tucka.initialize(model, [batch_for(name)], "two")
        for seed, adapter in enumerate(["two", "one"]):
            model.set_adapter(adapter)
            randomise(model, seed=seed)
        return model.eval()

    @every_architecture
    def test_each_adapter_gives_its_own_outputs_again(self, name):
        model, batch, found = self.two(name), batch_for(name), {}
        for adapter in ["one", "two", "one", "two", "two", "one"]:
            model.set_adapter(adapter)
            assert model.active_adapters == [adapter]
            flags = {key: f".{adapter}." in key for key, _ in model.named_parameters() if ".tucka_" in key}
            assert {key: key in trainable(model) for key in flags} == flags
            assert all(".tucka_" in key for key in trainable(model))
            assert torch.equal(found.setdefault(adapter, outputs(model, batch)), outputs(model, batch))
        assert not torch.equal(found["one"], found["two"])
        model.delete_adapter("two")
        assert list(model.peft_config) == ["one"] and not any(".two." in key for key in model.state_dict())
        assert torch.equal(outputs(model, batch), found["one"])

    @every_architecture
    def test_an_adapter_beside_it_changes_nothing(self, name):
        model, batch = self.two(name), batch_for(name)
        model.set_adapter("two")
        torch.manual_seed(0)
        alone = tucka.apply(build(name), plain_config(**OTHER), adapter_name="two").eval()
        alone.load_state_dict({key: value for key, value in model.state_dict().items() if ".one." not in key})
        assert torch.equal(outputs(alone, batch), outputs(model, batch))

    @every_architecture
    def test_deleting_the_active_adapter_activates_the_other(self, name):
        model, batch = self.two(name), batch_for(name)
        model.set_adapter("two")
        expected = outputs(model, batch)
        model.set_adapter("one")
        with pytest.warns(
            UserWarning, match="Adapter one was active which is now deleted. Setting active adapter to two"
        ):
            model.delete_adapter("one")
        assert model.active_adapters == ["two"]
        assert torch.equal(outputs(model, batch), expected)

    @every_architecture
    def test_the_disabled_model_is_the_base(self, name):
        model, batch = adapted(name).eval(), batch_for(name)
        before, flags = outputs(model, batch), trainable(model).keys()
        with model.disable_adapter():
            assert torch.equal(outputs(model, batch), outputs(build(name), batch))
        assert torch.equal(outputs(model, batch), before) and not torch.equal(before, outputs(build(name), batch))
        assert trainable(model).keys() == flags


MODES = {
    "greedy": {},
    "beams": dict(num_beams=3, num_return_sequences=2),
    "sampling": dict(do_sample=True, num_return_sequences=3, top_k=0),
}


class TestGeneration:
    """generate() in double precision: a row's tokens depend neither on its neighbours nor on the cache."""

    def model(self, name):
        torch.manual_seed(0)
        return adapted(name, torch.float64, target_modules="all-linear").eval()

    def generate(self, model, batch, **options):
        torch.manual_seed(3)
        tokens = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, pad_token_id=EOS, **options)
        return tokens[:, -6:]

    def prompts(self, name):
        """Prompts of different lengths, padded on the side that the architecture wants."""
        return text_batch(4, left=name in ("gpt2", "llama"))

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("name", GENERATORS)
    def test_with_and_without_cache(self, name, mode):
        model, batch, options = self.model(name), self.prompts(name), MODES[mode]
        cached = self.generate(model, batch, **options)
        assert cached.shape == (4 * options.get("num_return_sequences", 1), 6)
        assert torch.equal(self.generate(model, batch, use_cache=False, **options), cached)
        with model.disable_adapter():
            assert not torch.equal(self.generate(model, batch, **options), cached), "the adapter does nothing"

    @pytest.mark.parametrize("mode", ["greedy", "beams"])
    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("name", GENERATORS)
    def test_a_row_of_a_padded_batch_is_generated_as_alone(self, name, use_cache, mode):
        model, batch = self.model(name), self.prompts(name)
        assert batch["attention_mask"].sum(1).unique().numel() > 1
        options = dict(MODES[mode], use_cache=use_cache)
        with tucka.record_routes(model) as routes:
            together = self.generate(model, batch, **options).unflatten(0, (4, -1))
        assert routes[0].group.unique().numel() > 1, "all rows in one group: nothing is tested"
        for row in range(4):
            keep = batch["attention_mask"][row].bool()
            alone = {key: value[row : row + 1, keep] for key, value in batch.items()}
            assert torch.equal(self.generate(model, alone, **options), together[row])

    @pytest.mark.parametrize("name", GENERATORS)
    def test_sampled_sequences_of_a_prompt_share_its_route(self, name):
        model = self.model(name)
        with tucka.record_routes(model) as routes:
            self.generate(model, self.prompts(name), **MODES["sampling"])
        prompt = tucka.Route(*(field[::3] for field in routes[-1]))
        assert routes[-1].group.shape == (12,)
        for route in routes:
            assert torch.equal(route.gates, prompt.expand(route.group.shape[0]).gates)

    @pytest.mark.parametrize("name", GENERATORS)
    def test_a_new_prompt_takes_a_new_route(self, name):
        model, batch = self.model(name), self.prompts(name)
        other = dict(batch, input_ids=batch["input_ids"].flip(0), attention_mask=batch["attention_mask"].flip(0))
        expected = self.generate(self.model(name), other)
        self.generate(model, batch)
        assert torch.equal(self.generate(model, other), expected)

    @pytest.mark.parametrize("name", GENERATORS)
    def test_a_cache_of_fixed_size(self, name):
        model, batch = self.model(name), self.prompts(name)
        static = self.generate(model, batch, cache_implementation="static")
        assert torch.equal(static, self.generate(model, batch))

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_embedded_prompts(self, name):
        model, batch = self.model(name), self.prompts(name)
        embedded = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
        found = self.generate(model, {**embedded, "attention_mask": batch["attention_mask"]})
        assert torch.equal(found, self.generate(model, batch))

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_a_prompt_read_in_chunks_is_refused(self, name):
        """The route belongs to the whole prompt; one taken from its first chunk would differ without a word."""
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            self.generate(self.model(name), self.prompts(name), prefill_chunk_size=4)

    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_speculative_decoding_gives_the_greedy_tokens(self, name):
        model, batch = self.model(name), text_batch(1, 9, padded=False)
        greedy = self.generate(model, batch)
        assert torch.equal(self.generate(model, batch, prompt_lookup_num_tokens=2), greedy)
        assert torch.equal(self.generate(model, batch, assistant_model=build(name, torch.float64)), greedy)


class TestTowers:
    """Two towers, each with its own router, called together or alone."""

    def inputs(self, texts=3, images=3):
        batch = batch_for("clip", texts)
        pixels = batch_for("clip", images)["pixel_values"]
        return {key: batch[key] for key in ("input_ids", "attention_mask")}, {"pixel_values": pixels}

    @pytest.mark.parametrize("routing", ["sample", "batch"])
    @pytest.mark.parametrize("targets", [None, "all-linear"])
    @pytest.mark.parametrize("texts,images", [(3, 3), (3, 2), (1, 4)])
    def test_a_tower_alone_gives_what_it_gives_inside_the_whole(self, texts, images, targets, routing):
        model = adapted("clip", target_modules=targets, routing=routing).eval()
        text, image = self.inputs(texts, images)
        with torch.no_grad():
            whole = model(**text, **image)
            assert whole.logits_per_text.shape == (texts, images)
            features = model.get_text_features(**text).pooler_output, model.get_image_features(**image).pooler_output
            towers = model.base_model.model.text_model(**text), model.base_model.model.vision_model(**image)
        embeddings = [feature / feature.norm(dim=-1, keepdim=True) for feature in features]
        torch.testing.assert_close(embeddings[0], whole.text_embeds)
        torch.testing.assert_close(embeddings[1], whole.image_embeds)
        assert torch.equal(towers[0].last_hidden_state, whole.text_model_output.last_hidden_state)
        assert torch.equal(towers[1].last_hidden_state, whole.vision_model_output.last_hidden_state)

    def test_a_tower_alone_trains_its_own_adapter_only(self):
        model = adapted("clip").train()
        text, image = self.inputs()
        for tower, features in (
            ("text_model", lambda: model.get_text_features(**text)),
            ("vision_model", lambda: model.get_image_features(**image)),
        ):
            model.zero_grad()
            features().pooler_output.square().sum().backward()
            reached = {key for key, p in trainable(model).items() if p.grad is not None and p.grad.any()}
            assert reached == {key for key in trainable(model) if f".{tower}." in key}

    def test_towers_are_started_alone_by_the_first_batch_they_see(self):
        model = wrapped("clip").train()
        text, image = self.inputs()
        model.get_text_features(**text)
        started = {key: bool(flag) for key, flag in model.state_dict().items() if key.endswith("initialised")}
        assert sorted(started.values()) == [False, True]
        assert all(flag == (".text_model." in key) for key, flag in started.items())
        model.get_image_features(**image)
        assert all(flag for key, flag in model.state_dict().items() if key.endswith("initialised"))


class TestPrecision:
    """Reduced precision around an adapter that stays in single precision."""

    @staticmethod
    def check_step(model, loss):
        loss.backward()
        assert torch.isfinite(loss)
        before = stored(model)
        torch.optim.SGD(trainable(model).values(), lr=0.1).step()
        for key, parameter in trainable(model).items():
            assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), key
        after = stored(model)
        assert {value.dtype for key, value in after.items() if ".tucka_" in key} == {torch.float32, torch.bool}
        assert any(not torch.equal(after[key], before[key]) for key in after if key.endswith(".core"))

    @every_architecture
    @pytest.mark.parametrize("config", CONFIGS)
    def test_a_bfloat16_base(self, name, config):
        fields, batch = CONFIGS[config], batch_for(name, dtype=torch.bfloat16)
        model = tucka.apply(build(name, torch.bfloat16), None if fields is None else plain_config(**fields))
        expected = outputs(build(name, torch.bfloat16), batch)
        assert torch.equal(outputs(model.eval(), batch), expected)
        output = model.train()(**batch)
        assert first_output(output).dtype == torch.bfloat16 and first_output(output).isfinite().all()
        self.check_step(model, output.loss)
        assert not torch.equal(outputs(model.eval(), batch), expected)

    @every_architecture
    def test_a_bfloat16_adapter_comes_back(self, name, tmp_path):
        model, batch = adapted(name, torch.bfloat16).eval(), batch_for(name, dtype=torch.bfloat16)
        assert outputs(model, batch).dtype == torch.bfloat16 and outputs(model, batch).isfinite().all()
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(name, torch.bfloat16), tmp_path)
        assert_same_tensors(stored(loaded), stored(model))
        assert torch.equal(outputs(loaded, batch), outputs(model, batch))

    @every_architecture
    def test_autocast(self, name):
        model, batch = adapted(name).train(), batch_for(name)
        expected = model(**batch).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        torch.testing.assert_close(loss, expected, rtol=0.1, atol=0.1, check_dtype=False)
        self.check_step(model, loss)

    @every_architecture
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_the_whole_model_cast_afterwards(self, name, dtype):
        model, batch = adapted(name).to(dtype).train(), batch_for(name, dtype=dtype)
        output = model(**batch)
        assert first_output(output).dtype == dtype and first_output(output).isfinite().all()
        output.loss.backward()
        assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in trainable(model).values())

    @pytest.mark.parametrize("name", ["bert", "llama"])
    def test_the_adapter_may_share_the_bases_precision(self, name):
        config = plain_config(r=4, shared_expert=False, target_modules="all-linear")
        model = get_peft_model(build(name, torch.bfloat16), config, autocast_adapter_dtype=False)
        assert {p.dtype for p in trainable(model).values()} == {torch.bfloat16}
        loss = randomise(model).train()(**batch_for(name)).loss
        loss.backward()
        assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in trainable(model).values())
