"""Adapters in the checkpoint format of the paper's published code: written as they were read."""

import json
import math

import pytest
import torch
from conftest import adapted, batch_for, build, first_output
from peft import PeftModel
from safetensors.torch import load_file
from test_golden import NAMES, Golden

from tucka.export import to_published
from tucka.export.published import IMPLIED

FORMAT = dict(
    routing="batch", affinity="paper", pooling="mean", normalize=True, form="multiplicative", share_factors=False,
    shared_expert=False, init_experts="kaiming", pool_padding=True,
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_published_adapter_comes_back_bit_for_bit(name, tmp_path):
    golden = Golden(name)
    model = golden.loaded()
    assert to_published(model, tmp_path) == tmp_path
    written = load_file(tmp_path / "adapter_model.safetensors")
    official = load_file(golden.adapter / "adapter_model.safetensors")
    assert written.keys() == official.keys()
    assert all(
        written[key].dtype == value.dtype and torch.equal(written[key], value) for key, value in official.items()
    )
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = json.loads((golden.adapter / "adapter_config.json").read_text())
    assert fields.keys() == expected.keys()
    loose = ("target_modules", "auto_mapping", "base_model_name_or_path")
    assert {key: fields[key] for key in fields if key not in loose} == {
        key: expected[key] for key in expected if key not in loose
    }
    assert fields["auto_mapping"]["base_model_class"] == expected["auto_mapping"]["base_model_class"]
    again = PeftModel.from_pretrained(golden.base(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**golden.inputs).logits, model(**golden.inputs).logits)
    assert set(again.targeted_module_names) == set(model.targeted_module_names)


def test_one_of_ours_of_that_kind_is_written_with_its_head(tmp_path):
    fields = {**FORMAT, "modules_to_save": ["classifier"], "target_modules": r".*layer\.0.*query|.*dense", "alpha": 1.5}
    model, batch = adapted("bert", **fields).eval(), batch_for("bert")
    to_published(model, tmp_path)
    again = PeftModel.from_pretrained(build("bert"), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(first_output(again(**batch)), first_output(model(**batch)))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["alpha"] == 1.5 and written["modules_to_save"] == ["classifier"]


OTHER = dict(
    routing="sample", affinity="cosine", pooling="mean_std", normalize=False, form="additive", tie_factors=False,
    share_factors=True, shared_expert=True, trainable="core", pool_padding=False, balance_bias=True, router_depth=1,
    lasso=0.5,
)  # fmt: skip


@pytest.mark.parametrize("field", OTHER)
def test_what_the_format_cannot_express_is_named(field, tmp_path):
    model = adapted("bert", **{**FORMAT, field: OTHER[field]})
    message = rf"cannot express {field}={OTHER[field]!r}: its code always has {field}={IMPLIED[field]!r}"
    with pytest.raises(ValueError, match=message):
        to_published(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_refusals(tmp_path):
    with pytest.raises(TypeError, match="to_published takes a PeftModel, but got a BertForSequenceClassification"):
        to_published(build("bert"), tmp_path)
    with pytest.raises(ValueError, match=r"has one rank, r=4, but layer '.*value' has rank 2"):
        to_published(adapted("bert", **FORMAT, rank_pattern={"value": 2}), tmp_path)
    with pytest.raises(ValueError, match="holds one router, but the model has 2: "):
        to_published(adapted("clip", **FORMAT), tmp_path)
    with pytest.raises(ValueError, match="the router has not started, and the published format cannot say so"):
        to_published(adapted("bert", calibrate=False, **FORMAT), tmp_path)
    unpadded = adapted("bert", **{**FORMAT, "pool_padding": False}, trainable="core")
    with pytest.raises(ValueError, match="ignore names 'form', but the fields that may be lost are pool_padding, "):
        to_published(unpadded, tmp_path, ignore=["form"])
    to_published(unpadded, tmp_path / "out", ignore=["pool_padding", "trainable"])
    again = PeftModel.from_pretrained(build("bert"), tmp_path / "out").eval()
    batch = batch_for("bert", padded=False)
    with torch.no_grad():
        found, expected = first_output(again(**batch)), first_output(unpadded.eval()(**batch))
    assert torch.equal(found, expected) and not math.isnan(float(found.sum()))
