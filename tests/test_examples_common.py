"""What the examples share: methods at fair sizes, the table of results, figures, and pages made of them."""

import example_data  # first: it makes the examples importable
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import build
from matplotlib.image import imread

import tucka
from analysis import layer_shapes
from tucka.targets import DEFAULT_TARGETS

compare = example_data.load("compare")
from common import docstrings, figures, results  # noqa: E402
from common.methods import METHODS, adapted, adapter_parameters, method_of, settings_of  # noqa: E402
from common.options import parser_of, read  # noqa: E402
from common.presets import PRESETS  # noqa: E402
from common.rows import Rows, split  # noqa: E402

SELECTION = dict(targets=["query", "value", "dense"], heads=["classifier"])
SMALL = dict(r=4, k=3)


# --- methods ---------------------------------------------------------------------------------------------------------


def test_a_methods_fields_are_read_from_its_name():
    method, own = method_of("lora:r=16,target_parameters=[0, 1],init_lora_weights=olora")
    assert method is METHODS["lora"]
    assert own == {"r": 16, "target_parameters": [0, 1], "init_lora_weights": "olora"}
    for text, message in (
        ("lorra", "methods are frozen, full, tucka.*got 'lorra'"),
        ("lora:16", "written name=value.*got '16'"),
        ("full:r=3", "full has no fields, got r"),
    ):
        with pytest.raises(ValueError, match=message):
            method_of(text)


def test_methods_train_at_least_as_many_parameters_as_tucka_and_not_more_than_they_must():
    wanted = adapter_parameters(adapted(build("bert"), "tucka", **SELECTION, fields=SMALL), SELECTION["heads"])
    shapes = layer_shapes(build("bert"), SELECTION["targets"])
    for name in ("lora", "rslora", "dora", "hra", "oft"):
        settings = settings_of(shapes, name, tucka_fields=SMALL)
        size = settings[METHODS[name].size]
        model = adapted(build("bert"), name, **SELECTION, tucka_fields=SMALL)
        found = adapter_parameters(model, SELECTION["heads"])
        smaller = [step for step in range(1, size) if name != "oft" or step in (2, 4, 8, 16)]
        smaller = [step for step in smaller if name != "hra" or step % 2 == 0][-1:]
        for step in smaller:
            less = adapted(build("bert"), f"{name}:{METHODS[name].size}={step}", **SELECTION)
            assert adapter_parameters(less, SELECTION["heads"]) < wanted, name
        assert found >= wanted, name
    assert "lora_alpha" in settings_of(shapes, "lora:r=3") and settings_of(shapes, "lora:r=3")["lora_alpha"] == 6


def test_the_head_alone_trains_and_every_parameter_trains():
    frozen, full = (adapted(build("bert"), name, **SELECTION) for name in ("frozen", "full"))
    trained = [name for name, p in frozen.named_parameters() if p.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]
    assert adapter_parameters(frozen, ["classifier"]) == 0
    assert all(p.requires_grad for p in full.parameters())


def test_a_row_says_tuckas_settings_also_where_they_are_the_defaults():
    shapes = layer_shapes(build("bert"), SELECTION["targets"])
    said = settings_of(shapes, "tucka", {"r": 3})
    assert said["r"] == 3 and said["k"] == tucka.TuckAConfig().k and said["form"] == "additive"
    paper = settings_of(shapes, "tucka-paper", PRESETS["rte"].tucka)
    assert paper["routing"] == "batch" and paper["pool_padding"] is True and paper["perturb_scale"] == 10.0


PUBLISHED = {  # model, r k t p, α, perturb, rate, schedule, warm-up, epochs, batch, weight decay, LoRA's r and α
    "glue": ("microsoft/deberta-v3-base", (8, 2, 2, 2), 2, 10, 6e-3, "linear", 500, 5, 16, 0.01, (8, 2)),
    "cifar100": ("google/vit-base-patch16-224-in21k", (2, 5, 2, 2), 1, 10, 4e-3, "linear", 20, 20, 32, 0, (2, 16)),
    "food101": ("google/vit-base-patch16-224-in21k", (2, 5, 3, 2), 1, 10, 4e-3, "linear", 20, 20, 32, 0, (2, 16)),
    "caltech256": ("google/vit-base-patch16-224-in21k", (2, 5, 2, 2), 1, 10, 4e-3, "linear", 20, 20, 32, 0, (2, 16)),
    "metamath": ("meta-llama/Llama-2-7b-hf", (16, 4, 2, 2), 512, 20, 1e-3, "cosine", 0.03, 2, 32, 0, (32, 64)),
}  # fmt: skip
GLUE = ("cola", "mrpc", "qnli", "qqp", "rte", "sst2")


def test_presets_are_the_published_numbers():
    assert set(PRESETS) == {*PUBLISHED, *GLUE} - {"glue"}
    for name, preset in PRESETS.items():
        one, sizes = preset.recipe, tuple(preset.tucka[letter] for letter in "rktp")
        how = (one.learning_rate, one.schedule, one.warmup, one.epochs, one.batch_size, one.weight_decay)
        lora = preset.baselines["lora"]
        scale = (preset.tucka["alpha"], preset.tucka["perturb_scale"])
        found = (preset.model, sizes, *scale, *how, (lora["r"], lora["lora_alpha"]))
        assert found == PUBLISHED["glue" if name in GLUE else name], name
        assert preset.baselines["dora"] == lora and preset.baselines["vera"]["vera_dropout"] == 0.1
        assert {preset.baselines[m][f"{m}_block_size"] for m in ("oft", "boft")} == {lora["r"]}
        if name != "metamath":  # whose layers are fewer than the library's default
            assert list(preset.targets) == DEFAULT_TARGETS["deberta-v2" if name in GLUE else "vit"]
    assert (PRESETS["rte"].length, PRESETS["rte"].recipe.evaluate_every, PRESETS["metamath"].length) == (512, 500, 512)
    assert PRESETS["metamath"].bf16 and PRESETS["metamath"].targets == ("q_proj", "v_proj")


# --- the command line ------------------------------------------------------------------------------------------------


def test_bad_options_are_refused_in_words(tmp_path, capsys):
    parser = parser_of("What it does.", "some_example", ["offline", "rte"])
    for options, message in (
        (["--method", "lorra"], "methods are frozen"),
        (["--preset", "paper"], "'offline' has no published settings"),
        (["--dataset", "imagenet"], "invalid choice: 'imagenet'"),
    ):
        with pytest.raises(SystemExit):
            read(parser, [*options, "--output", str(tmp_path)])
        assert message in capsys.readouterr().err


# --- results ---------------------------------------------------------------------------------------------------------


def row_of(method="lora", seed=0, score=80.0, **changes):
    row = dict(
        example="some", dataset="data", model="model", method=method, settings={"r": 3, "alpha": 2.0}, seed=seed,
        learning_rate=4e-3, epochs=2.0, train_rows=100, adapter_parameters=1000, trainable_parameters=1100,
        metric="accuracy (%)", score=score, validation=79.0, seconds=3.0, cpu_seconds=2.0,
    )  # fmt: skip
    return {**row, **changes}


def test_a_run_is_found_by_its_key_and_by_nothing_less(tmp_path):
    path = tmp_path / "results.csv"
    row = row_of()
    key = {name: row[name] for name in results.KEY}
    assert results.found(path, key) is None
    results.append(path, row)
    results.append(path, {**row, "score": 81.0})
    assert float(results.found(path, {**key, "epochs": 2, "learning_rate": 0.004})["score"]) == 81.0
    for change in ({"seed": 1}, {"settings": {"r": 4, "alpha": 2.0}}, {"epochs": 3}, {"method": "dora"}):
        assert results.found(path, {**key, **change}) is None
    with pytest.raises(ValueError, match="settings is missing"):
        results.append(path, {name: value for name, value in row.items() if name != "settings"})
    with pytest.raises(ValueError, match="no column colour"):
        results.append(path, {**row, "colour": "red"})
    assert len(path.read_text().splitlines()) == 3


def test_averages_are_over_seeds_alone(tmp_path):
    path = tmp_path / "results.csv"
    for seed, score in enumerate((70.0, 72.0, 77.0)):
        results.append(path, row_of(seed=seed, score=score))
    results.append(path, row_of("tucka", score=90.0, settings={"r": 6}))
    results.append(path, row_of("lora", score=10.0, example="another"))
    results.append(path, {name: value for name, value in row_of("dora", score=60.0).items() if "seconds" not in name})
    best, lora, dora = results.table(path, "some").itertuples()
    assert (
        dora.score == 60.0
        and np.isnan(dora.seconds)
        and "| dora r=3 | 1,000 | 60.0 (1) | 0.004 |  |" in (compare.markdown(results.table(path, "some")))
    )
    assert (best.method, best.score, best.seeds) == ("tucka", 90.0, 1) and np.isnan(best.error)
    assert (lora.score, lora.seeds) == (73.0, 3)
    assert lora.error == pytest.approx(np.std([70, 72, 77], ddof=1) / np.sqrt(3))


def test_a_page_gets_its_tables_and_keeps_its_words(tmp_path):
    path, page = tmp_path / "results.csv", tmp_path / "page.md"
    for seed in (0, 1):
        results.append(path, row_of(seed=seed, score=80.0 + seed))
        results.append(path, row_of("tucka", seed, 90.0 + seed, settings={"r": 6, "k": 4}, adapter_parameters=900))
        results.append(path, row_of("frozen", seed, 40.0, settings={}, adapter_parameters=0))
    later = "<!-- table: some other -->\nlater\n<!-- end -->\n"
    page.write_text(f"# Before\n<!-- table: some data -->\nold\n<!-- end -->\n{later}After\n")
    compare.main(["--results", str(path), "--write", str(page)])
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith(f"{later}After\n") and "old" not in text
    assert "| tucka r=6 k=4 | 900 | 90.5 ± 0.5 | 0.004 | 2 s |" in text and "mean ± s.e. of 2 seeds" in text
    assert text.index("tucka") < text.index("lora") < text.index("frozen")
    picture = (tmp_path / "page-data.svg").read_bytes()
    assert len(picture) > 5000
    compare.main(["--results", str(path), "--write", str(page)])
    assert page.read_text() == text and (tmp_path / "page-data.svg").read_bytes() == picture
    page.write_text("<!-- table: some other -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"page\.md has no block .* of runs that .*results\.csv has"):
        compare.write(path, page)


def test_the_figure_shows_every_method_at_its_place(tmp_path):
    tucka_row, frozen = (
        row_of("tucka", 0, 90.0, adapter_parameters=900),
        row_of("frozen", 0, 40.0, adapter_parameters=0),
    )
    frame = pd.DataFrame([tucka_row, row_of(score=80.0), row_of(seed=1, score=84.0), frozen]).assign(settings="{}")
    table = results.averages(frame)
    ax = figures.trade(plt.figure().subplots(), table)
    drawn = {container.get_label(): container[0].get_xydata().tolist() for container in ax.containers}
    assert drawn == {"tucka": [[900.0, 90.0]], "lora": [[1000.0, 82.0]]}
    assert [line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [40.0]
    height, width = imread(figures.draw(table, tmp_path / "figure.png")).shape[:2]
    assert width > 800 and height > 500


def test_settings_of_its_own_are_told_beside_a_method(tmp_path):
    path = tmp_path / "results.csv"
    results.append(path, row_of("tucka", adapter_parameters=900, settings={"r": 24, "k": 4}))
    own = {"r": 8, "k": 8, "trained_columns": None}
    results.append(path, row_of("tucka:k=8,trained_columns=None", adapter_parameters=950, settings=own))
    results.append(path, row_of("lora:r=3"))
    table = results.table(path, "some")
    text = compare.markdown(table)
    assert "| tucka r=8 k=8 trained_columns=None | 950 |" in text and "| tucka r=24 k=4 | 900 |" in text
    ax = figures.trade(plt.figure().subplots(), table)
    assert {text.get_text() for text in ax.texts} - {""} == {"k=8, trained_columns=None"}
    (tuckas,) = (container[0] for container in ax.containers if container.get_label() == "tucka")
    assert len(tuckas.get_xydata()) == 2 and tuckas.get_linestyle() == "None"


def test_a_method_that_starts_without_data_is_built_with_a_loader_at_hand():
    model = adapted(build("bert"), "tucka:init_router=kaiming", **SELECTION, fields=SMALL, calibration=[])
    assert model.active_peft_config.init_router == "kaiming"


# --- data ------------------------------------------------------------------------------------------------------------


def test_splits_share_no_row_and_have_the_same_labels():
    labels = np.repeat(range(4), (50, 30, 20, 20))
    parts = split(labels, (0.25, 12), seed=3)
    assert [len(part) for part in parts] == [30, 12, 78]
    assert sorted(np.concatenate(parts)) == list(range(120))
    assert (np.bincount(labels[parts[0]]) / 30 == np.bincount(labels) / 120).mean() >= 0.5
    with pytest.raises(ValueError, match="one entry per row"):
        Rows({"a": [1, 2], "b": [1]})


def test_docstrings_are_read_once_and_twins_are_told(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    (library / "pack" / "tests").mkdir(parents=True)
    (library / "one.py").write_text('"""Read the first line."""\ndef f():\n    """Give back number 1, please."""\n')
    method = '    def g(self):\n        """Go on to the end.\n\n        Not this."""\n'
    (library / "pack" / "part.py").write_text(f'class A:\n    """Give back number 2, please!"""\n{method}')
    (library / "pack" / "tests" / "t.py").write_text('"""A test that nobody reads."""\n')
    (library / "broken.py").write_text("def (:\n")
    assert docstrings.read(library) == {"one": ["Read the first line."], "pack": ["Go on to the end."]}


def test_docstrings_of_splits_do_not_overlap(tmp_path):
    directory = example_data.keep_docstrings(tmp_path)
    found = docstrings.load(0, directory)
    texts = [{text for text, _ in part} for part in found[:3]]
    assert all(texts) and not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    again = docstrings.load(0, directory)
    assert found == again and docstrings.load(1, directory).test != found.test
