"""Parameter groups, and optimiser steps that leave the cores of unselected groups alone."""

import copy

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from conftest import adapted, batch_for, build, plain_config
from peft import LoraConfig, get_peft_model
from test_device_sync import Watch

import tucka
from tucka.optim import hold_unselected, param_groups

ADAM = dict(lr=0.1, weight_decay=0.1)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, **ADAM, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, **ADAM, foreach=True, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, **ADAM, fused=True),
    "adam": lambda p: torch.optim.Adam(p, **ADAM),
    "nadam": lambda p: torch.optim.NAdam(p, **ADAM),
    "radam": lambda p: torch.optim.RAdam(p, **ADAM),
    "adamax": lambda p: torch.optim.Adamax(p, **ADAM),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, initial_accumulator_value=0.5),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, weight_decay=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
}


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def cores(model):
    return [layer.tucka_experts["default"].core for layer in tucka.model.layers_of(model)]


def model_of(**fields):
    fields = {"routing": "batch", "target_modules": ["query", "value"], "k": 4, **fields}
    return adapted("bert", **fields).train()


def step(model, optimizer, group, scale=1.0):
    """One step in which every unit chose that group."""
    optimizer.zero_grad()
    with tucka.pin_route(model, [group]):
        (model(**batch_for("bert", samples=4)).loss * scale).backward()
    optimizer.step()


def states(optimizer, core):
    """What the optimiser keeps for the slices of a core, by name."""
    entries = optimizer.state.get(core, {}).items()
    return {key: value for key, value in entries if torch.is_tensor(value) and value.ndim and len(value) == len(core)}


def snapshot(model, optimizer):
    held = [{"core": core, **states(optimizer, core)} for core in cores(model)]
    return [{key: value.detach().clone() for key, value in entries.items()} for entries in held]


class TestHeldGroups:
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_unselected_groups_keep_their_bits(self, make, normalize):
        model = model_of(normalize=normalize, init_experts="kaiming")
        optimizer = make(trainable(model))
        hold_unselected(optimizer, model)
        for group in (1, 0, 1, 1, 2, 0):
            before = snapshot(model, optimizer)
            step(model, optimizer, group)
            for old, new in zip(before, snapshot(model, optimizer)):
                assert not torch.equal(new["core"][group], old["core"][group])
                others = [i for i in range(4) if i != group]
                for key, value in old.items():
                    assert torch.equal(new[key][others], value[others]), key

    def test_without_it_they_move(self):
        model = model_of()
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        before = snapshot(model, optimizer)
        step(model, optimizer, 0)
        assert all(
            not torch.equal(new["core"][1], old["core"][1]) for old, new in zip(before, snapshot(model, optimizer))
        )

    @pytest.mark.parametrize("name", ["sgd", "nesterov"])
    def test_a_group_trains_as_if_it_were_a_parameter_of_its_own(self, name):
        """The reference: every slice is a parameter, without gradient where it was not selected."""
        model = model_of()
        optimizer = OPTIMIZERS[name](trainable(model))
        hold_unselected(optimizer, model)
        slices = [[torch.nn.Parameter(part.detach().clone()) for part in core] for core in cores(model)]
        reference = OPTIMIZERS[name]([part for parts in slices for part in parts])
        for group in (2, 0, 2, 2, 1, 0):
            step(model, optimizer, group)
            for core, parts in zip(cores(model), slices):
                for index, part in enumerate(parts):
                    part.grad = core.grad[index].clone() if index == group else None
            reference.step()
        for core, parts in zip(cores(model), slices):
            assert torch.equal(core.detach(), torch.stack([part.detach() for part in parts]))

    @pytest.mark.parametrize("name", ["sgd foreach", "adamw", "adamw foreach", "rmsprop"])
    def test_everything_else_steps_as_before(self, name):
        model = model_of()
        plain = copy.deepcopy(model)
        optimizer, other = (OPTIMIZERS[name](trainable(each)) for each in (model, plain))
        hold_unselected(optimizer, model)
        step(model, optimizer, 1)
        step(plain, other, 1)
        for (name, mine), theirs in zip(model.named_parameters(), plain.parameters()):
            if name.endswith(".core"):
                mine, theirs = mine[1], theirs[1]
            assert torch.equal(mine, theirs), name

    def test_accumulated_gradients_decide(self):
        model = model_of()
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        hold_unselected(optimizer, model)
        before = snapshot(model, optimizer)
        for group in (0, 3):
            with tucka.pin_route(model, [group]):
                model(**batch_for("bert", samples=4)).loss.backward()
        optimizer.step()
        for old, new in zip(before, snapshot(model, optimizer)):
            changed = (new["core"] != old["core"]).flatten(1).any(1)
            assert changed.tolist() == [True, False, False, True]

    def test_a_core_without_gradient_and_a_closure(self):
        model = model_of()
        optimizer = OPTIMIZERS["sgd"](trainable(model))
        hold_unselected(optimizer, model)
        before = snapshot(model, optimizer)
        optimizer.step()
        assert all(torch.equal(new["core"], old["core"]) for old, new in zip(before, snapshot(model, optimizer)))

        def closure():
            with tucka.pin_route(model, [2]):
                loss = model(**batch_for("bert", samples=4)).loss
            loss.backward()
            return loss

        optimizer.step(closure)
        for old, new in zip(before, snapshot(model, optimizer)):
            assert (new["core"] != old["core"]).flatten(1).any(1).tolist() == [False, False, True, False]

    def test_routed_by_the_model_itself(self):
        """Sample routing, no pinned route: exactly the groups that were recorded move."""
        model = model_of(routing="sample", k=6)
        optimizer = OPTIMIZERS["adamw foreach"](trainable(model))
        hold_unselected(optimizer, model)
        for samples in (2, 3, 5):
            before = snapshot(model, optimizer)
            optimizer.zero_grad()
            with tucka.record_routes(model) as routes:
                model(**batch_for("bert", samples=samples)).loss.backward()
            optimizer.step()
            chosen = set(routes[0].group.tolist())
            assert len(chosen) < 6
            for old, new in zip(before, snapshot(model, optimizer)):
                changed = (new["core"] != old["core"]).flatten(1).any(1)
                assert set(changed.nonzero().flatten().tolist()) == chosen

    def test_after_removal_the_optimizer_is_its_own_again(self):
        model = model_of()
        optimizer = OPTIMIZERS["sgd"](trainable(model))
        handle = hold_unselected(optimizer, model)
        step(model, optimizer, 0)
        handle.remove()
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
        before = snapshot(model, optimizer)
        step(model, optimizer, 0)
        assert all(
            not torch.equal(new["core"][1], old["core"][1]) for old, new in zip(before, snapshot(model, optimizer))
        )

    def test_it_waits_for_nothing_and_adds_nothing_to_the_state(self):
        model = model_of()
        plain = copy.deepcopy(model)
        optimizer, other = (OPTIMIZERS["sgd"](trainable(each)) for each in (model, plain))
        hold_unselected(optimizer, model)
        step(model, optimizer, 0)
        step(plain, other, 0)
        assert optimizer.state_dict()["state"].keys() == other.state_dict()["state"].keys()
        with Watch() as watch:
            optimizer.step()
        assert watch.found == []

    def test_a_restored_optimizer_holds_on(self):
        model = model_of()
        optimizer = OPTIMIZERS["adamw"](trainable(model))
        hold_unselected(optimizer, model)
        step(model, optimizer, 0)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = snapshot(model, optimizer)
        step(model, optimizer, 1)
        for old, new in zip(before, snapshot(model, optimizer)):
            assert all(torch.equal(new[key][0], value[0]) for key, value in old.items())

    def test_in_the_trainer(self, tmp_path):
        model = model_of(balance_bias=True, balance_rate=0.0)
        with torch.no_grad():  # nobody chooses the last group
            for layer in tucka.model.layers_of(model):
                for router in layer.tucka_router.values():
                    router.balance_bias[3] = -9
        optimizer = torch.optim.AdamW(param_groups(model, 0.1, adapter_weight_decay=0.1))
        handle = hold_unselected(optimizer, model)
        before = snapshot(model, optimizer)
        batch = batch_for("bert", samples=8)
        data = [{key: value[i] for key, value in batch.items()} for i in range(8)]
        args = tf.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, max_steps=5, report_to=[], save_strategy="no", use_cpu=True
        )
        tf.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()
        handle.remove()
        for old, new in zip(before, snapshot(model, optimizer)):
            assert torch.equal(new["core"][3], old["core"][3]) and not torch.equal(new["core"], old["core"])
            assert not new["exp_avg"][3].any()

    def test_an_accelerated_optimizer_is_unwrapped(self):
        model = model_of()
        inner = OPTIMIZERS["adamw"](trainable(model))
        optimizer = Accelerator(cpu=True).prepare_optimizer(inner)
        hold_unselected(optimizer, model)
        before = snapshot(model, inner)
        step(model, optimizer, 0)
        assert all(torch.equal(new["core"][1:], old["core"][1:]) for old, new in zip(before, snapshot(model, inner)))

    def test_what_cannot_be_held(self):
        model = model_of()
        optimizer = torch.optim.SGD(model_of().parameters(), lr=0.1)
        with pytest.raises(ValueError, match="the optimizer holds 0 of the 4 cores of adapter 'default'"):
            hold_unselected(optimizer, model)
        with pytest.raises(ValueError, match=r"adapter 'other' is not one of \['default'\]"):
            hold_unselected(optimizer, model, "other")


class TestParamGroups:
    def expect_each_once(self, model, groups):
        given = [parameter for group in groups for parameter in group["params"]]
        assert len({id(parameter) for parameter in given}) == len(given)
        assert {id(parameter) for parameter in given} == {id(parameter) for parameter in trainable(model)}
        names = dict(model.named_parameters(remove_duplicate=False))
        for group in groups:
            assert len(group["parameter_names"]) == len(group["params"]) > 0
            assert all(names[name] is parameter for name, parameter in zip(group["parameter_names"], group["params"]))

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"trainable": "core"},
            {"share_factors": True},
            {"form": "additive"},
            {"tie_factors": False, "shared_expert": False},
            {"task_type": "SEQ_CLS"},
            {"modules_to_save": ["classifier"], "bias": "all"},
        ],
        ids=str,
    )
    def test_every_trainable_parameter_once(self, fields):
        model = tucka.apply(build("bert"), plain_config(r=4, **fields))
        groups = param_groups(model, 0.1)
        self.expect_each_once(model, groups)
        by_name = {group["name"]: group["parameter_names"] for group in groups}
        ends = {kind: {name.rsplit(".", 1)[1] for name in names} for kind, names in by_name.items()}
        assert ends["cores"] <= {"core", "shared_core"} and ends["router"] == {"centroids"}
        assert ends["factors"] <= {"input_factor", "output_factor", "expert_factor"}
        assert ("other" in by_name) == ("task_type" in fields or "bias" in fields)
        assert all("tucka_" not in name for name in by_name.get("other", []))

    def test_towers(self):
        model = tucka.apply(build("clip"), plain_config(r=4, target_modules="all-linear"))
        self.expect_each_once(model, param_groups(model, 0.1))

    def test_rates_and_decay(self):
        model = tucka.apply(build("bert"), plain_config(r=4, task_type="SEQ_CLS"))

        def settings(**options):
            groups = param_groups(model, 0.1, **options)
            return {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}

        assert settings() == dict.fromkeys(("cores", "factors", "router", "other"), (0.1, 0.0))
        found = settings(factor_lr=0.2, core_lr=0.3, router_lr=0.0, weight_decay=0.4)
        assert found == {"cores": (0.3, 0.0), "factors": (0.2, 0.0), "router": (0.0, 0.0), "other": (0.1, 0.4)}
        assert settings(adapter_weight_decay=0.5)["cores"] == (0.1, 0.5)
        assert settings(adapter_weight_decay=0.5)["other"] == (0.1, 0.0)

    @pytest.mark.parametrize(
        "option, apart, rest, left, lr",
        [
            ("shared_lr", "shared_core", "cores", "core", 0.2),
            ("expert_lr", "expert_factor", "factors", "input_factor", 0.3),
        ],
    )
    def test_some_parameters_may_have_a_rate_of_their_own(self, option, apart, rest, left, lr):
        model = tucka.apply(build("bert"), plain_config(r=4))
        made = param_groups(model, 0.1, core_lr=0.2, factor_lr=0.3, **{option: 0.4})
        self.expect_each_once(model, made)
        groups = {group["name"]: group for group in made}
        ends = {name: {parameter.rsplit(".", 1)[1] for parameter in groups[name]["parameter_names"]} for name in groups}
        assert ends[apart] == {apart} and groups[apart]["lr"] == 0.4
        assert ends[rest] == {left} and groups[rest]["lr"] == lr

    def test_groups_come_in_one_order(self):
        """Optimisers save their state by place."""
        model = tucka.apply(build("bert"), plain_config(r=4, task_type="SEQ_CLS"))
        names = [group["name"] for group in param_groups(model, 0.1, expert_lr=0.2)]
        assert names == ["cores", "factors", "expert_factor", "router", "other"]

    def test_an_optimizer_takes_saves_and_steps_them(self):
        model = model_of()
        optimizer = torch.optim.AdamW(param_groups(model, 0.1, router_lr=0.0))
        router = next(p for group in optimizer.param_groups if group["name"] == "router" for p in group["params"])
        before = router.clone()
        step(model, optimizer, 0)
        optimizer.load_state_dict(optimizer.state_dict())
        assert torch.equal(router, before) and optimizer.param_groups[0]["name"] == "cores"

    def test_of_one_adapter(self):
        model = tucka.apply(build("bert"), plain_config(r=4, task_type="SEQ_CLS"))
        model.add_adapter("other", plain_config(r=3, task_type="SEQ_CLS"))
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        self.expect_each_once(model, param_groups(model, 0.1))
        names = {group["name"]: group["parameter_names"] for group in param_groups(model, 0.1, adapter_name="other")}
        for kind in ("cores", "factors", "router"):
            assert names[kind] and all(".other." in name for name in names[kind])
        assert any("embeddings" in name for name in names["other"])

    def test_what_cannot_be_grouped(self):
        with pytest.raises(ValueError, match=r"the model has no Tucker experts; wrap it with tucka.apply first"):
            param_groups(get_peft_model(build("bert"), LoraConfig(target_modules=["query"])), 0.1)
        model = tucka.apply(build("bert"), plain_config(r=4))
        total = len(list(model.parameters()))
        with pytest.raises(ValueError, match=r"adapter 'other' is not one of \['default'\]"):
            param_groups(model, 0.1, adapter_name="other")
        with pytest.raises(ValueError, match=f"none of the model's {total} parameters trains"):
            param_groups(model.requires_grad_(False), 0.1)
