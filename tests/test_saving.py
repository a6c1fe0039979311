"""Saving: what is written, and what is on disk whenever a save is killed.

Processes are forked from this one, which has imported everything, so that hundreds of them can be killed in seconds.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from conftest import adapted, assert_same_tensors, batch_for, build, first_output, randomise, stored
from kill_steps import below, exit_code, fork, kill, write_version
from peft import PeftModel
from saving_bench import ADAPTER, held, new_pair

import tucka
from tucka import files
from tucka.saving import save

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes to kill")

KILLS = 200


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two adapters, and their files as PEFT writes them."""
    return new_pair(lambda: tmp_path_factory.mktemp("as-peft-writes-it"))


# --- what a save writes ------------------------------------------------------------------------------------------


def test_a_save_is_what_save_pretrained_writes(pair, tmp_path):
    (model, _), _ = pair
    model.save_pretrained(tmp_path / "theirs")
    assert save(model, str(tmp_path / "a" / "ours")) == tmp_path / "a" / "ours"
    names = below(tmp_path / "theirs")
    assert below(tmp_path / "a" / "ours") == names
    assert held(tmp_path / "a" / "ours", names) == held(tmp_path / "theirs", names)


def test_other_files_stay_and_the_card_is_brought_up_to_date(pair, tmp_path):
    models, contents = pair
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / ADAPTER[0]).write_text("{}")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# What I found out\n")
    before, inode = below(tmp_path), (tmp_path / "notes.txt").stat().st_ino
    for model, content in zip(models * 2, contents * 2):
        save(model, tmp_path)
        assert held(tmp_path) == content
        assert below(tmp_path) == before | set(ADAPTER)
        assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    card = (tmp_path / "README.md").read_text()
    assert "license: mit" in card and "What I found out" in card and "library_name: peft" in card
    assert (tmp_path / "notes.txt").stat().st_ino == inode
    assert (tmp_path / "checkpoint-3" / ADAPTER[0]).read_text() == "{}"


def test_several_adapters_lie_where_peft_puts_them(tmp_path):
    model = adapted("bert")
    model.add_adapter("other", tucka.TuckAConfig(r=2))
    save(model, tmp_path / "both")
    model.save_pretrained(tmp_path / "theirs")
    assert below(tmp_path / "both") == below(tmp_path / "theirs") >= {f"other/{name}" for name in ADAPTER}
    for _ in range(2):  # again over itself, both changed
        randomise(model)
        save(model, tmp_path / "both")
    loaded = PeftModel.from_pretrained(build("bert"), tmp_path / "both" / "other", adapter_name="other")
    assert_same_tensors(stored(loaded, "other"), stored(model, "other"))
    save(model, tmp_path / "one", selected_adapters=["other"])
    assert below(tmp_path / "one") == {"README.md", "other", *(f"other/{name}" for name in ADAPTER)}


def test_options_reach_peft(pair, tmp_path):
    (model, _), _ = pair
    gathered = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    save(model, tmp_path / "zeros", state_dict=gathered)
    zeros = peft.load_peft_weights(tmp_path / "zeros", device="cpu")
    assert zeros and not any(value.any() for value in zeros.values())
    save(model, tmp_path / "second-process", is_main_process=False)
    assert below(tmp_path / "second-process") == set()


@pytest.mark.parametrize("change", [lambda model: model.get_base_model(), lambda model: torch.nn.DataParallel(model)])
def test_what_is_no_peft_model_is_refused(pair, tmp_path, change):
    with pytest.raises(TypeError, match=r"save takes a PeftModel, but got a (Bert|DataParallel).*unwrap_model"):
        save(change(pair[0][0]), tmp_path / "x")
    assert below(tmp_path) == set()


# --- killed ------------------------------------------------------------------------------------------------------


def save_in_turns(models, directory, first):
    while True:
        for index in (first, 1 - first):
            save(models[index], directory)


def test_killed_at_random_moments(pair, tmp_path):
    """200 kills: the directory always holds one of the two adapters, whole, and what reads it finds that one."""
    models, contents = pair
    directory = tmp_path / "adapter"
    save(models[0], directory)
    rng, found, interrupted, with_links, longest = random.Random(0), [contents[0]], 0, [], 0.1
    for _ in range(KILLS):
        first = rng.randrange(2)
        child = fork(lambda first=first: save_in_turns(models, directory, first))
        time.sleep(rng.uniform(0, longest))
        assert kill(child) == -signal.SIGKILL
        now = held(directory)
        assert now in contents, {name: None if data is None else len(data) for name, data in now.items()}
        longest *= 0.85 if now != found[-1] else 1.07  # kills before a commit and after it, on any machine
        found.append(now)
        interrupted += (directory / files.WORKSPACE).exists()
        if (directory / ADAPTER[0]).is_symlink() and len(with_links) < 3:
            with_links.append(shutil.copytree(directory, tmp_path / f"links-{len(with_links)}", symlinks=True))
    assert min(map(found.count, contents)) >= KILLS // 10, "both adapters are found"
    assert interrupted >= KILLS // 4, "the kills hit saves"
    for survivor in [directory, *with_links]:
        model = models[contents.index(held(survivor))].eval()
        loaded = PeftModel.from_pretrained(build("bert"), survivor).eval()
        batch = batch_for("bert")
        assert torch.equal(first_output(loaded(**batch)), first_output(model(**batch)))
    save(models[0], directory)
    assert held(directory) == contents[0]
    assert below(directory) == {"README.md", *ADAPTER}, "the next save clears away what kills left"


def outcomes_of_kills(directory, **case):
    """What is read after a kill before every step of a replacement, and what once that is settled."""
    program = [sys.executable, Path(__file__).with_name("kill_steps.py"), directory, json.dumps(case)]
    found = json.loads(subprocess.run(program, check=True, capture_output=True, timeout=120).stdout)
    assert len(found) > 8
    kept = {name for name in found[-1][2] if not (directory / "0" / name).is_dir()}
    assert kept == {*case["old"], *case["new"]}, "nothing else is left"
    return [(killed, settled) for killed, settled, _ in found]


STEPS = {
    "first": dict(old=[], new=["a.json", "b.bin"]),
    "one": dict(old=["a.json", "b.bin"], new=["b.bin"]),
    "several": dict(old=["a.json", "sub/a.json"], new=["a.json", "sub/a.json", "sub/b.bin", "new.md"]),
}


@pytest.mark.parametrize("case", STEPS)
def test_killed_at_every_step(case, tmp_path):
    """Before the commit the old files are read, after it the new ones; settling changes nothing that is read."""
    names = STEPS[case]
    old = {name: f"old {name}" if name in names["old"] else None for name in {*names["old"], *names["new"]}}
    new = {**old, **{name: f"new {name}" for name in names["new"]}}
    committed = []
    for killed, settled in outcomes_of_kills(tmp_path, **names, links=True):
        assert killed == settled and killed in (old, new)
        committed.append(killed == new)
    assert committed == sorted(committed) and len(set(committed)) == 2


def test_without_links_nothing_is_mixed_and_settling_completes(tmp_path):
    names = ["a.json", "b.bin"]
    old, new = ({name: f"{version} {name}" for name in names} for version in ("old", "new"))
    committed = []
    for killed, settled in outcomes_of_kills(tmp_path, old=names, new=names, links=False):
        assert len({content.split()[0] for content in killed.values() if content is not None}) <= 1
        assert settled in (old, new)
        committed.append(settled == new)
    assert committed == sorted(committed) and len(set(committed)) == 2


def test_many_saves_at_once(tmp_path):
    """Nothing of one is lost to another, whichever comes first."""

    def act(process):
        for turn in range(5):
            assert len(files.replace_together(tmp_path, write_version(f"{process}-{turn}", ["a.json", "b.bin"]))) == 2

    children = [fork(lambda process=process: act(process)) for process in range(4)]
    assert [exit_code(child) for child in children] == [0] * 4
    versions = {content.split()[0] for content in held(tmp_path, ["a.json", "b.bin"]).values()}
    assert len(versions) == 1 and below(tmp_path) == {"a.json", "b.bin"}


def test_saves_wait_for_each_other(tmp_path):
    """A save clears away what dead processes left, never the work of one that lives."""

    def slowly(folder):
        (tmp_path / "started").touch()
        write_version("slow", ["a.json", "b.bin"])(folder)
        time.sleep(0.5)

    directory = tmp_path / "files"
    directory.mkdir()

    def act():
        assert len(files.replace_together(directory, slowly)) == 2

    child = fork(act)
    while not (tmp_path / "started").exists():
        time.sleep(0.005)
    files.replace_together(directory, write_version("quick", ["a.json", "b.bin"]))
    assert exit_code(child) == 0, "the other save was not disturbed"
    assert held(directory, ["a.json", "b.bin"]) == {name: f"quick {name}".encode() for name in ("a.json", "b.bin")}
    assert below(directory) == {"a.json", "b.bin"}


# --- a single file -----------------------------------------------------------------------------------------------


def test_a_file_keeps_its_mode_and_a_failure_leaves_it(tmp_path):
    path = tmp_path / "table.csv"
    files.write_atomically(path, lambda temporary: temporary.write_text("old"))
    path.chmod(0o640)
    files.write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, fail)
    assert path.read_text() == "new" and below(tmp_path) == {"table.csv"}
