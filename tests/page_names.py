"""Small objects under the names that the README's blocks and the docstrings' examples speak of."""

from pathlib import Path

import peft
import torch
from conftest import batch_for, build
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import analysis
import tucka

TARGETS = ["query", "value", "dense"]


def save_files(directory):
    """A causal model, and LoRAs of the encoder, where the pages have them."""
    build("llama").save_pretrained(directory / "llama")
    for seed, path in enumerate(("lora_a", "lora_b", "loras/law", "loras/code")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
        peft.get_peft_model(build("bert"), config).save_pretrained(directory / path)


def train_and_score(settings, seed):
    """The run of a sweep: a law without noise, and nothing trained."""
    experts = settings["r"] * settings["k"]
    return {"parameters": 100 * experts, "score": 90 - 40 / experts + 0.01 * seed}


def names(directory):
    """All names anew, so that no block sees what another has done to its model."""
    batch = batch_for("bert", 24)
    rows = [{name: value[index] for name, value in batch.items()} for index in range(24)]
    loader = DataLoader(rows, batch_size=8)
    torch.manual_seed(0)
    model = tucka.apply(build("bert"), tucka.TuckAConfig(r=4), calibration=loader, progress=False)
    with torch.no_grad():  # trained, as it were: cores start at zero, and zero has no ranks and no likeness
        for name, parameter in model.named_parameters():
            if name.endswith("core"):
                parameter.normal_(std=0.3)
    quiet = dict(num_train_epochs=1, report_to=[], use_cpu=True, disable_tqdm=True)
    arguments = TrainingArguments(str(directory / "run"), **quiet)

    def evaluate(model):
        for batch in loader:
            model(**batch)

    loaders = ("loader", "train_loader", "test_loader", "calibration_loader", "loader_a", "loader_b")
    return {
        **dict.fromkeys(loaders, loader),
        "analysis": analysis, "tucka": tucka, "torch": torch, "Trainer": Trainer,
        "AutoModelForCausalLM": AutoModelForCausalLM, "name": str(Path(directory) / "llama"),
        "base": build("bert"), "base_model": build("bert"), "fresh_base_model": build("bert"), "model": model.eval(),
        "arguments": arguments, "args": arguments, "train_set": rows, "data": rows, "batch": batch_for("bert", 3),
        "batch_of_two": batch_for("bert", 2), "evaluate": evaluate, "train_and_score": train_and_score,
        "batches": [{**part, "domain": part["labels"].tolist()} for part in loader],
    }  # fmt: skip
