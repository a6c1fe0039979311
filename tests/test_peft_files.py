"""What users of Hugging Face PEFT expect of any method: saving and loading."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from conftest import (
    adapted,
    assert_same_tensors,
    batch_for,
    build,
    plain_config,
    randomise,
    stored,
)
from peft import PeftModel
from peft_surface import (
    QUERY,
    QUERY_VALUE,
    SIZES,
    VALUE,
    adapted_layers,
    bert,
    bert_config,
    layers,
    outputs,
    reloaded,
    trainable,
)
from safetensors.torch import load_file

import tucka
from tucka.formats import FORMAT_VERSION


class TestFiles:
    """Files, and models put together from them."""

    def test_what_push_to_hub_sends(self, monkeypatch):
        sent = {}

        class Hub:
            """Takes what a client would upload."""

            def create_repo(self, repo_id, **options):
                return type("Url", (), {"repo_id": repo_id})

            def create_commit(self, repo_id, operations, **options):
                sent.update({file.path_in_repo: Path(file.path_or_fileobj).read_bytes() for file in operations})

        monkeypatch.setattr(tf.utils.hub, "hf_api", Hub)
        card = peft.peft_model.ModelCard("---\nlibrary_name: peft\n---\n")
        monkeypatch.setattr(tf.utils.hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
        model = bert()
        model.push_to_hub("someone/adapter")
        assert set(sent) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        config = json.loads(sent["adapter_config.json"])
        assert (config["peft_type"], config["format_version"]) == ("TUCKA", FORMAT_VERSION)
        assert (config["r"], config["k"], config["inference_mode"]) == (4, 3, True)
        assert sorted(config["target_modules"]) == QUERY_VALUE

    def test_files_on_disk(self, tmp_path):
        model = bert()
        model.save_pretrained(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "README.md",
        }
        assert_same_tensors(load_file(tmp_path / "adapter_model.safetensors"), stored(model))
        assert json.loads((tmp_path / "adapter_config.json").read_text())["format_version"] == FORMAT_VERSION
        assert "library_name: peft" in (tmp_path / "README.md").read_text()
        assert not model.peft_config["default"].inference_mode

    @pytest.mark.parametrize(
        "name,task,auto",
        [
            ("llama", "CAUSAL_LM", peft.AutoPeftModelForCausalLM),
            ("gpt2", "CAUSAL_LM", peft.AutoPeftModelForCausalLM),
            ("bert", "SEQ_CLS", peft.AutoPeftModelForSequenceClassification),
            ("bert", None, peft.AutoPeftModel),
        ],
    )
    def test_auto_classes_put_base_and_adapter_together(self, name, task, auto, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        build(name).save_pretrained(tmp_path / "base")
        base = type(build(name)).from_pretrained(tmp_path / "base")
        model = randomise(tucka.apply(base, plain_config(**SIZES, task_type=task), calibration=[batch_for(name)]))
        model.eval().save_pretrained(tmp_path / "adapter")
        again = auto.from_pretrained(tmp_path / "adapter")
        assert type(again) is type(model)
        assert_same_tensors(stored(again), stored(model))
        assert torch.equal(outputs(again, batch_for(name)), outputs(model, batch_for(name)))
        by_transformers = type(build(name)).from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(outputs(by_transformers, batch_for(name)), outputs(model, batch_for(name)))

    def test_modules_to_save_are_trained_saved_and_switched(self, tmp_path):
        model = bert(modules_to_save=["classifier"])
        head = "base_model.model.classifier.modules_to_save.default.weight"
        original = build("bert").classifier.weight
        assert head in trainable(model) and not torch.equal(model.state_dict()[head], original)
        assert torch.equal(stored(model)["base_model.model.classifier.weight"], model.state_dict()[head])
        again = reloaded(model, tmp_path)
        with again.disable_adapter():
            assert torch.equal(outputs(again), outputs(build("bert")))
        again.add_adapter("plain", bert_config())
        again.set_adapter("plain")
        assert torch.equal(outputs(again), outputs(build("bert")))
        again.set_adapter("default")
        assert torch.equal(outputs(again), outputs(model))

    def test_names_that_begin_as_our_keys_do(self, tmp_path):
        """A head saved under such a name is still a head."""
        model = bert(modules_to_save=["classifier"])
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(build("bert"), tmp_path, adapter_name="tucka_news").eval()
        assert torch.equal(outputs(again), outputs(model))
        again.save_pretrained(tmp_path / "named")
        named = PeftModel.from_pretrained(build("bert"), tmp_path / "named" / "tucka_news").eval()
        assert torch.equal(outputs(named), outputs(model))

    @pytest.mark.parametrize("where", ["embed_tokens", "lm_head"])
    def test_modules_to_save_of_a_generating_model(self, where, tmp_path):
        model = adapted("llama", modules_to_save=[where]).eval()
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(build("llama"), tmp_path)
        assert_same_tensors(stored(again), stored(model))
        batch = batch_for("llama", left=True)
        batch.pop("labels")
        assert torch.equal(outputs(again, batch), outputs(model, batch))
        options = dict(max_new_tokens=5, min_new_tokens=5)
        assert torch.equal(again.generate(**batch, **options), model.generate(**batch, **options))

    def test_resized_embeddings_are_saved_on_request(self, tmp_path):
        def base():
            model = build("llama")
            model.resize_token_embeddings(56)
            return model

        batch = batch_for("llama")
        model = tucka.apply(base(), plain_config(**SIZES), calibration=[batch])
        torch.nn.init.normal_(randomise(model).eval().get_input_embeddings().weight)
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        assert torch.equal(outputs(PeftModel.from_pretrained(base(), tmp_path), batch), outputs(model, batch))

    def test_a_saved_module_is_not_adapted(self, tmp_path):
        model = bert(target_modules="all-linear", modules_to_save=["pooler", "classifier"])
        assert not {name for name in adapted_layers(model) if name.startswith("bert.pooler.dense")}
        assert any(".pooler.modules_to_save." in name for name in trainable(model))
        reloaded(model, tmp_path)

    @pytest.mark.parametrize("bias", ["all", "tucka_only"])
    def test_biases_are_trained_saved_and_reloaded(self, bias, tmp_path):
        model = bert(bias=bias)
        biases = {name for name in trainable(model) if name.endswith(".bias")}
        every = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
        of_targets = {f"base_model.model.{layer}.base_layer.bias" for layer in layers(QUERY, VALUE)}
        assert biases == (every if bias == "all" else of_targets)
        base = {name: value for name, value in build("bert").state_dict().items() if name.endswith("query.bias")}
        state = stored(model)
        for name, value in base.items():
            assert not torch.equal(state["base_model.model." + name.replace("query", "query.base_layer")], value)
        assert {key for key in state if ".tucka_" not in key} == biases
        reloaded(model, tmp_path)

    def test_one_adapter_with_biases_at_a_time(self):
        model = bert(bias="all")
        with pytest.raises(ValueError, match="TuckAModel supports only 1 adapter with bias"):
            model.add_adapter("other", bert_config(bias="tucka_only"))
        assert list(model.peft_config) == ["default"]

    def test_shared_factors_are_stored_once(self, tmp_path):
        model = bert(share_factors=True, form="additive")
        state = stored(reloaded(model, tmp_path, low_cpu_mem_usage=True))
        ends = [key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")]
        assert {end: ends.count(end) for end in set(ends)} == dict(
            core=4, expert_factor=4, shared_core=4, input_factor=2, output_factor=2, centroids=1, initialised=1
        )
        owners = {key.split(".tucka_")[0] for key in state if key.endswith("input_factor")}
        assert owners == {f"base_model.model.{layer}" for layer in layers(QUERY, VALUE, indices=[0])}

    def test_shared_factors_train_together(self):
        model = bert(share_factors=True)
        owner = next(
            p for name, p in model.named_parameters() if name.endswith(f"0.{QUERY}.tucka_experts.default.input_factor")
        )
        before = outputs(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if f"0.{QUERY}.tucka_experts" in name and name.endswith("core"):
                    parameter.zero_()
            silenced = outputs(model)
            owner.zero_()
        assert not torch.equal(silenced, before) and not torch.equal(outputs(model), silenced)

    def test_untied_factors(self, tmp_path):
        model = bert(tie_factors=False)
        state = stored(reloaded(model, tmp_path))
        outs = [value for key, value in state.items() if key.endswith("output_factor")]
        assert [tuple(value.shape) for value in outs] == [(32, 4)] * 4
        assert not any(key.endswith("output_factor") for key in stored(bert()))

    @pytest.mark.parametrize("shared_expert", [True, False])
    def test_the_shared_expert(self, shared_expert, tmp_path):
        model = bert(shared_expert=shared_expert)
        state = stored(reloaded(model, tmp_path))
        assert sum(key.endswith("shared_core") for key in state) == (4 if shared_expert else 0)

    @pytest.mark.parametrize("share_factors", [True, False])
    def test_core_only_training_holds_the_factors_whatever_is_switched(self, share_factors, tmp_path):
        model = bert(trainable="core", share_factors=share_factors)
        model.add_adapter("other", bert_config(trainable="core"))

        def check():
            ends = {name.rpartition(".")[2] for name in trainable(model)}
            assert ends == {"core", "shared_core", "expert_factor", "centroids"}
            assert all(f".{model.active_adapter}." in name for name in trainable(model))

        check()
        for name in ("other", "default"):
            model.set_adapter(name)
            check()
        with model.disable_adapter():
            assert not trainable(model)
        check()
        model.set_requires_grad("default", True)
        check()
        before = stored(model)
        model.train()(**batch_for("bert")).loss.backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
        same = {key for key, value in stored(model).items() if torch.equal(value, before[key])}
        factors = {key for key in before if key.endswith("input_factor")}
        assert len(factors) == (2 if share_factors else 4)
        assert same == factors | {key for key in before if key.endswith("initialised")}
        model.delete_adapter("other")
        loaded = reloaded(model, tmp_path, is_trainable=True)
        assert trainable(loaded) == trainable(model)
