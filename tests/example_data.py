"""Small models and data sets in the hub's layout, for the tests of the examples."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from conftest import NO_DROPOUT
from datasets import ClassLabel, Dataset, Features, Image, Value
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # examples are not part of what is installed

from common import docstrings

load = importlib.import_module
"""Import an example by its name."""

WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "fish", "runs", "sits", "eats"]


def sentences(count, seed=0):
    """Sentences of four to seven words whose label the first word tells, no two alike."""
    rng = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        label = len(found) % 3
        found[" ".join([WORDS[label], *rng.choice(WORDS[3:], rng.integers(3, 7))])] = label
    return list(found.items())


def keep_docstrings(directory, count=60):
    """Let the example find sentences of three modules where it keeps what it reads."""
    directory.mkdir(parents=True, exist_ok=True)
    pool = {module: [] for module in ("a", "b", "c")}
    for text, label in sentences(count):
        pool["abc"[label]].append(text)
    docstrings.cache_in(directory).write_text(json.dumps(pool))
    return directory


def save_text_model(directory, architecture="bert"):
    """A tiny encoder and a tokenizer of words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special))
    tf.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(directory)
    sizes = dict(**NO_DROPOUT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    torch.manual_seed(0)
    if architecture == "bert":
        tf.BertModel(tf.BertConfig(**sizes, vocab_size=20, max_position_embeddings=32)).save_pretrained(directory)
    else:
        positions = dict(relative_attention=True, position_buckets=4, share_att_key=True, pos_att_type=["c2p", "p2c"])
        extra = dict(norm_rel_ebd="layer_norm", position_biased_input=False, max_position_embeddings=600)
        config = tf.DebertaV2Config(**sizes, **positions, **extra, vocab_size=20, type_vocab_size=0)
        # As the published checkpoint is: in half precision, which no adapter is to be trained in.
        tf.DebertaV2Model(config).half().save_pretrained(directory)
    return str(directory)


def save_glue(directory, columns, sizes=(60, 20), configured=True):
    """A task of GLUE with those columns of text, as a clone of the hub's repository has it."""
    folder = directory / "rte"
    folder.mkdir(parents=True)
    features = Features({**{name: Value("string") for name in columns}, "label": ClassLabel(names=["no", "yes"])})
    drawn = sentences(sum(sizes), seed=1)
    for split, rows in (("train", drawn[: sizes[0]]), ("validation", drawn[sizes[0] :])):
        texts = {name: [text for text, _ in rows] for name in columns}
        part = Dataset.from_dict({**texts, "label": [int(label == 0) for _, label in rows]}, features=features)
        part.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    if configured:
        paths = "".join(f"  - split: {split}\n    path: rte/{split}-*\n" for split in ("train", "validation"))
        (directory / "README.md").write_text(f"---\nconfigs:\n- config_name: rte\n  data_files:\n{paths}---\n")
    return directory


def save_images(directory, image="image", label="label", splits=(("train", 14),), first=0):
    """Images of three classes, told by their colour, as the hub has them; `first` is the number of the first class."""
    (directory / "data").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, per_class in splits:
        labels = [kind for kind in range(3) for _ in range(per_class)]
        pictures = []
        for kind in labels:
            pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
            pixels[..., kind] += 150
            pictures.append(pixels)
        features = Features({image: Image(), label: Value("int64")})
        part = Dataset.from_dict({image: pictures, label: [kind + first for kind in labels]}, features=features)
        part.to_parquet(directory / "data" / f"{split}-00000-of-00001.parquet")
    return directory


def save_image_model(directory):
    """A tiny ViT with 5 classes of its own, and how it wants its images."""
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    torch.manual_seed(0)
    config = tf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5)
    tf.ViTForImageClassification(config).save_pretrained(directory)
    tf.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(directory)
    return str(directory)
