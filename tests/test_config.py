"""Configurations: validation, the paper's preset, the published code's field names, the file format."""

import json
import warnings
from pathlib import Path

import pytest
from peft import PeftConfig, PeftType

import tucka
from tucka import formats
from tucka.config import FORMAT_VERSION, PAPER

PUBLISHED = sorted((Path(__file__).parent / "data" / "golden").glob("*_official_adapter"))


@pytest.mark.parametrize(
    "fields,message",
    [
        *[({name: 0}, f"{name}=0 is not a whole number of at least 1") for name in "rktp"],
        *[({name: -3}, f"{name}=-3 is not a whole number of at least 1") for name in "rktp"],
        ({"r": True}, "r=True is not a whole number"),
        ({"k": 2.0}, "k=2.0 is not a whole number"),
        ({"r": "8"}, "r='8' is not a whole number"),
        ({"alpha": float("nan")}, "alpha=nan is not a finite number"),
        ({"alpha": "2"}, "alpha='2' is not a finite number"),
        ({"routing": "token"}, "routing='token' is not one of 'sample', 'batch'"),
        ({"affinity": "dot"}, "affinity='dot' is not one of 'paper', 'cosine', 'distance'"),
        ({"pooling": "max"}, "pooling='max' is not one of 'mean', 'mean_std'"),
        ({"form": "dense"}, "form='dense' is not one of 'multiplicative', 'additive'"),
        ({"trainable": "router"}, "trainable='router' is not one of 'all', 'core'"),
        ({"init_router": "zeros"}, "init_router='zeros' is not one of"),
        ({"init_experts": "zeros"}, "init_experts='zeros' is not one of"),
        ({"bias": "lora_only"}, "bias='lora_only' is not one of 'none', 'all', 'tucka_only'"),
        ({"routing": ["sample"]}, r"routing=\['sample'\] is not one of"),
        ({"normalize": 1}, "normalize=1 is not one of False, True, 'bounded'"),
        ({"rank_pattern": ["q"]}, r"rank_pattern=\['q'\] is not a dictionary"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0 is not a whole number"),
        ({"router_module": 3}, "router_module=3 is not a layer name"),
        ({"sync_route": True}, "sync_route=True routes the global batch as one, but routing='sample'"),
        ({"target_modules": "q.*", "layers_to_transform": [1]}, "layers_to_transform selects among listed"),
        ({"layers_pattern": "h"}, "layers_pattern is set but layers_to_transform is not"),
        ({"format_version": FORMAT_VERSION + 1}, f"of a later tucka; this one reads up to {FORMAT_VERSION}"),
        ({"format_version": -1}, "format_version=-1 is not a whole number of at least 0"),
        ({"task_type": "POETRY"}, "Invalid task type"),
    ],
)
def test_what_can_be_rejected_without_a_model_is(fields, message):
    with pytest.raises(ValueError, match=message):
        tucka.TuckAConfig(**fields)


def test_unknown_options_are_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        tucka.TuckAConfig(rank=8)


def test_a_zero_core_under_normalisation_warns():
    with pytest.warns(UserWarning, match="normalize=True divides a zero core by its norm"):
        tucka.TuckAConfig(normalize=True)


def test_the_paper_preset():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = tucka.TuckAConfig.paper(r=3, alpha=5)
    assert config.peft_type == PeftType.TUCKA
    assert all(getattr(config, name) == value for name, value in PAPER.items())
    assert (config.r, config.k, config.t, config.p, config.alpha) == (3, 2, 2, 2, 5)
    assert not config.pool_padding and not config.from_published_code


def test_every_field_survives_its_file(tmp_path):
    config = tucka.TuckAConfig(
        r=3, k=5, t=1, p=4, alpha=2.5, routing="batch", pooling="mean", form="additive", tie_factors=False,
        share_factors=True, shared_expert=False, trainable="core", init_router="kaiming", init_experts="kaiming",
        balance_bias=True, balance_rate=0.5, sync_route=True, router_module="q", rank_pattern={"v": 2},
        target_modules=["q", "v"], modules_to_save=["head"], bias="all",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["format_version"] == FORMAT_VERSION
    assert not {"ec_perturb_scale", "use_alb", "router_name"} & set(stored)
    for cls in (tucka.TuckAConfig, PeftConfig):
        assert cls.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("directory", PUBLISHED, ids=lambda path: path.name)
@pytest.mark.parametrize("cls", [tucka.TuckAConfig, PeftConfig])
def test_published_configurations_are_read_and_mapped(cls, directory):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = cls.from_pretrained(directory)
    assert all(getattr(config, name) == value for name, value in PAPER.items())
    assert config.pool_padding and config.from_published_code
    assert config.perturb_scale == 1 and config.balance_rate == 0.001 and config.router_module is None


def test_published_fields_each_have_their_place():
    config = tucka.TuckAConfig(
        ec_perturb_scale=7.0, use_kaiming_init_ec=True, use_alb=True, alb_gamma=0.25, router_name="layer.0.query"
    )
    assert (config.perturb_scale, config.init_router, config.balance_bias) == (7.0, "kaiming", True)
    assert (config.balance_rate, config.router_module) == (0.25, "layer.0.query")


def test_a_file_without_our_format_version_has_the_papers_semantics(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "TUCKA", "r": 2, "target_modules": ["q"]}))
    config = tucka.TuckAConfig.from_pretrained(tmp_path)
    assert config.normalize and config.routing == "batch" and config.r == 2 and config.format_version == FORMAT_VERSION


def test_equal_configurations_make_equal_files(tmp_path):
    """A set's order differs between processes; a file's must not."""
    names = ["value", "query", "dense", "key"]
    for place, targets in (("one", names), ("other", names[::-1])):
        tucka.TuckAConfig(target_modules=targets).save_pretrained(tmp_path / place)
    one, other = ((tmp_path / place / "adapter_config.json").read_text() for place in ("one", "other"))
    assert '"target_modules": [\n    "dense",\n    "key",\n    "query",\n    "value"\n  ]' in one
    assert one == other


def test_every_earlier_version_has_its_upgrade():
    assert sorted(formats.UPGRADES) == list(range(FORMAT_VERSION))


def write_config(directory, **fields):
    stored = {"peft_type": "TUCKA", "target_modules": ["q"], "format_version": FORMAT_VERSION, **fields}
    (directory / "adapter_config.json").write_text(json.dumps(stored))


@pytest.mark.parametrize("cls", [tucka.TuckAConfig, PeftConfig])
def test_a_file_of_an_older_version_becomes_the_present_one_step_by_step(cls, tmp_path, monkeypatch):
    """Two later versions, as a future release may have them: one changes what `alpha` is, the next adds a field."""
    monkeypatch.setattr(formats, "FORMAT_VERSION", FORMAT_VERSION + 2)
    steps = {
        FORMAT_VERSION: lambda fields: {"alpha": fields["alpha"] * fields["r"]},
        FORMAT_VERSION + 1: lambda fields: {"warm_start": fields["alpha"] + 1},
    }
    monkeypatch.setattr(formats, "UPGRADES", {**formats.UPGRADES, **steps})
    write_config(tmp_path, alpha=3.0, r=2, k=5)
    config = cls.from_pretrained(tmp_path)
    assert (config.alpha, config.warm_start, config.k, config.format_version) == (6.0, 7.0, 5, FORMAT_VERSION + 2)
    write_config(tmp_path, alpha=3.0, r=2, format_version=FORMAT_VERSION + 1)
    assert cls.from_pretrained(tmp_path).alpha == 3.0
    write_config(tmp_path, alpha=3.0, r=2, format_version=FORMAT_VERSION + 2)
    assert cls.from_pretrained(tmp_path).warm_start == 0.0


def test_a_later_version_is_refused_before_anything_else_of_the_file_is_judged(tmp_path):
    write_config(tmp_path, format_version=FORMAT_VERSION + 1, routing="token", r="auto", shards=[1, 2])
    message = f"format_version={FORMAT_VERSION + 1} is of a later tucka; this one reads up to {FORMAT_VERSION}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message):
            tucka.TuckAConfig.from_pretrained(tmp_path)


def test_unknown_fields_of_the_present_version_are_left_out_and_named(tmp_path):
    write_config(tmp_path, r=3, colour="blue", shape=None)
    with pytest.warns(UserWarning, match=r"does not know: \['colour', 'shape'\]\. They are left out") as warned:
        config = tucka.TuckAConfig.from_pretrained(tmp_path)
    assert config.r == 3 and not {"colour", "shape"} & config.to_dict().keys()
    assert len(warned) == 1 and warned[0].filename == __file__


def test_whole_numbers_beyond_torchs_are_floats():
    """A tensor times such a whole number would raise in the middle of a forward."""
    config = tucka.TuckAConfig(alpha=10**30, lasso=2**63, perturb_scale=3)
    assert (config.alpha, config.lasso) == (1e30, 2.0**63) and isinstance(config.alpha, float)
    assert isinstance(config.perturb_scale, int)
