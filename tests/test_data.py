"""Batches from files against what was written, models from directories, and refusals that name the fault."""

import gzip
import json

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, adapted, batch_for, build
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from analysis import observe
from analysis.data import LABEL, load_model, read_data

WORDS = [f"w{index}" for index in range(VOCABULARY - 4)]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 unknown w7 w8", "w9 w9"]


@pytest.fixture(scope="module")
def bert():
    return adapted("bert").eval()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A directory with a tokenizer of whole words."""
    known = {word: index for index, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *WORDS])}
    cutter = Tokenizer(WordLevel(known, unk_token="[UNK]"))
    cutter.pre_tokenizer = Whitespace()
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=cutter, unk_token="[UNK]", eos_token="[EOS]", model_max_length=4
    ).save_pretrained(directory)
    return directory


def arrays_of(batch):
    return {name: value.numpy() for name, value in batch.items()}


def together(data, name):
    return torch.cat([batch[name] for batch in data.batches])


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_arrays_become_the_models_arguments(kind, bert, tmp_path):
    batch, path = batch_for("bert", 7), tmp_path / f"data.{kind}"
    domain = torch.arange(7) % 3
    if kind == "npz":
        np.savez(path, **arrays_of(batch), domain=domain.numpy(), unrelated=np.zeros((7, 2)))
    else:
        save_file({**batch, "domain": domain, "unrelated": torch.zeros(7, 2)}, path)
    data = read_data(path, bert, labels="domain", size=3)
    assert data.labels == LABEL and data.samples == 7 and [len(part[LABEL]) for part in data.batches] == [3, 3, 1]
    assert set(data.batches[0]) == {"input_ids", "attention_mask", LABEL}, "neither targets nor what it does not take"
    assert torch.equal(together(data, "input_ids"), batch["input_ids"])
    assert np.concatenate([part[LABEL] for part in data.batches]).tolist() == domain.tolist()
    observed = observe(bert, data.batches, labels=data.labels, progress=False)
    assert observed.labels.tolist() == domain.tolist() and len(observed.routing[""].group) == 7


def test_numbers_are_read_as_the_model_takes_them(bert, tmp_path):
    np.savez(tmp_path / "a.npz", input_ids=np.ones((3, 4), ">i2"), attention_mask=np.ones((3, 4), np.uint8))
    (batch,) = read_data(tmp_path / "a.npz", bert).batches
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert (batch["input_ids"] == 1).all()
    vit = adapted("vit", torch.float64)
    np.savez(tmp_path / "b.npz", pixel_values=np.zeros((2, 1, 8, 8), np.float16))
    assert read_data(tmp_path / "b.npz", vit).batches[0]["pixel_values"].dtype == torch.float64


def test_words_are_labels_and_targets_stay_targets(tmp_path):
    batch = arrays_of(batch_for("t5", 4))
    np.savez(tmp_path / "data.npz", **batch, task=np.array(["a", "b", "a", "ü"]))
    model = adapted("t5").eval()
    data = read_data(tmp_path / "data.npz", model, labels="task")
    assert data.batches[0][LABEL].tolist() == ["a", "b", "a", "ü"]
    assert torch.equal(data.batches[0]["labels"], torch.from_numpy(batch["labels"])), "its decoder starts from them"
    assert observe(model, data.batches, labels=data.labels, progress=False).labels.tolist() == ["a", "b", "a", "ü"]


def test_long_files_are_sampled_alike_and_in_order(bert, tmp_path):
    ids = np.arange(40)[:, None] + np.zeros((1, 3), int)
    np.savez(tmp_path / "data.npz", input_ids=ids, kind=np.arange(40) // 20)
    one, two = (read_data(tmp_path / "data.npz", bert, labels="kind", samples=12, size=5) for _ in range(2))
    rows = together(one, "input_ids")[:, 0]
    assert torch.equal(rows, together(two, "input_ids")[:, 0]) and one.samples == len(rows) == 12
    assert rows.diff().gt(0).all() and rows.max() > 20, "not the head of a sorted file"
    assert (np.concatenate([part[LABEL] for part in one.batches]) == rows.numpy() // 20).all()


@pytest.mark.parametrize("name", ["texts.csv", "texts.csv.gz", "texts.jsonl", "texts.jsonl.gz"])
def test_texts_are_tokenised_padded_and_cut(name, bert, tokenizer, tmp_path):
    lines = [json.dumps({"text": text, "genre": f"g{index % 2}"}) for index, text in enumerate(TEXTS)]
    if ".csv" in name:
        lines = ["text,genre", *(f"{text},g{index % 2}" for index, text in enumerate(TEXTS))]
    content = "\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    data = read_data(tmp_path / name, bert, labels="genre", tokenizer=tokenizer)
    (batch,) = data.batches
    index = {word: place for place, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *WORDS])}
    expected = [[index.get(word, 2) for word in text.split()][:4] for text in TEXTS]
    assert [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"])] == expected
    assert batch["input_ids"].shape == (4, 4) and batch[LABEL].tolist() == ["g0", "g1", "g0", "g1"]
    assert len(observe(bert, data.batches, labels=data.labels, progress=False).routing[""].group) == 4


def test_texts_of_an_encoder_decoder(tokenizer, tmp_path):
    (tmp_path / "texts.csv").write_text("text\n" + "\n".join(TEXTS))
    model = adapted("bart").eval()
    (batch,) = read_data(tmp_path / "texts.csv", model, tokenizer=tokenizer).batches
    assert batch["decoder_input_ids"].shape == (4, 1)
    assert len(observe(model, [batch], progress=False).routing[""].group) == 4


def test_a_saved_adapter_finds_its_base(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    build("bert").save_pretrained(base)
    model = adapted("bert").eval()
    model.save_pretrained(adapter)
    with pytest.raises(ValueError, match=r"base model has to be given.*names none"):
        load_model(adapter)
    batch = batch_for("bert")
    loaded = load_model(adapter, base)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits) and not loaded.training
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    assert torch.equal(load_model(adapter)(**batch).logits, model(**batch).logits)
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "some/where"}))
    with pytest.raises(ValueError, match="'some/where', which is no local directory"):
        load_model(adapter)


@pytest.mark.parametrize("architectures, message", [(None, "names no architecture"), (["NoSuchModel"], "lacks")])
def test_a_base_of_unknown_class(architectures, message, tmp_path):
    build("bert").save_pretrained(tmp_path / "base")
    adapted("bert").save_pretrained(tmp_path / "adapter")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": architectures}))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "adapter", tmp_path / "base")


ARRAYS = dict(input_ids=np.ones((3, 4), int))
BAD_ARRAYS = [
    (dict(x=np.ones((3, 4))), {}, "holds x, none of them an argument of BertForSequenceClassification"),
    ({**ARRAYS, "attention_mask": np.ones((2, 4))}, {}, "one length.*input_ids: 3, attention_mask: 2"),
    ({**ARRAYS, "domain": np.int64(3)}, {}, "one row per sample; found input_ids: 3, domain: None"),
    (dict(input_ids=np.ones((0, 4), int)), {}, "one row per sample; found input_ids: 0"),
    ({}, {}, "found no array"),
    (ARRAYS, dict(labels="domain"), "no labels 'domain'; it holds input_ids"),
    (ARRAYS, dict(labels="input_ids"), "one value per sample, got shape"),
    (dict(input_ids=np.array(["a", "b"])), {}, "argument 'input_ids' of the model is numeric"),
    ({**ARRAYS, "d": np.array([1.0, np.nan, 2.0])}, dict(labels="d"), "missing in 1 of 3 rows"),
    (ARRAYS, dict(samples=0), "at least 1, got 0"),
]


@pytest.mark.parametrize("arrays, options, message", BAD_ARRAYS)
def test_arrays_that_do_not_fit(arrays, options, message, bert, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path / "data.npz", bert, **options)


def test_pickles_and_broken_files_are_refused(bert, tmp_path):
    np.savez(tmp_path / "pickle.npz", input_ids=np.array([{"a": 1}], object))
    np.save(tmp_path / "single.npy", np.ones(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    for name in ("cut.npz", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"nonsense")
    np.savez(tmp_path / "whole.npz", input_ids=np.ones((300, 4)))
    (tmp_path / "half.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    for name in ("pickle.npz", "single.npz", "cut.npz", "cut.safetensors", "half.npz"):
        with pytest.raises(ValueError, match=f"{name} is not a whole"):
            read_data(tmp_path / name, bert)


BAD_TABLES = [
    ("a.csv", "words\na b\n", "rows and a column 'text'; found 1 rows and the columns words"),
    ("a.csv", "text\n", "found 0 rows"),
    ("a.csv", "", "cannot be read as a table"),
    ("a.csv.gz", "text\nno gzip", "cannot be read as a table"),
    ("a.jsonl", "{", "cannot be read as a table"),
    ("a.jsonl", '{"text": "a"}\n{"text": 7}', "holds texts, found 7 in row 2"),
    ("a.csv", "text\na\n", "texts need a tokenizer"),
    ("a.parquet", "", "data is one of .safetensors, .npz, .jsonl, .csv"),
]


@pytest.mark.parametrize("name, content, message", BAD_TABLES)
def test_tables_that_do_not_fit(name, content, message, bert, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path / name, bert)


def test_a_missing_file(bert, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_data(tmp_path / "none.npz", bert)
