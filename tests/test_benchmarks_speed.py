"""The benchmarks of speed and memory, on models of a few thousand parameters."""

import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are not part of what is installed

from benchmarks import (
    calibration,
    memory,
    shapes,
    speed,
    speed_figures,
    speed_measures,
    speed_report,
    speed_targets,
    timing,
)
from benchmarks.records import KEY, Records, circumstances
from benchmarks.shapes import Setting, new_batch, new_model
from benchmarks.speed_arms import BUILDERS, MERGED, TRAINED, build, training_step
from benchmarks.speed_measures import EXPERTS, Timed
from benchmarks.speed_options import records_of

TINY = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=40)
TINY |= dict(vocab_size=1000, num_hidden_layers=1)
OPTIONS = ["--layers", "1", "--batch", "2", "--positions", "5", "--rank", "4", "--threads", "1"]


@pytest.fixture
def tiny(monkeypatch):
    """Shapes of the same architectures, narrow."""
    for name in ("bert", "vit", "llama"):
        shape = shapes.SHAPES[name]
        monkeypatch.setitem(shapes.SHAPES, name, shape._replace(sizes={**shape.sizes, **TINY}))


def a_setting(model="bert", **fields):
    return Setting(model, **{**dict(layers=1, batch=2, positions=5, rank=4), **fields})


def records(what="train", setting=None, references=("lora", "frozen"), **seconds):
    timed = Timed(what, setting or a_setting(), seconds, references)
    return records_of(timed, circumstances("python -m benchmarks.speed"))


# Timing


def test_every_clock_runs_once_a_round_and_follows_different_ones():
    ran, enabled = [], []

    def clock(name):
        ran.append(name)
        enabled.append(gc.isenabled())
        return float(len(ran))

    seconds = timing.interleave({name: lambda name=name: clock(name) for name in "abc"}, rounds=4, warmup=2)
    rounds = [ran[i : i + 3] for i in range(0, len(ran), 3)]
    assert len(rounds) == 6 and all(sorted(one) == list("abc") for one in rounds)
    assert {one[0] for one in rounds} == set("abc")
    before_b = {one[one.index("b") - 1] for one in rounds if one[0] != "b"}
    assert before_b == {"a", "c"}
    assert all(len(taken) == 4 and min(taken) > 6 for taken in seconds.values())
    assert not any(enabled) and gc.isenabled()
    with pytest.raises(ValueError, match="rounds=0"):
        timing.interleave({"a": float}, rounds=0)


def test_ratios_are_taken_round_by_round():
    found = timing.summarise({"a": [1.0, 20.0, 3.0], "b": [2.0, 20.0, 1.0]}, ("b", "missing"))
    assert found["a"] == {
        "seconds": [2.0, 3.0, 11.5], "rounds": 3, "ratios": {"b": [0.75, 1.0, 2.0]}, "fastest": {"b": 1.0},
    }  # fmt: skip
    assert found["b"]["ratios"]["b"] == [1.0, 1.0, 1.0]


# Models and arms


@pytest.mark.parametrize(
    ("model", "millions"),
    [("bert", 109.5), ("vit", 85.8), ("minilm", 22.7), ("llama", 109.5), ("llama-1b", 1235.8), ("llama-7b", 6738.4)],
)
def test_shapes_have_the_sizes_they_are_known_for(model, millions):
    layers = shapes.SHAPES[model].config(**shapes.SHAPES[model].sizes).num_hidden_layers
    made = new_model(Setting(model, layers, 1, shapes.SHAPES[model].positions, 8, device="meta"))
    assert sum(parameter.numel() for parameter in made.parameters()) == pytest.approx(millions * 1e6, rel=1e-3)


def test_a_vision_model_takes_only_square_images():
    assert shapes.image_size(197) == 224
    with pytest.raises(ValueError, match="positions=128 is no n"):
        shapes.image_size(128)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("bert", arm) for arm in (*TRAINED, "tucka:k=2,t=3,p=2")),
        ("vit", "tucka"),
        ("vit", "frozen"),
        ("llama", "lora"),
    ],
)
def test_arms_train_their_adapters_over_the_same_weights(tiny, model, name):
    setting = a_setting(model)
    base, batch = new_model(setting), new_batch(setting)
    before = [parameter.clone() for parameter in base.parameters()]
    arm = build(name, base, setting, batch)
    held = {parameter.data_ptr() for parameter in arm.model.parameters()}
    assert {parameter.data_ptr() for parameter in base.parameters()} <= held
    trained = [parameter for parameter in arm.model.parameters() if parameter.requires_grad]
    start = [parameter.clone() for parameter in trained]
    loss = arm.model(**batch).loss
    assert loss.requires_grad, "nothing to go backward through"
    training_step(arm, batch)
    assert (arm.optimiser is None) == name.startswith("frozen") == (not trained)
    assert not trained or any(not torch.equal(was, now) for was, now in zip(start, trained))
    assert all(parameter.grad is None for parameter in arm.model.parameters())
    assert all(torch.equal(was, now) for was, now in zip(before, base.parameters()))


def test_the_frozen_arms_end_their_backward_where_they_say(tiny):
    setting = a_setting()
    base, batch = new_model(setting), new_batch(setting)
    reached = {}
    for name in ("frozen", "frozen-outputs", "lora"):
        model = build(name, base, setting, batch).model
        places = {"embeddings": "bert.embeddings.word_embeddings", "key": "bert.encoder.layer.0.attention.self.key"}
        for place, module in places.items():
            found = model.get_submodule(("base_model.model." if name == "lora" else "") + module)
            found.register_forward_hook(
                lambda m, i, output, where=(name, place): reached.update({where: output.requires_grad})
            )
        model(**batch)
    assert [place for place, flows in reached.items() if flows] == [("frozen", "embeddings"), ("frozen", "key")]


def test_merged_arms_are_base_models_again(tiny):
    setting = a_setting()
    base, batch = new_model(setting), new_batch(setting)
    kinds = [[type(module) for module in build(name, base, setting, batch).model.modules()] for name in MERGED]
    assert all(kind == kinds[0] for kind in kinds)


def test_an_unknown_arm_is_refused(tiny):
    with pytest.raises(ValueError, match=r"arms are frozen, .*'nothing'"):
        build("nothing", nn.Module(), a_setting(), {})


# Memory


class Squares(nn.Module):
    """A frozen product, and the sum of squares of what is positive of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5), requires_grad=False)

    def forward(self, x):
        return SimpleNamespace(loss=(x @ self.weight).relu().square().sum())


def test_saved_activations_are_storages_counted_once_without_parameters():
    model = Squares()
    x = torch.randn(7, 3, requires_grad=True)
    assert memory.saved_activation_bytes(model, {"x": x}) == 7 * 5 * 4  # for relu and square; the weight is no such
    model.weight.requires_grad_()
    assert memory.saved_activation_bytes(model, {"x": x}) == (7 * 5 + 7 * 3) * 4


@pytest.mark.parametrize("name", ["frozen", "lora", "tucka", "tucka-multiplicative", "tucka-core", "tucka-paper"])
def test_what_trains_is_the_closed_form(tiny, name):
    setting = a_setting(layers=2)
    base, batch = new_model(setting), new_batch(setting)
    found = memory.measure(name, base, setting, batch)
    assert found["trained_bytes"] == found["closed_form_bytes"] == found["moment_bytes"] / 2
    assert (found["trained_bytes"] == 0) == name.startswith("frozen")
    assert found["peak_live_bytes"] > found["saved_activation_bytes"] > 0


# Results


def test_measuring_again_replaces_a_record(tmp_path):
    store = Records(tmp_path / "deep" / "speed.json")
    store.put(records(lora=[1.0], tucka=[2.0]))
    store.put(records(setting=a_setting(rank=2), tucka=[4.0]))
    store.put(records(tucka=[3.0]))
    assert [(r["arm"], r["seconds"][1]) for r in store.read()] == [("lora", 1.0), ("tucka", 3.0), ("tucka", 4.0)]
    (one, *_) = store.read()
    assert {*KEY, "machine", "versions", "date", "command", "rounds", "ratios"} <= set(one)
    store.path.write_text('[{"what": "train"}]')
    with pytest.raises(ValueError, match="each have what, model"):
        store.put(records(lora=[1.0]))
    assert store.path.read_text() == '[{"what": "train"}]'


def test_targets_show_the_worst_arm_of_a_place():
    timed = records(lora=[1.0, 1.0], tucka=[0.9, 0.9], **{"tucka-batch": [1.02, 1.02]}, frozen=[0.5, 0.5])
    table = speed_targets.targets_table([*timed, *records("merged", None, ("frozen",), frozen=[1.0] * 3,
                                                          **{"tucka-merged": [0.9, 1.1, 1.2]})])  # fmt: skip
    train, merged = table.splitlines()[2:]
    assert "tucka-batch | 1.020 | no" in train and "≤ 1.00 × lora" in train
    assert "tucka-merged | 1.100 (1.000–1.150) | yes" in merged
    many = {name: [1.0] for name in EXPERTS} | {"tucka:k=1024,t=1": [1.01], "tucka:k=4096,t=1": [1.5]}
    (line,) = speed_targets.targets_table(records("experts", None, EXPERTS[:1], **many)).splitlines()[2:]
    assert "tucka:k=1024,t=1 | 1.010 | yes" in line


def test_tables_join_what_differs_in_one_setting_and_show_flop_use():
    (frozen,) = records(frozen=[2.0])
    assert speed_report.flop_use({**frozen, "operations": 4e12, "peak_tflops": 8.0}) == pytest.approx(0.25)
    by_rank = [record for r in (1, 2) for record in records("ranks", a_setting(rank=r), lora=[1.0], tucka=[0.5])]
    (group,) = speed_report.groups(by_rank)
    assert "| tucka | 2 | 500.0 | 0.500 |" in speed_report.time_table(group)
    assert len(speed_report.groups([*records(lora=[1.0]), *records(setting=a_setting(rank=2), lora=[1.0])])) == 2


def test_the_figure_shows_ratios_to_lora_and_the_experts():
    trained = records(lora=[1.0, 1.0, 1.0], tucka=[0.8, 0.9, 1.0])
    experts = records("experts", None, EXPERTS[:1], **{name: [1.0 + 0.1 * ("4096" in name)] for name in EXPERTS})
    ratios, scaling = speed_figures.draw([*trained, *experts]).axes
    points = [tuple(line.get_xdata()) for line in ratios.lines if len(line.get_xdata()) == 1]
    assert points == [(1.0,), (0.9,)] and [text.get_text() for text in ratios.get_yticklabels()] == ["lora", "tucka"]
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in scaling.lines if len(line.get_xdata()) == 7]
    assert curves[0] == ([1, 4, 16, 64, 256, 1024, 4096], [1.0] * 6 + [1.1]) and len(curves) == 2


# The command line


def test_measurements_from_the_command_line_are_kept_and_reported(tiny, tmp_path, capsys):
    out = ["--out", str(tmp_path / "speed.json")]
    few = ["--rounds", "2", "--warmup", "0", *OPTIONS, *out]
    written = "decode --model llama --new-tokens 2 --arms lora,tucka"
    for command in ("train", "forward --model vit --arms frozen,lora,tucka", written, "load", "merged"):
        assert speed.main([*command.split(), *few]) == 0
    linear = ["train", "--model", "llama", "--targets", "all-linear", "--arms", "lora,tucka:k=2,t=2,tucka-core"]
    assert speed.main([*linear, *few]) == 0
    assert memory.main(["--arms", "frozen,lora,tucka", *OPTIONS, *out]) == 0
    found = Records(tmp_path / "speed.json").read()
    whats = {"train", "forward", "prefill", "decode", "load", "save", "switch", "merged", "memory"}
    assert {record["what"] for record in found} == whats
    assert {r["settings"]["batch"] for r in found if r["what"] == "decode"} == {1, 8}
    assert all(r["seconds"][1] > 0 and r["rounds"] == 2 for r in found if r["what"] != "memory")
    assert all(set(r["ratios"]) == {"lora", "frozen"} for r in found if r["what"] == "forward")
    assert speed.main(["table", "--report", str(tmp_path / "report"), *out]) == 0
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"speed-tables.md", "speed.svg", "speed.png"}
    text = (tmp_path / "report" / "speed-tables.md").read_text()
    assert f"    python -m benchmarks.speed {written} --rounds 2" in text
    assert "tucka:k=2,t=2" in capsys.readouterr().out


def test_all_runs_the_plan_and_writes_the_tables(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "ON_CPU", ("train --arms lora,tucka", "memory --model llama --arms lora"))
    monkeypatch.chdir(tmp_path)
    own = ["--rounds", "1", "--threads", "1", "--out", "speed.json"]
    assert speed.main(["all", "--report", "report", *own]) == 0
    found = {record["command"]: record["settings"]["threads"] for record in Records("speed.json").read()}
    assert found == {
        "python -m benchmarks.speed train --arms lora,tucka --rounds 1 --threads 1 --out speed.json": 1,
        "python -m benchmarks.memory --model llama --arms lora --threads 1 --out speed.json": 1,
    }
    assert Path("report", "speed-tables.md").exists()


def test_calibrations_are_those_of_their_own_benchmark(monkeypatch, tmp_path):
    seen = []
    found = dict(calibration_seconds=3.0, step_seconds=0.1, steps=30.0)
    peaks = dict(calibration_peak_MiB=2.0, training_peak_MiB=1.0, arithmetic_MiB=0.5)
    monkeypatch.setattr(calibration, "measure_time", lambda args: seen.append(vars(args).copy()) or found)
    monkeypatch.setattr(calibration, "measure_memory", lambda args: dict(peaks))
    out = tmp_path / "speed.json"
    assert speed.main(["calibration", "--layers", "2", "--threads", "1", "--out", str(out)]) == 0
    assert [(one["start"], one["layers"]) for one in seen] == [("identity", 2), ("hosvd", 2), ("gradient", 2)]
    text = speed_report.write(Records(out).read(), tmp_path)
    assert "| gradient | 3.00 | 0.10 | 30.00 | 2.00 | 1.00 | 0.50 |" in text
    without, with_loss = (line for line in text.splitlines() if line.startswith("| calibration with"))
    assert without.endswith("| 30.000 | no |") and with_loss.endswith("| 30.000 | yes |")


def test_imports_are_timed_in_fresh_interpreters():
    (timed,) = speed_measures.imports(1, 0, {"none": "pass", "slow": "import time; time.sleep(0.2)"})
    (none,), (slow,) = timed.seconds["none"], timed.seconds["slow"]
    assert none < 0.1 and slow >= 0.2 and timed.references == ("none",)


@pytest.mark.parametrize("line", [*speed.ON_CPU, *speed.ON_CUDA])
def test_the_plan_is_made_of_commands_that_exist(line):
    what, *options = line.split()
    args = memory.read_arguments(options) if what == "memory" else speed.read_arguments([what, *options])
    assert shapes.setting_of(args).layers >= 6
    assert set(TRAINED) <= set(BUILDERS)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds 0 CUDA devices"):
        speed.main(["train", "--device", "cuda"])
