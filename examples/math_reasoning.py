"""Adapt a causal language model to worked mathematics, and score the answers that it works out.

    python examples/math_reasoning.py --method tucka lora full          # offline: minutes on one core
    python examples/math_reasoning.py --dataset metamath --preset paper --method tucka-paper lora dora

offline   A Llama of 127,000 parameters, pretrained here once on plain sums and differences, is adapted to eight kinds
          of worked exercises, each named by a word that it has never read.
metamath  Llama-2-7b (or --model) is adapted to 100,000 rows of MetaMathQA and scored on the tests of GSM8K and MATH.
          --dataset-path and --test-path take the data from folders that are laid out as on the hub.

Prompts have no loss. Every model writes its solutions greedily, in batches padded on the left, and an exercise counts
if the answer that its solution ends in is the right one (common/answers.py). The score is the mean over the kinds of
exercise, or over the two tests. Beside each adapter lie all solutions, and the score of every kind (scores.json).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from common import arithmetic, metamath
from common.exercises import Exercise, Exercises, score, written
from common.options import parser_of, read
from common.presets import preset_of
from common.study import Task, compare, published
from common.training import Recipe, processes
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Trainer

EXAMPLE = "math_reasoning"

NEW_TOKENS = 512
"""Tokens of a solution of GSM8K or MATH."""

OFFLINE = Recipe(8e-3, epochs=10, batch_size=32)

RATES = {
    "offline": {"full": 1e-3, "lora": 8e-3, "rslora": 8e-3, "dora": 8e-3},
    "metamath": {"full": 2e-5, "lora": 3e-4, "rslora": 3e-4, "dora": 3e-4, "tucka": 6e-4, "tucka-core": 6e-4},
}
"""Learning rates where they are not those of `METHODS`, which are for small models: for 7 billion the usual ones."""


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without a token to pad with takes the unknown one, or the end."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def task_of(
    args: argparse.Namespace,
    source: str,
    splits: Sequence[Sequence[Exercise]],
    targets: Sequence[str],
    recipe: Recipe,
    length: int,
    new_tokens: int,
) -> Task:
    """Make the task of a pretrained model, given training, validation and test exercises.

    Parameters
    ----------
    args : Namespace
        The command line.
    source : str
        The model, on the hub or in a directory, with its tokenizer.
    splits : sequence of sequence of Exercise
        What to learn and to solve.
    targets : sequence of str
        Layers to adapt.
    recipe : Recipe
        How to train.
    length, new_tokens : int
        Tokens of an exercise with its solution in training, and of a solution that is written.
    """
    tokenizer = tokenizer_of(source)
    rows = [
        Exercises(split, tokenizer, length, name) for split, name in zip(splits, ("training", "validation", "test"))
    ]
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    return Task(
        dataset="arithmetic" if args.dataset == "offline" else args.dataset,
        model=Path(source).name if Path(source).is_dir() else source,
        base=lambda: AutoModelForCausalLM.from_pretrained(source, dtype=dtype),
        train=rows[0],
        validation=rows[1],
        test=rows[2],
        targets=targets,
        heads=(),
        metric="exact match (%)",
        recipe=recipe,
        score=scored(tokenizer, new_tokens),
        collate=DataCollatorForSeq2Seq(tokenizer),
        task_type="CAUSAL_LM",
        rates=RATES[args.dataset],
    )


def scored(tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> Callable[[Trainer, Exercises], float]:
    """Make the function that has a trained model solve exercises, keeps what it wrote and returns its score."""

    def solve(trainer: Trainer, rows: Exercises) -> float:
        model = trainer.accelerator.unwrap_model(trainer.model)
        prompts = [exercise.prompt for exercise in rows.exercises]
        texts = written(
            model,
            tokenizer,
            prompts,
            batch_size=trainer.args.per_device_eval_batch_size,
            new_tokens=new_tokens,
            title=f"{rows.name:<28}",
        )
        by_kind = score(rows.exercises, texts)
        if processes().is_main_process:
            keep(Path(trainer.args.output_dir), rows, texts, by_kind)
        return sum(by_kind.values()) / len(by_kind)

    return solve


def keep(directory: Path, rows: Exercises, texts: Sequence[str], by_kind: dict[str, float]) -> None:
    """Write what a model wrote, and its scores; print the scores."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**exercise._asdict(), "written": text}) for exercise, text in zip(rows.exercises, texts)]
    (directory / f"{rows.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = directory / "scores.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, rows.name: by_kind}, indent=1), encoding="utf-8")
    print(f"{rows.name:<12}" + "  ".join(f"{kind} {share:.1f}" for kind, share in by_kind.items()))


def offline(args: argparse.Namespace, seed: int) -> Task:
    """Worked arithmetic; the seed draws the exercises, all seeds adapt one model."""
    source = args.model or str(arithmetic.pretrained(args.output, args.pretrain_steps))
    caps = (args.samples, args.test_samples, args.test_samples)
    kinds = len(arithmetic.KINDS)
    sizes = [min(size, max(1, cap // kinds)) if cap else size for size, cap in zip(arithmetic.SIZES, caps)]
    splits = arithmetic.drawn(seed, sizes)
    return task_of(args, source, splits, arithmetic.TARGETS, OFFLINE, arithmetic.LENGTH, 32)


def metamathqa(args: argparse.Namespace, seed: int) -> Task:
    """MetaMathQA, with GSM8K and MATH; the splits are the same for all seeds."""
    preset, most = preset_of("metamath"), args.test_samples
    train, validation = metamath.training_exercises(args.dataset_path, args.samples or 100_000, most or 500)
    tests = [metamath.test_exercises(name, args.test_path.get(name), most) for name in metamath.TESTS]
    splits = (train, validation, [exercise for test in tests for exercise in test])
    return task_of(args, args.model or preset.model, splits, preset.targets, preset.recipe, preset.length, NEW_TOKENS)


TASKS = {"offline": offline, "metamath": metamathqa}


def folder(text: str) -> tuple[str, Path]:
    """Read NAME=DIRECTORY of a test."""
    name, equals, path = text.partition("=")
    if not equals or name not in metamath.TESTS:
        raise argparse.ArgumentTypeError(
            f"tests are {' and '.join(metamath.TESTS)}, each as NAME=DIRECTORY; got {text!r}"
        )
    return name, Path(path)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__, EXAMPLE, datasets=list(TASKS))
    add = parser.add_argument_group("mathematics").add_argument
    text = "directories of gsm8k and math, laid out as on the hub (default: the hub)"
    add("--test-path", nargs="+", type=folder, default=[], metavar="NAME=DIRECTORY", help=text)
    text = "cap on the exercises of every test, and of the validation (default: all, and 500 of MetaMathQA)"
    add("--test-samples", type=int, metavar="N", help=text)
    text = "length of the offline model's pretraining (default: %(default)s)"
    add("--pretrain-steps", type=int, default=arithmetic.PRETRAIN_STEPS, metavar="N", help=text)
    args = read(parser, argv)
    args.test_path = dict(args.test_path)
    args.bf16 = args.bf16 or (args.preset == "paper" and preset_of(args.dataset).bf16)
    return args


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Run the example; the averages of the methods that were compared."""
    args = read_arguments(argv)

    def task(seed: int) -> Task:
        made = TASKS[args.dataset](args, seed)
        return published(args, made) if args.preset else made

    return compare(EXAMPLE, args, task)


if __name__ == "__main__":
    main()
