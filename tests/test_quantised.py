"""Quantised bases, in the libraries' own layers: train, save, reload and generate, from files on disk."""

import pytest
import torch
import transformers as tf
from conftest import first_output, plain_config, randomise
from peft import PeftModel, prepare_model_for_kbit_training

import tucka
from tucka.packing import SWITCH, keep_layout

VOCABULARY, WIDTH = 64, 64  # group sizes of 32 and 64 divide every width
MODELS = dict(
    llama=(tf.LlamaForCausalLM, dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, intermediate_size=128)),
    bert=(tf.BertForSequenceClassification, dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
                                                 intermediate_size=128, max_position_embeddings=32,
                                                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    gpt2=(tf.GPT2LMHeadModel, dict(n_embd=WIDTH, n_layer=2, n_head=4, n_positions=32,
                                   embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)),
)  # fmt: skip
TARGETS = dict(
    llama=["q_proj", "v_proj", "up_proj", "down_proj"], bert=["query", "value", "dense"], gpt2=["c_attn", "c_fc"]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of tiny dense models."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, (kind, sizes) in MODELS.items():
            config = kind.config_class(**sizes, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=2)
            kind(config).save_pretrained(tmp_path_factory.getbasetemp() / "dense" / name)
    return tmp_path_factory.getbasetemp() / "dense"


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes")
    return tf.BitsAndBytesConfig(**options)


def torchao(kind, **options):
    quantization = pytest.importorskip("torchao.quantization")
    return tf.TorchAoConfig(getattr(quantization, kind)(**options))


def torchao_four_bits():
    quantization = pytest.importorskip("torchao.quantization")
    return torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=quantization.PerGroup(32))


LIBRARIES = dict(
    bnb4=lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    bnb4_plain_scales=lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    bnb8=lambda: bitsandbytes(load_in_8bit=True),
    torchao8=lambda: torchao("Int8WeightOnlyConfig"),
    torchao4=torchao_four_bits,
)


def quantised(kind, directory, name="llama", **options):
    """A model from files, quantised while it is read; HQQ layers are put in by hand, transformers 5 reads none."""
    cls = MODELS[name][0]
    if not kind.startswith("hqq"):
        return cls.from_pretrained(directory / name, quantization_config=LIBRARIES[kind](), **options).eval()
    hqq = pytest.importorskip("hqq.core.quantize")
    settings = hqq.BaseQuantizeConfig(nbits=int(kind[3:]), group_size=64)
    model = cls.from_pretrained(directory / name, **options).eval()
    for layer, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and layer.rpartition(".")[2] in TARGETS[name]:
            packed = hqq.HQQLinear(module, settings, compute_dtype=model.dtype, device="cpu")
            model.set_submodule(layer, packed)
    model.hqq_quantized = True  # PEFT's sign for it
    return model


def held(model):
    """A base model that computes on every CPU what it computes once it is adapted (see `tucka.packing`)."""
    keep_layout(model)
    return model


def batches(name="llama", count=3):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        tokens = torch.randint(3, VOCABULARY, (6, 8), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, 5:] = 0
        labels = tokens[:, 0] % 2 if name == "bert" else tokens.masked_fill(mask == 0, -100)
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def fields(form, name="llama"):
    return dict(r=4, k=2, form=form, share_factors=form == "additive", target_modules=TARGETS[name])


@torch.no_grad()
def logits(model, batch):
    return first_output(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]))


def weights(model):
    """Bytes or numbers of everything that is no adapter's."""
    held = {key: value for key, value in model.state_dict().items() if ".tucka_" not in key}
    plain = {key.removeprefix("base_model.model.").replace(".base_layer.", "."): held[key] for key in held}
    return {key: value.dequantize() if type(value) is not torch.Tensor and "weight" in key and
            hasattr(value, "dequantize") else value for key, value in plain.items()}  # fmt: skip


def train(model, data, steps=9):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model.train()
    losses = []
    for step in range(steps):
        loss = model(**data[step % len(data)]).loss
        loss.backward()
        assert all(p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def generated(model):
    prompt = batches()[0]["input_ids"][:3, :4]
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)


CASES = [
    ("bnb4", "llama", "additive", "sample"),
    ("bnb4", "gpt2", "multiplicative", "batch"),
    ("bnb8", "llama", "multiplicative", "sample"),
    ("torchao8", "bert", "additive", "batch"),
    ("torchao4", "llama", "multiplicative", "sample"),
    ("hqq8", "llama", "additive", "batch"),
    ("hqq4", "llama", "multiplicative", "sample"),
]


@pytest.mark.parametrize("kind,name,form,routing", CASES)
def test_train_save_reload_generate(kind, name, form, routing, saved, tmp_path):
    data = batches(name)
    base = prepare_model_for_kbit_training(
        held(quantised(kind, saved, name)), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    expected = logits(base.eval(), data[0])
    before = {key: value.clone() for key, value in weights(base).items() if isinstance(value, torch.Tensor)}
    config = tucka.TuckAConfig(**fields(form, name), routing=routing)
    model = tucka.apply(base, config, calibration=data, progress=False).eval()
    assert torch.equal(logits(model, data[0]), expected)
    losses = train(model, data)
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.02
    after = weights(model)
    assert before and all(torch.equal(after[key], value) for key, value in before.items())
    adapter = {key: value for key, value in model.state_dict().items() if ".tucka_" in key}
    assert {value.dtype for value in adapter.values()} == {torch.float32, torch.bool}
    trained = logits(model, data[0])
    assert not torch.equal(trained, expected)
    model.save_pretrained(tmp_path)
    fresh = prepare_model_for_kbit_training(quantised(kind, saved, name), use_gradient_checkpointing=False)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(logits(again, data[0]), trained)
    if name != "bert":
        assert torch.equal(generated(again), generated(model))


@pytest.mark.parametrize("kind", ["bnb4", "torchao8"])
def test_a_quantised_checkpoint(kind, saved, tmp_path):
    """The base's own quantised files, in half the precision, with no preparation at all."""
    data, cls = batches(), MODELS["llama"][0]
    quantised(kind, saved, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    base = held(cls.from_pretrained(tmp_path / "base")).eval()
    expected = logits(base, data[0])
    model = tucka.apply(base, tucka.TuckAConfig(**fields("additive")), calibration=data, progress=False).eval()
    assert torch.equal(logits(model, data[0]), expected) and expected.dtype == torch.bfloat16
    train(model, data, steps=4)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, data[0]), logits(model, data[0]))


@pytest.mark.parametrize("form", ["additive", "multiplicative"])
def test_the_gradient_start_is_that_of_the_weights_it_stands_for(form, saved):
    """Four-bit weights, and the dense model of the same numbers: the same factors."""
    config = dict(fields(form), share_factors=False, init_experts="gradient")
    starts = []
    for dense in (False, True):
        base = quantised("bnb4", saved)
        base = base.dequantize() if dense else base
        model = tucka.apply(base, tucka.TuckAConfig(**config), calibration=batches(), progress=False)
        starts.append([layer.tucka_experts["default"].input_mode for layer in tucka.model.layers_of(model)])
    for found, expected in zip(*starts):
        cosines = torch.linalg.svdvals(torch.linalg.qr(found)[0].mT @ torch.linalg.qr(expected)[0])
        assert cosines.min() > 0.99


@pytest.mark.parametrize("kind", ["bnb4", "torchao8"])
def test_what_else_an_adapter_is_for(kind, saved):
    data = batches()
    expected = logits(held(quantised(kind, saved)), data[0])
    config = tucka.suggest_ranks(quantised(kind, saved), data, budget=5000, progress=False)
    model = tucka.apply(quantised(kind, saved), config, calibration=data, progress=False)
    train(model, data, steps=3)
    with model.disable_adapter():
        assert torch.equal(logits(model, data[0]), expected)
    tucka.truncate(model, energy=0.99)
    tucka.expand(model, data, k=6)
    model.add_adapter("second", plain_config(r=3, target_modules=["q_proj"]))
    model.set_adapter("second")
    assert torch.equal(logits(model, data[0]), expected)
    assert torch.equal(logits(model.unload(), data[0]), expected)


# --- a base that was evaluated, where evaluations repack its weights -------------------------------------------------


def repack(model):
    """As an evaluation on a CPU with AVX512-BF16 leaves 4-bit layers; returns the weights they then stand for."""
    functional = pytest.importorskip("bitsandbytes.functional")
    layers = {name: module for name, module in model.named_modules() if hasattr(module, SWITCH)}
    stands_for = {}
    for name, layer in layers.items():
        state = layer.weight.quant_state
        weight = functional.dequantize_4bit(layer.weight.data, state)
        scales = state.absmax
        if state.nested:
            scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
        blocks = weight.view(-1, state.blocksize) * (scales.bfloat16().float() / scales).unsqueeze(1)
        stands_for[name] = blocks.view_as(weight)
    if functional.has_avx512bf16():
        logits(model.eval(), batches()[0])
    else:
        for layer in layers.values():
            packed = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
            layer.weight.data, layer.weight.quant_state = packed
            setattr(layer, SWITCH, True)
    assert layers and all(layer.weight.quant_state.packing_format_for_cpu for layer in layers.values())
    return stands_for


def gradients(model, batch):
    model.train().zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", ["bnb4", "bnb4_plain_scales"])
@pytest.mark.parametrize("form", ["additive", "multiplicative"])
def test_a_base_that_was_evaluated_trains_and_is_saved_as_its_dense_twin(kind, form, saved, tmp_path):
    """What is repacked passes no gradient on, and comes back from `state_dict` as other numbers."""
    base, dense, data = quantised(kind, saved), MODELS["llama"][0].from_pretrained(saved / "llama"), batches()
    for name, weight in repack(base).items():
        dense.get_submodule(name).weight.data.copy_(weight)
    config = plain_config(**fields(form))
    model, twin = (tucka.apply(each, config, calibration=data, progress=False) for each in (base, dense))
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if ".tucka_" in key}, strict=False)
    for each in (model, twin):
        randomise(each, 0.05)
    expected = gradients(twin, data[0]), logits(twin.eval(), data[0])
    for _ in range(2):  # evaluated and saved in between
        found = gradients(model, data[0]), logits(model.eval(), data[0])
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
        assert found[0].keys() == expected[0].keys()
        for name, gradient in expected[0].items():
            torch.testing.assert_close(
                found[0][name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    again = PeftModel.from_pretrained(held(quantised(kind, saved)), tmp_path).eval()
    torch.testing.assert_close(logits(again, data[0]), expected[1], rtol=0, atol=0.02)


def test_the_trainer_in_bfloat16(saved, tmp_path):
    rows = [{key: value[i] for key, value in batches()[0].items()} for i in range(6)]
    model = prepare_model_for_kbit_training(quantised("bnb4", saved))
    model = tucka.apply(model, tucka.TuckAConfig(**fields("additive")), calibration=batches(), progress=False)
    arguments = tf.TrainingArguments(
        str(tmp_path), use_cpu=True, bf16=True, max_steps=6, learning_rate=1e-2, per_device_train_batch_size=6,
        report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = tf.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("name,prepared", [("bert", False), ("llama", True)])
def test_layers_that_pass_no_gradient_on_are_told_of(name, prepared, saved):
    """torchao's dynamic layers round their input, so what lies below them cannot be trained (by any method)."""
    settings = torchao("Int8DynamicActivationInt8WeightConfig")
    base = MODELS[name][0].from_pretrained(saved / name, quantization_config=settings)
    if prepared:
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    config = tucka.TuckAConfig(**fields("multiplicative", name), init_experts="gradient")
    with pytest.raises(ValueError, match="quantised layers that round their inputs"):
        tucka.apply(base, config, calibration=batches(name), progress=False)
    assert not tucka.model.layers_of(base)
