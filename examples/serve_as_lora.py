"""Serve the groups of an adapter as LoRAs: export, name the LoRA of every request, and compare with the whole model.

1. Pretrain a tiny causal language model to count upwards in four dialects (four disjoint vocabularies).
2. Adapt it with Tucker experts: every dialect is to count in steps of its own. Nothing tells the router the dialect.
3. Export every group as an ordinary PEFT LoRA, with the router beside them.
4. Load the LoRAs with PEFT on a fresh base model, whose mixed batches stand in for an engine with multi-LoRA serving.
   The serving router, loaded from the files alone, names the LoRA of every request from its prompt.
5. Compare the names with the groups the adapted model chooses, and the tokens with those it generates: a figure, and a
   row of the table that the examples share.

Everything runs on the CPU and nothing is downloaded. The command that would serve the same files with vLLM is printed.
There is no --method: groups to be served as LoRAs are what Tucker experts have, and no other method.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import results
from common.methods import adapter_parameters, trainable_parameters
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import analysis
import tucka
from tucka.export import ServingRouter, to_lora

DIALECTS, LETTERS, PROMPT, ANSWER = 4, 16, 8, 4
BATCH, RANK, RATE = 32, 8, 4e-3
STEPS = (3, 5, 7, 11)
"""What each dialect counts by after the adaptation; before it, all count by 1."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256)
"""Values of vLLM's --max-lora-rank, which is to be at least the rank of the LoRAs."""


class Served(NamedTuple):
    """What the comparison found."""

    names: list[str]  # the LoRA of every request, by the router's files
    chosen: list[str]  # that of the group which the adapted model chose
    choices_agree: float  # requests of which both are the same
    tokens_agree: float  # answers that are the adapted model's, token by token
    accuracy: dict[str, float]  # right tokens of the base model, the adapted model and the LoRAs


def requests(samples: int, steps: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Prompts (samples, 8) of random letters of a dialect, and answers (samples, 4) that count on from the last."""
    dialect = torch.randint(DIALECTS, (samples, 1), generator=generator)
    prompt = torch.randint(LETTERS, (samples, PROMPT), generator=generator)
    answer = (prompt[:, -1:] + torch.tensor(steps)[dialect] * torch.arange(1, ANSWER + 1)) % LETTERS
    return prompt + LETTERS * dialect, answer + LETTERS * dialect


def batch_of(prompt: Tensor, answer: Tensor) -> dict[str, Tensor]:
    """Make a training batch: the loss is of the answers, and routes are taken from the prompts."""
    tokens = torch.cat([prompt, answer], 1)
    labels = torch.cat([torch.full_like(prompt, -100), answer], 1)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def new_model() -> LlamaForCausalLM:
    """Make a causal language model of 90,000 parameters."""
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, intermediate_size=96)
    return LlamaForCausalLM(LlamaConfig(**size, vocab_size=DIALECTS * LETTERS, pad_token_id=0, eos_token_id=None))


def train(model, steps: tuple[int, ...], updates: int, rate: float, generator: torch.Generator, title: str) -> None:
    """Train what is trainable, on fresh requests in every update."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=updates)
    model.train()
    for _ in tqdm(range(updates), desc=f"{title:<14}", unit=" steps", ncols=100, mininterval=0.5):
        model(**batch_of(*requests(BATCH, steps, generator))).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def answers(model, prompt: Tensor, **options) -> Tensor:
    """Generate greedily."""
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    return model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False, **options)[:, PROMPT:]


def compare(base: LlamaForCausalLM, model, engine, router: ServingRouter, sent: tuple[Tensor, Tensor]) -> Served:
    """Send requests to the base model, the adapted model and the engine."""
    prompt, right = sent
    names = router.lora_for(engine, {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)})
    plain = answers(base, prompt)
    with tucka.record_routes(model) as routes:
        whole = answers(model, prompt)
    served = answers(engine, prompt, adapter_names=names)
    chosen = [router.names[group] for group in routes[0].group.tolist()]
    agreement = sum(one == other for one, other in zip(names, chosen)) / len(names)
    found = {"base model": plain, "adapted model": whole, "LoRAs of its groups": served}
    accuracy = {method: float((tokens == right).float().mean()) for method, tokens in found.items()}
    return Served(names, chosen, agreement, float((served == whole).float().mean()), accuracy)


def vllm_command(base: Path, loras: Path, names: tuple[str, ...], rank: int) -> str:
    """Write the command that serves the same files with vLLM; a request then asks for the model "group-2"."""
    modules = " ".join(f"{name}={loras / name}" for name in names)
    limit = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    return (
        f"vllm serve {base} --enable-lora --max-loras {len(names)} --max-lora-rank {limit} \\\n"
        f"    --lora-modules {modules}"
    )


def draw(served: Served, known: tuple[str, ...], path: Path) -> None:
    """Draw which LoRA was named for the requests of each group (left), and how many tokens are right (right)."""
    pairs = Counter(zip(served.chosen, served.names))
    counts = np.array([[pairs[chosen, name] for name in known] for chosen in known])
    with analysis.style("notebook", width="slide"):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=[1, 1.4])
        left.imshow(counts, cmap="cividis", vmin=0, aspect="auto")
        for (row, column), count in np.ndenumerate(counts):
            color = "black" if count > 0.55 * counts.max() else "white"
            left.text(column, row, str(count), ha="center", va="center", color=color)
        left.set_xticks(range(len(known)), known)
        left.set_yticks(range(len(known)), known)
        left.set(xlabel="LoRA that the router's files name", ylabel="group of the adapted model")
        left.set_title(f"requests: {100 * served.choices_agree:.1f} % agree")
        bars = right.barh(list(served.accuracy), [100 * share for share in served.accuracy.values()], height=0.6)
        right.bar_label(bars, fmt="%.1f", padding=3)
        right.invert_yaxis()
        right.set(xlim=(0, 115), xticks=range(0, 101, 20), xlabel="right tokens of the answers (%)")
        right.set_title(f"tokens of LoRAs and adapted model: {100 * served.tokens_agree:.1f} % agree")
        figure.savefig(path)
        plt.close(figure)


def row_of(served: Served, arguments: argparse.Namespace, sizes: dict[str, int], seconds: dict[str, float]) -> dict:
    """Make the row of the table of results."""
    key = dict(example="serve_as_lora", dataset="dialects", model="tiny-llama", method="tucka", seed=arguments.seed)
    settings = {"r": RANK, "k": DIALECTS, "updates": arguments.updates, "requests": arguments.requests}
    how = dict(settings=settings, learning_rate=RATE, epochs=1.0, train_rows=BATCH * arguments.updates)
    scores = dict(score=round(100 * served.tokens_agree, 4), metric="tokens as the adapted model's (%)")
    return {**key, **how, **sizes, **scores, **seconds}


def main(argv: list[str] | None = None) -> Served:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/serve"), help="where models and LoRAs are written")
    parser.add_argument("--updates", type=int, default=250, help="training steps before, and of, the adaptation")
    parser.add_argument("--requests", type=int, default=200, help="how many are sent in the end")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    text = "table that the run is added to (default: %(default)s)"
    parser.add_argument("--results", type=Path, default=Path("out/results.csv"), help=text)
    arguments = parser.parse_args(argv)
    started, started_cpu = time.perf_counter(), time.process_time()
    logging.set_verbosity_error()
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)

    base = new_model()
    train(base, (1,) * DIALECTS, arguments.updates, 3e-3, generator, "pretraining")
    base_directory, loras = arguments.output / "base", arguments.output / "loras"
    base.save_pretrained(base_directory)

    calibration = [batch_of(*requests(64, STEPS, generator)) for _ in range(4)]
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = tucka.TuckAConfig(
        r=RANK, k=DIALECTS, axis_block_size=None, trainable="all", target_modules=targets, task_type="CAUSAL_LM"
    )
    model = tucka.apply(base, config, calibration=calibration, progress=False)
    train(model, STEPS, arguments.updates, RATE, generator, "adaptation")

    sizes = {"adapter_parameters": adapter_parameters(model), "trainable_parameters": trainable_parameters(model)}
    report = to_lora(model, loras, loader=calibration)
    print(report, end="\n\n")

    router = ServingRouter.load(loras)
    engine = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base_directory), loras / router.names[0], adapter_name=router.names[0]
    ).eval()
    for name in router.names[1:]:
        engine.load_adapter(loras / name, adapter_name=name)
    fresh = LlamaForCausalLM.from_pretrained(base_directory).eval()
    served = compare(fresh, model, engine, router, requests(arguments.requests, STEPS, generator))

    picture = arguments.output / "agreement.png"
    draw(served, router.names, picture)
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - started_cpu}
    spent = {name: round(value, 2) for name, value in spent.items()}
    results.append(arguments.results, row_of(served, arguments, sizes, spent))

    for method, accuracy in served.accuracy.items():
        print(f"{method:20} {100 * accuracy:5.1f} % of the answers' tokens are right")
    print(f"the router's files name the group that the adapted model chooses: {100 * served.choices_agree:.1f} %")
    print(f"tokens of the LoRAs that are the adapted model's: {100 * served.tokens_agree:.1f} %\n")
    print(f"results: {arguments.results}\nfigure:  {picture}\n")
    print(vllm_command(base_directory, loras, router.names, max(report.ranks.values())))
    return served


if __name__ == "__main__":
    main()
