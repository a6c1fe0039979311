"""Where a model needs a router: its towers, encoders, and layers between them."""

import pytest
import torch
import transformers as tf
from conftest import build, plain_config, randomise, text_batch
from torch import nn

import tucka
from tucka.towers import Tower, find_towers, tower_of

SIZES = dict(num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)


def bert(layers=1):
    return tf.BertModel(tf.BertConfig(**{**SIZES, "num_hidden_layers": layers}, hidden_size=32, vocab_size=60))


def llava():
    text = tf.LlamaConfig(**SIZES, hidden_size=32, num_key_value_heads=2, vocab_size=60)
    vision = tf.CLIPVisionConfig(**SIZES, hidden_size=24, image_size=8, patch_size=4)
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=59, vision_feature_layer=-1)
    return tf.LlavaForConditionalGeneration(config).eval()


def captioner():
    encoder = tf.ViTModel(tf.ViTConfig(**SIZES, hidden_size=32, image_size=8, patch_size=4))
    decoder = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, add_cross_attention=True, is_decoder=True)
    model = tf.VisionEncoderDecoderModel(encoder=encoder, decoder=tf.GPT2LMHeadModel(decoder)).eval()
    generation = model.generation_config
    generation.decoder_start_token_id = generation.bos_token_id = 1
    generation.pad_token_id, generation.eos_token_id = 0, 2
    return model


class Siamese(nn.Module):
    """Two encoders and a head over both, no transformers model itself."""

    def __init__(self):
        super().__init__()
        self.question, self.document, self.head = bert(), bert(), nn.Linear(64, 2)

    def forward(self, question, document):
        pooled = [self.question(question).pooler_output, self.document(document).pooler_output]
        return self.head(torch.cat(pooled, -1))


@pytest.mark.parametrize(
    "make,expected",
    [
        (lambda: build("bert"), [Tower("")]),
        (lambda: build("llama"), [Tower("")]),
        (lambda: build("t5"), [Tower("", "encoder")]),
        (lambda: build("bart"), [Tower("", "model.encoder")]),
        (lambda: build("clip"), [Tower("text_model"), Tower("vision_model")]),
        (llava, [Tower("model.vision_tower"), Tower("model.language_model")]),
        (captioner, [Tower("", "encoder")]),
        (Siamese, [Tower("question"), Tower("document")]),
        (lambda: nn.Sequential(nn.Linear(2, 2)), [Tower("")]),
        (lambda: nn.ModuleDict({"backbone": build("t5")}), [Tower("", "backbone.encoder")]),
    ],
    ids=["bert", "llama", "t5", "bart", "clip", "llava", "captioner", "siamese", "plain", "nested"],
)
def test_towers(make, expected):
    assert find_towers(make()) == expected


def test_a_layer_outside_all_towers_is_its_own():
    towers = [Tower("text"), Tower("vision")]
    assert tower_of("text.layer.0", towers) == towers[0]
    assert tower_of("projection", towers) == Tower("projection")
    assert tower_of("text_projection", towers) == Tower("text_projection")


def adapt(model, **fields):
    config = plain_config(**{"r": 4, "k": 3, "target_modules": "all-linear", **fields})
    return randomise(tucka.apply(model, config)).eval()


def test_a_vision_language_model_routes_images_and_prompts_apart():
    model = adapt(llava())
    batch = text_batch(2, 9, padded=False)
    batch["input_ids"][:, 1:5] = 59
    pixels = torch.randn(2, 3, 8, 8)
    with tucka.record_routes(model) as routes:
        tokens = model.generate(**batch, pixel_values=pixels, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 13)
    prompt = routes["model.language_model"]
    assert len(prompt) == 4 and all(torch.equal(route.gates, prompt[0].gates) for route in prompt)
    assert len(routes["model.vision_tower"]) == len(routes["model.multi_modal_projector.linear_1"]) == 1


def test_a_captioner_is_routed_by_its_image():
    model = adapt(captioner())
    pixels = torch.randn(2, 3, 8, 8)
    with tucka.record_routes(model) as routes:
        model.generate(pixel_values=pixels, max_new_tokens=4, do_sample=False)
    assert all(torch.equal(route.gates, routes[0].gates) for route in routes)
    with tucka.record_routes(model) as other:
        model(pixel_values=pixels, decoder_input_ids=torch.ones(2, 3, dtype=torch.long))
    torch.testing.assert_close(other[0].gates, routes[0].gates)


def test_two_encoders_and_a_head():
    model = adapt(Siamese())
    question, document = torch.randint(3, 50, (3, 7)), torch.randint(3, 50, (3, 5))
    with tucka.record_routes(model) as routes:
        together = model(question, document)
    assert set(routes) == {"question", "document", "head"}
    alone = torch.cat([model(question[i : i + 1], document[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_windows_moved_into_the_batch_stay_with_their_sample():
    config = tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    model = adapt(tf.SwinForImageClassification(config).double())
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    alone = torch.cat([model(pixel_values=pixels[i : i + 1]).logits for i in range(3)])
    torch.testing.assert_close(model(pixel_values=pixels).logits, alone, rtol=1e-9, atol=1e-12)


def test_tokens_gathered_for_experts_are_no_samples():
    sizes = dict(hidden_size=32, num_key_value_heads=2, vocab_size=60, num_local_experts=4)
    base = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, **sizes))
    batch = text_batch(3, padded=False)
    assert adapt(base, target_modules=["q_proj"])(**batch).logits.shape == (3, 7, 60)
