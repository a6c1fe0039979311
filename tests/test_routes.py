"""Who is routed by what: padding, neighbours, kept routes, pinned routes, inputs that cannot be tied."""

import copy

import pytest
import torch
import transformers as tf
from conftest import EOS, adapted, batch_for, build, first_output, plain_config, text_batch
from torch import nn

import tucka

TEXT = ["bert", "deberta", "gpt2", "llama", "t5", "bart"]


def rows_alone(model, batch):
    """Run every row on its own, without its padding."""
    outputs = []
    for row in range(len(batch["input_ids"])):
        keep = batch["attention_mask"][row].bool()
        alone = {key: value[row : row + 1] for key, value in batch.items() if key != "labels"}
        alone["input_ids"] = alone["input_ids"][:, keep]
        alone["attention_mask"] = alone["attention_mask"][:, keep]
        outputs.append(first_output(model(**alone))[0])
    return outputs


def decoder_inputs(name, batch):
    batch = {key: value for key, value in batch.items() if key != "labels"}
    if name in ("t5", "bart"):
        batch["decoder_input_ids"] = torch.arange(12).view(3, 4) % 7 + 3
    return batch


def spread_over_groups(model, batch):
    """Redraw the centroids until the rows of the batch go to different groups."""
    centroids = next(p for name, p in model.named_parameters() if name.endswith("centroids"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        with torch.no_grad(), tucka.record_routes(model) as routes:
            model(**batch)
            if len(set(routes[0].group.tolist())) > 1:
                return
            centroids.copy_(torch.randn(centroids.shape, generator=generator))
    raise AssertionError("no centroids found that spread the rows")


@pytest.mark.parametrize("pooling", ["mean", "mean_std"])
@pytest.mark.parametrize("name", TEXT)
def test_a_row_of_a_padded_batch_is_routed_as_alone(name, pooling):
    """Padding is the end token with an embedding of its own, so a leak would show."""
    model = adapted(name, torch.float64, pooling=pooling, target_modules="all-linear").eval()
    batch = decoder_inputs(name, text_batch(3, left=name in ("gpt2", "llama")))
    positions = batch["attention_mask"].cumsum(-1).sub(1).clamp_min(0)
    if name in ("gpt2", "llama"):
        batch["position_ids"] = positions
    spread_over_groups(model, batch)
    with torch.no_grad(), tucka.record_routes(model) as routes:
        together = first_output(model(**batch))
        batch.pop("position_ids", None)
        alone = rows_alone(model, batch)
    for row, output in enumerate(alone):
        keep = batch["attention_mask"][row].bool()
        mine = together[row][keep] if together[row].shape[:1] == keep.shape and together.ndim == 3 else together[row]
        torch.testing.assert_close(mine, output, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(routes[0].gates[row], routes[1 + row].gates[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_padding_never_reaches_a_batch_route(name):
    model = adapted(name, torch.float64, routing="batch").eval()
    batch = decoder_inputs(name, text_batch(3))
    other = dict(batch, input_ids=torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7))
    with torch.no_grad(), tucka.record_routes(model) as routes:
        model(**batch), model(**other)
    assert torch.equal(routes[0].gates, routes[1].gates)
    counted = adapted(name, torch.float64, routing="batch", pool_padding=True).eval()
    with torch.no_grad(), tucka.record_routes(counted) as routes:
        counted(**batch), counted(**other)
    assert not torch.equal(routes[0].gates, routes[1].gates)


@pytest.mark.parametrize("kind", ["3-D", "4-D", "additive", "dictionary"])
def test_masks_with_a_query_dimension_say_the_same(kind):
    model = adapted("bert", torch.float64).eval()
    batch = decoder_inputs("bert", text_batch(3))
    mask = batch["attention_mask"]
    square = (mask[:, None, :] * mask[:, :, None]).bool()
    square |= torch.eye(mask.shape[1], dtype=torch.bool) & mask.bool()[:, None]
    shown = {
        "3-D": square,
        "4-D": square[:, None],
        "additive": torch.zeros(3, 1, 7, 7).masked_fill(~square[:, None], torch.finfo(torch.float32).min),
        "dictionary": {"full_attention": square[:, None]},
    }[kind]
    read = tucka.inputs.padding_mask(tucka.inputs.Inputs(mask=shown), 3, mask.shape[1])
    assert torch.equal(read, mask.bool())
    if kind == "4-D":
        with torch.no_grad(), tucka.record_routes(model) as routes:
            model(**batch), model(**dict(batch, attention_mask=shown))
        torch.testing.assert_close(routes[0].gates, routes[1].gates)


def test_a_row_that_is_all_padding_is_routed_without_nan():
    model = adapted("bert").train()
    batch = batch_for("bert")
    batch["attention_mask"][2] = 0
    with tucka.record_routes(model) as routes:
        model(**batch).loss.backward()
    assert routes[0].gates.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("routing", ["sample", "batch"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_replaying_a_recorded_route_is_identical(name, routing):
    model = adapted(name, routing=routing).eval()
    batch = batch_for(name)
    with tucka.record_routes(model) as routes:
        expected = first_output(model(**batch))
    with tucka.pin_route(model, routes[0]):
        assert torch.equal(first_output(model(**batch)), expected)
    other = routes[0]._replace(group=(routes[0].group + 1) % 3)
    with tucka.pin_route(model, other):
        assert not torch.equal(first_output(model(**batch)), expected)
    assert torch.equal(first_output(model(**batch)), expected)


def test_pinned_groups_serve_a_mixed_batch():
    """One id per sample; the gates come from the router's scores of that group."""
    model = adapted("bert", torch.float64).eval()
    batch = decoder_inputs("bert", text_batch(3, padded=False))
    with torch.no_grad(), tucka.pin_route(model, [2, 0, 1]), tucka.record_routes(model) as routes:
        mixed = model(**batch).logits
    assert routes[0].group.tolist() == [2, 0, 1]
    scores = routes[0].scores
    assert torch.equal(routes[0].gates, torch.stack([scores[0, 2], scores[1, 0], scores[2, 1]]))
    for row, group in enumerate([2, 0, 1]):
        single = {key: value[row : row + 1] for key, value in batch.items()}
        with torch.no_grad(), tucka.pin_route(model, torch.tensor([group])):
            torch.testing.assert_close(model(**single).logits[0], mixed[row], rtol=1e-9, atol=1e-12)


def test_one_pinned_group_serves_every_sample():
    model = adapted("bert").eval()
    with tucka.pin_route(model, [1]), tucka.record_routes(model) as routes:
        model(**batch_for("bert"))
    assert routes[0].group.tolist() == [1, 1, 1]


def test_the_pinned_route_survives_recomputation():
    """Backward runs after the context has ended; the recomputed block must still see the pinned route."""
    model = adapted("llama", torch.float64, target_modules="all-linear").train()
    batch = batch_for("llama")

    def gradient(checkpoint):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with tucka.pin_route(model, [2, 0, 1]):
            loss = model(**batch).loss
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for plain, recomputed in zip(gradient(False), gradient(True)):
        torch.testing.assert_close(plain, recomputed, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "route,message",
    [
        ([0, 1, 3], "groups run from 0 to k-1=2, but the route names 0…3"),
        ([-1], "groups run from 0 to k-1=2, but the route names -1…-1"),
        (torch.zeros(2, 2, dtype=torch.long), r"one integer per routed unit, but has shape \(2, 2\)"),
        (tucka.Route(torch.tensor([0]), torch.ones(1, 5)), r"gates have shape \(1, 5\), but 1 units of t=2"),
        ({"tower": [0]}, "'tower' is no tower of the model"),
    ],
)
def test_routes_that_do_not_fit_are_refused(route, message):
    model = adapted("bert")
    with pytest.raises(ValueError, match=message), tucka.pin_route(model, route):
        pass


def test_pinned_units_that_cannot_serve_the_samples():
    model = adapted("bert").eval()
    with pytest.raises(ValueError, match="a route of 2 units cannot serve 3 samples"), tucka.pin_route(model, [0, 1]):
        model(**batch_for("bert"))
    model(**batch_for("bert"))  # the failed forward left nothing open


def test_each_tower_has_its_route():
    model = adapted("clip").eval()
    batch = batch_for("clip")
    batch["pixel_values"] = batch["pixel_values"][:2]
    batch.pop("return_loss")
    with tucka.record_routes(model) as routes, torch.no_grad():
        expected = model(**batch).logits_per_text
    assert {tower: len(found) for tower, found in routes.items()} == {"text_model": 1, "vision_model": 1}
    assert routes["text_model"][0].group.shape == (3,) and routes["vision_model"][0].group.shape == (2,)
    with pytest.raises(ValueError, match="the model has 2 towers"), tucka.pin_route(model, [0]):
        pass
    with tucka.pin_route(model, {tower: found[0] for tower, found in routes.items()}), torch.no_grad():
        assert torch.equal(model(**batch).logits_per_text, expected)


class TestKeptRoutes:
    """Decoding keeps the route of its prompt."""

    def test_manual_decoding_loop(self):
        model = adapted("llama", torch.float64).eval()
        batch = text_batch(3, left=True)
        with torch.no_grad(), tucka.record_routes(model) as routes:
            output = model(**batch, use_cache=True)
            cache, mask = output.past_key_values, batch["attention_mask"]
            model(**text_batch(2, 5), use_cache=True)  # another prompt in between
            for token in (5, 9):
                mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
                model(input_ids=torch.full((3, 1), token), attention_mask=mask, past_key_values=cache)
        for step in (2, 3):
            assert torch.equal(routes[step].gates, routes[0].gates)

    @pytest.mark.parametrize("kind", [tf.DynamicCache, tf.StaticCache])
    def test_an_emptied_cache_takes_a_new_route(self, kind):
        model = adapted("llama", torch.float64).eval()
        cache = kind(config=model.config, **({} if kind is tf.DynamicCache else {"max_cache_len": 32}))
        first, second = text_batch(3, 7, padded=False), text_batch(3, 6, padded=False)
        token = torch.full((3, 1), 5)
        with torch.no_grad(), tucka.record_routes(model) as routes:
            model(**first, past_key_values=cache)
            model(input_ids=token, past_key_values=cache)
            cache.reset()
            model(**second, past_key_values=cache)
            model(input_ids=token, past_key_values=cache)
            model(**second)
        gates = [route.gates for route in routes]
        torch.testing.assert_close(gates[1], gates[0], rtol=0, atol=0)
        torch.testing.assert_close(gates[2], gates[4])
        torch.testing.assert_close(gates[3], gates[2], rtol=0, atol=0)
        assert not torch.allclose(gates[2], gates[0])

    def test_the_route_is_copied_with_a_cache(self):
        model = adapted("llama", torch.float64).eval()
        with torch.no_grad(), tucka.record_routes(model) as routes:
            prompt = model(**text_batch(1, 6, padded=False), use_cache=True).past_key_values
            model(input_ids=torch.tensor([[4]]), past_key_values=copy.deepcopy(prompt))
        assert torch.equal(routes[0].gates, routes[1].gates)

    @pytest.mark.parametrize("name", ["t5", "bart"])
    def test_encoder_outputs_carry_the_route_of_their_encoder(self, name):
        model = adapted(name, torch.float64, target_modules="all-linear").eval()
        batch = decoder_inputs(name, text_batch(3))
        base = model.get_base_model()
        with torch.no_grad():
            expected = model(**batch).logits
            encoded = base.get_encoder()(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], return_dict=True
            )
            model(**decoder_inputs(name, text_batch(3, 9)))  # another forward in between
            batch.pop("input_ids")
            assert torch.equal(model(encoder_outputs=encoded, **batch).logits, expected)
            bare = tf.modeling_outputs.BaseModelOutput(last_hidden_state=encoded.last_hidden_state)
            with pytest.raises(RuntimeError, match="needs the route its encoder took, but encoder_outputs carry none"):
                model(encoder_outputs=bare, **batch)

    @pytest.mark.parametrize("name", ["llama", "t5"])
    def test_beams_share_the_route_of_their_prompt(self, name):
        model = adapted(name, torch.float64).eval()
        batch = text_batch(3, left=name == "llama")
        with torch.no_grad(), tucka.record_routes(model) as routes:
            model.generate(**batch, num_beams=2, max_new_tokens=4, pad_token_id=EOS)
        last = routes[-1]
        assert last.group.shape == (6,)
        assert torch.equal(last.gates[0::2], last.gates[1::2])
        assert all(torch.equal(route.gates, last.gates) for route in routes[-3:])


class TestUntiedInputs:
    """With sample routing a leading size that is no sample's is an error, never a guess."""

    class Sums(nn.Module):
        """Applies its layer to what `view` makes of (B, S, D) embeddings."""

        def __init__(self, view):
            super().__init__()
            self.embed, self.layer, self.view = nn.Embedding(50, 6), nn.Linear(6, 4), view

        def forward(self, input_ids, attention_mask=None):
            return self.layer(self.view(self.embed(input_ids)))

    def run(self, view, **fields):
        config = plain_config(r=3, target_modules=["layer"], **fields)
        return tucka.apply(self.Sums(view), config)(input_ids=torch.arange(15).view(3, 5))

    def test_flattened_tokens_are_tied(self):
        assert self.run(lambda x: x.flatten(0, 1)).shape == (15, 4)

    def test_sequence_first_is_not(self):
        with pytest.raises(ValueError, match=r"layer 'layer': leading size 5 .* cannot be tied to 3 samples of 5 pos"):
            self.run(lambda x: x.transpose(0, 1))

    def test_a_selection_of_tokens_is_not(self):
        with pytest.raises(ValueError, match=r"leading size 7 .* cannot be tied to 3 samples"):
            self.run(lambda x: x.flatten(0, 1)[:7])

    def test_a_batch_route_serves_any(self):
        assert self.run(lambda x: x.flatten(0, 1)[:7], routing="batch").shape == (7, 4)


def test_positions_shared_by_all_samples_see_the_shared_slice_alone():
    """DeBERTa applies its query and key layers to relative positions, which are no sample's."""
    model = adapted("deberta", torch.float64, target_modules=["query_proj", "key_proj"]).eval()
    batch = decoder_inputs("deberta", text_batch(3, padded=False))
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(**{k: v[i : i + 1] for k, v in batch.items()}).logits for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_a_speech_model_says_which_tokens_its_mask_leaves():
    """The mask covers the waveform; the router sees the tokens made from it."""
    convolutions = dict(conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    positions = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    model = tf.Wav2Vec2Model(tf.Wav2Vec2Config(**convolutions, **sizes, **positions)).double().eval()
    config = plain_config(r=4, target_modules=["q_proj", "v_proj"], init_router="kaiming", pooling="mean")
    model = tucka.apply(model, config)
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 200:] = 0
    features = []
    router = tucka.model.layers_of(model)[0].tucka_router["default"]
    router.feature = lambda x, keep: features.append(keep) or type(router).feature(router, x, keep)
    with torch.no_grad():
        model(torch.randn(2, 400, dtype=torch.float64), attention_mask=mask)
    tokens = model.get_base_model()._get_feat_extract_output_lengths(torch.tensor([400, 200]))
    assert features[0].sum(1).tolist() == tokens.tolist()


def test_a_mask_that_stops_at_the_outer_model_still_counts():
    class Wrapper(nn.Module):
        """Keeps the mask from the model inside."""

        def __init__(self):
            super().__init__()
            self.encoder = build("bert", torch.float64)

        def forward(self, input_ids, attention_mask):
            return self.encoder(input_ids=input_ids).logits

    config = plain_config(r=4, target_modules=["query"], init_router="kaiming")
    model = tucka.apply(Wrapper(), config).eval()
    batch = text_batch(3)
    other = dict(batch, input_ids=torch.where(batch["attention_mask"].bool(), batch["input_ids"], 9))
    with torch.no_grad(), tucka.record_routes(model) as routes:
        model(**batch), model(**other)
    assert torch.equal(routes[0].gates, routes[1].gates)


def test_a_forward_that_was_interrupted_leaves_nothing_behind():
    model = adapted("bert").eval()
    first, second = batch_for("bert"), batch_for("bert", samples=2)
    with tucka.record_routes(model) as routes:
        model(**second)

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model.get_base_model().bert.pooler.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**first)
    handle.remove()
    with tucka.record_routes(model) as again:
        model(**second)
    assert torch.equal(again[0].gates, routes[0].gates)


def test_router_module_chooses_the_layer():
    targets = ["query", "value"]
    name = "bert.encoder.layer.0.attention.self.value"
    chosen = tucka.apply(build("bert"), plain_config(r=4, target_modules=targets, router_module=name))
    layers = {layer.name: layer for layer in tucka.model.layers_of(chosen)}
    assert [n for n, layer in layers.items() if layer.tucka_router] == [name]
    with pytest.raises(RuntimeError, match=r"self\.query' ran before any layer that may feed the router: .*value"):
        chosen(**batch_for("bert"))


def test_a_router_of_another_width_names_both():
    class Reversed(nn.Module):
        """Runs its layers in the opposite order of their registration."""

        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(4, 2), nn.Linear(6, 4)

        def forward(self, x):
            return self.second(self.first(x))

    model = tucka.apply(Reversed(), plain_config(r=2, target_modules=["first", "second"]))
    with pytest.raises(ValueError, match=r"layer 'first' ran first and has 6 input features, but .* built for 4"):
        model(torch.randn(3, 6))
    model = tucka.apply(Reversed(), plain_config(r=2, target_modules=["first", "second"], router_module="first"))
    assert model(torch.randn(3, 6)).shape == (3, 2)
