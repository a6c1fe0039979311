"""The model that adapters are loaded into: of transformers' kind, and so small that a load takes milliseconds."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

WIDTH, WORDS = 16, 20


class TinyConfig(PreTrainedConfig):
    model_type = "tiny"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.value(torch.tanh(self.query(x)))


class Pooler(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.dense(x.mean(1)))


class TinyForSequenceClassification(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.ModuleList([Block(), Block()])
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.pooler = Pooler()
        self.classifier = nn.Linear(WIDTH, 2)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def forward(self, input_ids, labels=None, **_):
        x = self.word_embeddings(input_ids)
        for block in self.layer:
            x = block(x)
        logits = self.classifier(self.pooler(torch.tanh(self.dense(x))))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def base_model() -> PreTrainedModel:
    """The same weights every time."""
    torch.manual_seed(0)
    return TinyForSequenceClassification(TinyConfig()).eval()


def batch() -> dict:
    return dict(input_ids=torch.arange(10).view(2, 5), labels=torch.tensor([0, 1]))
