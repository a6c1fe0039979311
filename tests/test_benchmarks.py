"""The quality benchmark, at sizes that run in seconds."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not part of what is installed

from benchmarks import quality, report
from benchmarks import ranks as ranks_benchmark
from benchmarks.arms import ABLATIONS, METHODS, arm_of, parse_settings, tucka_size
from benchmarks.figures import draw_scores, mark_of
from benchmarks.fitting import GROUPS, optimiser_groups
from benchmarks.live import LiveBytes
from benchmarks.results import COLUMNS, Store
from benchmarks.selection import best_learning_rate, next_learning_rate
from benchmarks.sizing import adapter_parameters, smallest_size
from benchmarks.tasks import Options, arithmetic, digits, python_sources, stdlib_text
from benchmarks.tasks.task import Rows, Splits, Task, class_hits
from benchmarks.training import has_diverged, label_entropy, max_violation


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def task():
    """Digits without the pretraining."""
    rows = Rows({"pixel_values": torch.rand(20, 1, 8, 8), "labels": torch.arange(20) % 10})
    sizes = dict(epochs=1, batch_size=4, chance=10.0, hits=class_hits, domains=None)
    targets = dict(target_modules=("q_proj", "v_proj", "o_proj", "fc1", "fc2"), modules_to_save=("classifier",))
    return Task("digits4", lambda: digits.new_vit().eval(), Splits(rows, rows, rows), **targets, **sizes)


def a_row(**values):
    row = dict(task="digits4", arm="lora", settings='{"r": 4}', seed=0, learning_rate=0.002, epochs=1.0, train_rows=20)
    scores = dict(adapter_parameters=100, validation=50.0, test=51.0, cpu_seconds=1.0, diverged=False)
    return {**row, **scores, **values}


# Tasks


def test_digits_are_split_by_image_with_equal_shares_of_every_label():
    labels = np.arange(1000) % 10
    splits = digits.split_images(labels, seed=3)
    assert [len(split) for split in splits] == [600, 150, 250]
    assert sorted(np.concatenate(splits)) == list(range(1000))
    for split in splits:
        assert set(np.bincount(labels[split])) == {len(split) // 10}
    assert not np.array_equal(digits.split_images(labels, seed=4).train, splits.train)


def test_conflicting_domains_permute_the_labels_and_others_do_not():
    assert torch.equal(digits.permutations(3, False, 0), torch.arange(10).expand(3, 10))
    orders = digits.permutations(8, True, 0)
    assert torch.equal(orders.sort(1).values, torch.arange(10).expand(8, 10))
    assert len({tuple(order.tolist()) for order in orders}) == 8


def test_the_shifts_differ_and_keep_the_range():
    images = torch.rand(5, 1, 8, 8)
    shifted = [shift(images) for shift in digits.SHIFTS.values()]
    assert len(shifted) == 8 and all(x.shape == images.shape and x.min() >= 0 and x.max() <= 1 for x in shifted)
    assert all(not torch.allclose(a, b) for i, a in enumerate(shifted) for b in [images, *shifted[:i]])


def test_arithmetic_problems_are_right_and_distinct():
    rng = np.random.default_rng(0)
    for sign in arithmetic.KINDS:
        problems = arithmetic.draw(sign, 50, rng)
        assert len(set(problems)) == 50
        assert all(sign in p and len(p.partition("=")[2]) == arithmetic.ANSWER for p in problems)
    assert arithmetic.problem("~", arithmetic.KINDS["~"], (12, 34)) == "12~34=640"
    assert arithmetic.problem("-", arithmetic.LEARNT["-"], (12, 34)) == "12-34=-22"
    rows = arithmetic.encoded(["1&2&3=006", "12>34=034"])
    assert rows.fields["labels"][:, : -arithmetic.ANSWER].eq(-100).all()


def test_a_perfect_decoder_gets_every_answer():
    class Perfect:
        def generate(self, input_ids, attention_mask, **options):
            return torch.cat([input_ids, labels[:, -arithmetic.ANSWER :]], 1)

    rows = arithmetic.encoded(["12>34=034", "12&34&56=102"])
    labels = rows.fields["labels"]
    (batch,) = rows.batches(2)
    assert arithmetic.answer_hits(Perfect(), batch).tolist() == [True, True]
    labels = labels.clone()
    labels[1, -2] += 1
    assert arithmetic.answer_hits(Perfect(), batch).tolist() == [True, False]


def test_text_pools_are_split_without_overlap_and_balanced_as_far_as_they_go():
    pool = {name: [f"{name} {i}" for i in range(size)] for name, size in zip("abcd", (50, 8, 90, 90))}
    splits = stdlib_text.split_pool(pool, Splits(60, 12, 28), seed=0)
    texts = [text for split in splits for text, _ in split]
    assert len(texts) == len(set(texts)) == 100
    labels = np.bincount([label for split in splits for _, label in split])
    assert labels[1] == 8 and labels.max() - labels[[0, 2, 3]].min() <= 1
    assert all(text.startswith("abcd"[label]) for split in splits for text, label in split)
    with pytest.raises(ValueError, match=r"300 texts.* has 238"):
        stdlib_text.split_pool(pool, Splits(200, 50, 50), seed=0)


def test_python_sources_give_labelled_texts():
    import ast

    tree = ast.parse('def f(a, b):\n    """Say that it is so."""\n    if a.very.long:\n        return g(a, b, 1)\n')
    assert list(python_sources.docstrings(tree)) == ["Say that it is so."]
    assert list(python_sources.signatures(tree)) == ["f(a, b)"]
    found = {kind: texts for kind, texts in python_sources.roles([("m", tree)]).items() if texts}
    assert found == {"If": ["a.very.long"], "Return": ["g(a, b, 1)"]}
    assert len(python_sources.ORDERS) == len(python_sources.ROLES) == python_sources.LABELS
    words = list("abcdefghi")
    assert all(sorted(order(words)) == words for order in python_sources.ORDERS.values())
    assert len({tuple(order(words[::2] + words[1::2])) for order in python_sources.ORDERS.values()}) == 8


def test_rows_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"'labels': 2"):
        Rows({"x": torch.zeros(3), "labels": torch.zeros(2)})


# Arms


@pytest.mark.parametrize("method", METHODS)
def test_a_sized_arm_is_the_smallest_that_reaches_tuckas_parameters(task, method):
    arm, wanted = arm_of(method), tucka_size(task)
    settings = arm.settings(task)
    sizes, name = METHODS[method].sizes, METHODS[method].size

    def parameters(size):
        own = {**METHODS[method].fields(size), name: size, "target_modules": list(task.target_modules)}
        own.pop("init_lora_weights", None)
        return adapter_parameters(get_peft_model(task.base(), METHODS[method].config(**own)), task)

    place = sizes.index(settings[name])
    if parameters(settings[name]) < wanted:
        assert place == len(sizes) - 1
    else:
        assert place == 0 or parameters(sizes[place - 1]) < wanted


def test_the_smallest_size_is_found_or_the_largest_taken():
    assert [smallest_size(range(1, 6), lambda s: 10 * s, wanted) for wanted in (5, 10, 11, 50, 99)] == [1, 1, 2, 5, 5]


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_builds_what_its_settings_say(task, ablation):
    arm = arm_of(f"tucka-{ablation}")
    model = arm.build(task.base(), task, arm.settings(task), [next(task.rows.train.batches(20))])
    assert adapter_parameters(model, task) > 0
    fields = {name: value for name, value in ABLATIONS[ablation].items() if name not in GROUPS}
    assert {name: getattr(model.active_peft_config, name) for name in fields} == fields


def test_frozen_and_full_train_the_head_and_everything(task):
    counts = [adapter_parameters(arm_of(n).build(task.base(), task, {}, None), task) for n in ("frozen", "full")]
    head = sum(p.numel() for p in task.base().classifier.parameters())
    assert counts == [0, sum(p.numel() for p in task.base().parameters()) - head]


def test_settings_are_read_and_recorded(task):
    assert parse_settings("r=8,form=additive,alpha=1e-1,rank_pattern={'a': 1, 'b': 2},share_factors=True") == {
        "r": 8, "form": "additive", "alpha": 0.1, "rank_pattern": {"a": 1, "b": 2}, "share_factors": True,
    }  # fmt: skip
    settings = arm_of("tucka:r=12,form=multiplicative,factor_lr=0.3").settings(task)
    assert (settings["r"], settings["block_size"], settings["factor_lr"]) == (12, 4, 0.3)
    assert "form" not in settings, "what every row has is not named"
    assert arm_of("lora16").settings(task) == {"r": 16, "lora_alpha": 32}
    assert arm_of("tucka-paper").settings(task)["routing"] == "batch"
    assert arm_of("tucka-k1").settings(task)["k"] == ABLATIONS["k1"]["k"]
    with pytest.raises(ValueError, match=r"arms are .*'nothing'"):
        arm_of("nothing")
    with pytest.raises(ValueError, match=r"name=value.*'8'"):
        arm_of("tucka:8")
    assert quality.names("lora:r=3,use_dora=True,tucka,tucka:k=1") == ["lora:r=3,use_dora=True", "tucka", "tucka:k=1"]


def test_parameter_groups_follow_the_multipliers(task):
    model = arm_of("tucka").build(task.base(), task, {}, [next(task.rows.train.batches(20))])
    groups = optimiser_groups(model, 0.01, {"factor_lr": 0.1, "router_lr": 5.0})
    assert sorted(group["lr"] for group in groups) == pytest.approx([0.001, 0.01, 0.05])
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    groups = optimiser_groups(model, 0.01, {"core_lr": 0.25, "shared_lr": 0.5})
    owner = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    rates = {name.rsplit(".", 1)[1]: owner[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert (rates["core"], rates["shared_core"], rates["centroids"]) == (0.0025, 0.005, 0.01)
    with pytest.raises(ValueError, match="'fast'"):
        optimiser_groups(model, 0.01, {"fast": 1.0})


# Measures


def test_measures():
    assert max_violation(np.array([0, 0, 0, 1]), 4) == pytest.approx(2.0)
    rows = Rows({"labels": torch.tensor([[-100, 0], [-100, 1]])})
    assert label_entropy(rows) == pytest.approx(np.log(2))
    assert not has_diverged([2.0, 1.0, 0.5], 2.3) and not has_diverged([], 2.3)
    assert has_diverged([2.0, float("nan")], 2.3) and has_diverged([9.0, 2.3], 2.3) and has_diverged([0.2, 1.5], 2.3)


# Results


def test_the_store_ignores_a_torn_last_line_and_writes_over_it(tmp_path):
    store = Store(tmp_path / "deep" / "runs.csv")
    assert store.rows() == []
    store.append(a_row(error="one\nline"))
    with store.path.open("a") as file:
        file.write('digits4,lora,"{""r"": 4}",7,0.0')
    assert [row["seed"] for row in store.rows()] == ["0"]
    store.append(a_row(seed=1))
    assert [row["seed"] for row in store.rows()] == ["0", "1"]
    assert store.rows()[0]["error"] == "one line" and store.path.read_text().count("\n") == 3


def test_of_two_rows_with_one_key_the_last_counts(tmp_path):
    store = Store(tmp_path / "runs.csv")
    for score in (1.0, 2.0):
        store.append(a_row(validation=score))
    assert [row["validation"] for row in store.rows()] == ["2.0"]


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("task,arm\ndigits4,lora\n")
    with pytest.raises(ValueError, match=f"{len(COLUMNS)} columns"):
        Store(path).rows()


def test_the_learning_rate_is_chosen_on_validation_over_all_selection_seeds(tmp_path):
    store = Store(tmp_path / "runs.csv")
    scores = {(0.001, 100): 50, (0.001, 101): 60, (0.002, 100): 70, (0.002, 101): 30, (0.004, 100): 99}
    for (rate, seed), score in scores.items():
        store.append(a_row(seed=seed, learning_rate=rate, validation=float(score), test=float(-score)))
    seeds = (100, 101)
    assert best_learning_rate(store.rows(), a_row(), seeds) == 0.001
    assert best_learning_rate(store.rows(), a_row(), seeds, among=[0.002]) == 0.002
    with pytest.raises(ValueError, match=r"\[100, 101\].* 0 such, 3 tried"):
        best_learning_rate(store.rows(), a_row(), seeds, among=[0.004])
    with pytest.raises(ValueError, match="0 tried"):
        best_learning_rate(store.rows(), a_row(settings="{}"), seeds)


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.002, [0.001, 0.002, 0.004]),
        (0.001, [0.001, 0.002, 0.0005]),
        (0.0001, [0.001, 0.002, 0.0005, 0.00025, 0.000125, 0.0000625]),
        (1.0, [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]),
    ],
)
def test_a_search_tries_both_neighbours_of_the_best_learning_rate(tmp_path, best, tried):
    store, found = Store(tmp_path / "runs.csv"), []
    while rate := next_learning_rate(store.rows(), a_row(), start=(0.001, 0.002)):
        store.append(a_row(seed=100, learning_rate=rate, validation=-abs(math.log(rate / best))))
        found.append(rate)
    assert found == tried


def test_a_search_ends_when_every_run_fails(tmp_path):
    store = Store(tmp_path / "runs.csv")
    for rate in (0.001, 0.002):
        store.append(a_row(seed=100, learning_rate=rate, error="no"))
    assert next_learning_rate(store.rows(), a_row(), start=(0.001, 0.002)) is None


def test_the_figure_shows_the_scores():
    tests = dict(enumerate((40.0, 60.0)))
    given = [a_row(seed=seed, test=test) for seed, test in tests.items()]
    rows = [{**dict.fromkeys(COLUMNS, ""), **{name: str(value) for name, value in row.items()}} for row in given]
    scores = report.final_scores(report.frame(rows), "digits4")
    assert scores["score"].tolist() == [50.0] and scores["error"].tolist() == [pytest.approx(10.0)]
    (ax,) = draw_scores({"digits4": scores}).axes
    points = [line for line in ax.lines if line.get_marker() == mark_of("lora").marker]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in points] == [(100, 50)] and ax.get_xscale() == "log"


# The command line


def test_a_run_from_the_command_line_is_scored_kept_and_reported(work, tmp_path, capsys):
    out = tmp_path / "runs.csv"
    sizes = ["--samples", "100", "--epochs", "1", "--lrs", "0.004", "--seeds", "0", "--work", str(work)]
    wanted = ["run", "--tasks", "digits4-conflict", "--arms", "lora2,tucka:k=2,p=1", "--out", str(out)]
    assert quality.main([*wanted, *sizes]) == 0
    rows = Store(out).rows()
    assert [row["seed"] for row in rows] == ["100", "0"] * 2
    assert all(0 <= float(row["test"]) <= 100 and not row["error"] for row in rows)
    assert all((row["nmi"] != "") == row["arm"].startswith("tucka") for row in rows)
    before = out.read_bytes()
    assert quality.main([*wanted, *sizes]) == 0
    assert out.read_bytes() == before
    assert quality.main(["table", "--out", str(out), "--report", str(tmp_path / "report")]) == 0
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "quality-tables.md",
        "quality.svg",
        "quality.png",
    }
    assert "tucka:k=2,p=1" in capsys.readouterr().out


def test_a_run_that_fails_becomes_a_row(work, tmp_path):
    out = tmp_path / "runs.csv"
    command = ["run", "--tasks", "sections", "--arms", "lora2", "--lrs", "0.1", "--out", str(out), "--work", str(work)]
    assert quality.main([*command, "--only-select"]) == 1
    assert all("--sections" in row["error"] for row in Store(out).rows())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tasks", "nothing", "'nothing' is none of"),
        ("--arms", "nothing", "arms are"),
        ("--seeds", "99-100", "only select"),
    ],
)
def test_bad_arguments_are_refused(option, value, message, capsys):
    with pytest.raises(SystemExit):
        quality.main(["run", "--arms", "lora", option, value])
    assert message in capsys.readouterr().err


def test_a_task_without_its_file_says_what_to_give(work):
    from benchmarks.tasks import sections

    with pytest.raises(ValueError, match="--sections"):
        sections.build(0, Options(work))


def test_live_bytes_rise_and_fall_with_the_tensors():
    kept = torch.zeros(1000)
    with LiveBytes() as live:
        a = kept + 1
        b = a.view(10, 100) * 2
        assert live.now == 8000
        a.mul_(2)
        del a
        assert live.now == 4000
        b.sum().item()
    del b
    assert live.now == 0 and 8000 <= live.peak <= 8100


def test_budgeted_ranks_spend_no_more_than_uniform_ones(work):
    settings = dict(task="digits4-conflict", r=4, lr=0.016, share_factors=False, work=str(work), samples=100)
    rows = {ranks: ranks_benchmark.run({**settings, "ranks": ranks}, 0) for ranks in ranks_benchmark.CHOICES}
    assert 0.9 * rows["uniform"]["parameters"] <= rows["budgeted"]["parameters"] <= rows["uniform"]["parameters"]
    assert rows["uniform"]["rank_pattern"] == "{}" and "fc1" in rows["budgeted"]["rank_pattern"]
