"""Tiny, randomly initialised models of the architectures the library is tested on, and their batches."""

import sys
import warnings

import pytest
import tensorly as tl
import torch
import transformers as tf
from peft import get_peft_model_state_dict

import tucka

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
tf.logging.set_verbosity_error()
torch.set_num_threads(1)  # the models are tiny, and the tests run in parallel

EOS, VOCABULARY = 2, 50
PLAIN = dict(
    r=8, k=4, t=2, p=2, alpha=4.0, routing="sample", affinity="paper", pooling="mean_std", normalize=False,
    form="multiplicative", share_factors=False, shared_expert=True, trainable="all", init_router="perturb",
    init_experts="identity", block_size=None, trained_columns=None,
    axis_block_size=None,
)  # fmt: skip
"""Settings of tests that are about something else: the simplest of each, whatever the library's defaults are."""
FORMS = [dict(form="multiplicative", tie_factors=True), dict(form="multiplicative", tie_factors=False),
         dict(form="additive", tie_factors=False)]  # fmt: skip
"""The forms of the update, and whether both D-modes are one."""
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def _bert():
    sizes = dict(**NO_DROPOUT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    return tf.BertForSequenceClassification(tf.BertConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=32))


def _deberta():
    sizes = dict(**NO_DROPOUT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    positions = dict(relative_attention=True, position_buckets=4, share_att_key=True, pos_att_type=["c2p", "p2c"])
    extra = dict(norm_rel_ebd="layer_norm", position_biased_input=False, max_position_embeddings=32)
    config = tf.DebertaV2Config(**sizes, **positions, **extra, vocab_size=VOCABULARY)
    return tf.DebertaV2ForSequenceClassification(config)


def _vit():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    return tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1))


def _gpt2():
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    tokens = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS)
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **tokens))


def _llama():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    tokens = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **tokens, intermediate_size=40))


def _t5():
    sizes = dict(d_model=32, d_ff=40, num_layers=2, num_heads=4, d_kv=8, dropout_rate=0.0)
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, vocab_size=VOCABULARY, decoder_start_token_id=0))


def _bart():
    encoder = dict(encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=40)
    decoder = dict(decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=40)
    config = tf.BartConfig(
        d_model=32, dropout=0.0, **encoder, **decoder, vocab_size=VOCABULARY, max_position_embeddings=64
    )
    return tf.BartForConditionalGeneration(config)


def _clip():
    sizes = dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    text = dict(**sizes, hidden_size=32, vocab_size=VOCABULARY, max_position_embeddings=32, eos_token_id=EOS)
    vision = dict(**sizes, hidden_size=24, image_size=8, patch_size=4)
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


BUILDERS = dict(bert=_bert, deberta=_deberta, vit=_vit, gpt2=_gpt2, llama=_llama, t5=_t5, bart=_bart, clip=_clip)
ARCHITECTURES = list(BUILDERS)


def build(name, dtype=torch.float32, seed=0):
    """A tiny model; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BUILDERS[name]().to(dtype).eval()
        for parameter in model.parameters():  # biases and pad embeddings start at zero, which would hide leaks
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model


def text_batch(samples=3, positions=7, padded=True, left=False):
    """Token ids and their mask; row 1 is padded with the end token."""
    generator = torch.Generator().manual_seed(samples * 100 + positions)
    input_ids = torch.randint(3, VOCABULARY, (samples, positions), generator=generator)
    mask = torch.ones_like(input_ids)
    if padded and samples > 1:
        mask[1, 4:] = 0
        if left:
            mask = mask.flip(1)
        input_ids = torch.where(mask.bool(), input_ids, EOS)
    return {"input_ids": input_ids, "attention_mask": mask}


def batch_for(name, samples=3, dtype=torch.float32, **options):
    """A batch that architecture takes, with labels where it has a loss."""
    generator = torch.Generator().manual_seed(samples)
    if name == "vit":
        pixels = torch.randn(samples, 1, 8, 8, generator=generator).to(dtype)
        return {"pixel_values": pixels, "labels": torch.arange(samples) % 2}
    batch = text_batch(samples, **options)
    if name in ("bert", "deberta"):
        batch["labels"] = torch.arange(samples) % 2
    elif name in ("t5", "bart"):
        batch["labels"] = batch["input_ids"][:, :5].contiguous()
    elif name == "clip":
        batch["pixel_values"] = torch.randn(samples, 3, 8, 8, generator=generator).to(dtype)
        batch["return_loss"] = True
    else:
        batch["labels"] = batch["input_ids"]
    return batch


def batches_for(name, samples=12, size=5, dtype=torch.float32, **options):
    """A loader's batches: different samples, the last batch smaller; every third text is padded."""
    batch = batch_for(name, samples, dtype=dtype, **{"padded": False, **options})
    if "attention_mask" in batch and not options:
        batch["attention_mask"][::3, 5:] = 0
    return [
        {key: value[start : start + size] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        for start in range(0, samples, size)
    ]


def unstarted(name="bert", dtype=torch.float32, **fields):
    """A tiny model that waits for its calibration; the same seed every time."""
    torch.manual_seed(0)
    defaults = dict(r=4, k=2, init_router="kmeans", init_experts="hosvd")
    return tucka.apply(build(name).to(dtype), plain_config(**{**defaults, **fields}))


def started(name="bert", batches=None, dtype=torch.float32, loss=None, **fields):
    """A tiny model after its calibration."""
    model = unstarted(name, dtype, **fields)
    batches = batches_for(name, dtype=dtype) if batches is None else batches
    tucka.initialize(model, batches, loss=loss, progress=False)
    return model.eval()


def adapter_state(model):
    """A copy of all that an adapter holds."""
    return {key: value.clone() for key, value in model.state_dict().items() if ".tucka_" in key}


def assert_same_state(found, expected, tolerance=0.0):
    """The same keys, and the same tensors: bit for bit, or within an absolute tolerance."""
    assert expected and found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}")


def router_of(model):
    """The first router of a model."""
    return next(router for layer in tucka.model.layers_of(model) for router in layer.tucka_router.values())


def stored(model, adapter_name="default"):
    """A copy of all that the adapter saves."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: value.clone() for key, value in state.items()}


def assert_same_tensors(found, expected):
    """The same keys, types and bits."""
    assert expected and found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def first_output(output):
    """The tensor to compare: logits, or a two-tower model's similarities."""
    return output.logits_per_text if "logits_per_text" in output else output.logits


def outputs(model, batch):
    """What a model says of a batch, without gradient."""
    with torch.no_grad():
        return first_output(model(**batch))


def materialised(model, adapter="default"):
    """All experts (K, T, D, O) and shared slices (D, O) as they act, with α, in float64, by layer."""
    found = {}
    for layer in tucka.model.layers_of(model):
        experts, alpha = layer.tucka_experts[adapter], layer.tucka_alpha[adapter]
        routed = experts.to_tensor().detach().double() * alpha
        _, _, u, v = experts.factors
        shared = experts.shared_slice
        shared = torch.zeros(1) if shared is None else (u @ shared @ v.mT).detach().double() * alpha
        found[layer.name] = torch.cat([routed.flatten(), shared.flatten()])
    return found


def randomise(model, scale=0.3, seed=1):
    """Move every trainable parameter, so that the adapter acts and every group acts differently."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return model


def plain_config(**fields):
    """A configuration of the simplest settings, and those given."""
    return tucka.TuckAConfig(**{**PLAIN, **fields})


def adapted(name, dtype=torch.float32, calibrate=True, **fields):
    """A tiny model with a randomised adapter."""
    config = plain_config(**{"r": 4, "k": 3, **fields})
    batch = batch_for(name, dtype=dtype)
    return randomise(tucka.apply(build(name, dtype), config, calibration=[batch] if calibrate else None))


@pytest.fixture
def out(tmp_path):
    """The table of a sweep, in a directory that is not there yet."""
    return tmp_path / "deep" / "runs.csv"


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    backend = tl.get_backend()
    yield
    assert tl.get_backend() == backend, "the library left tensorly's backend changed"


@pytest.fixture(autouse=True)
def _figures_closed():
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
