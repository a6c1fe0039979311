"""Saving where it cannot be done: the adapter that is there stays, and the error says so."""

import errno
import os
import resource
import subprocess
from pathlib import Path

import peft
import pytest
import torch
from conftest import batch_for, build, first_output
from kill_steps import below
from peft import PeftModel
from safetensors import SafetensorError
from saving_bench import ADAPTER, answer_of_child, held, new_pair

import tucka
from tucka.saving import save

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes that lose their rights")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two adapters, and their files as PEFT writes them."""
    return new_pair(lambda: tmp_path_factory.mktemp("as-peft-writes-it"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def message_of(model, directory):
    """The message of a save that must fail, in a child process: its errno and its text."""
    try:
        save(model, directory)
    except OSError as error:
        return f"{error.errno}: {error}"
    raise AssertionError("saved")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk(pair, tmp_path, monkeypatch, error):
    models, contents = pair
    save(models[0], tmp_path / "old")
    before = below(tmp_path)

    def fail(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(peft.peft_model, "safe_save_file", fail)
    for name in ("old", "new"):
        with pytest.raises(OSError, match=r"not saved to .*, which holds what it held before.*No space") as raised:
            save(models[1], tmp_path / name)
        assert raised.value.errno == errno.ENOSPC and str(tmp_path / name) in str(raised.value)
    assert held(tmp_path / "old") == contents[0] and below(tmp_path) == before


@pytest.mark.parametrize("share", [0, 0.4, 0.9])
def test_a_disk_that_is_really_full(pair, small_disk, share):
    """With no room left, or with room for a part of the weights."""
    models, contents = pair
    save(models[0], small_disk / "adapter")
    before, page = below(small_disk / "adapter"), os.statvfs(small_disk).f_frsize
    left = int(share * len(contents[1][ADAPTER[1]]) / page)
    (small_disk / "other").write_bytes(bytes(page * (os.statvfs(small_disk).f_bavail - left)))
    with pytest.raises(OSError, match=r"not saved to .*adapter, which holds what it held before.*No space") as raised:
        save(models[1], small_disk / "adapter")
    assert raised.value.errno == errno.ENOSPC
    assert held(small_disk / "adapter") == contents[0] and below(small_disk / "adapter") == before
    batch = batch_for("bert")
    loaded = PeftModel.from_pretrained(build("bert"), small_disk / "adapter").eval()
    assert torch.equal(first_output(loaded(**batch)), first_output(models[0].eval()(**batch)))
    (small_disk / "other").unlink()
    save(models[1], small_disk / "adapter")
    assert held(small_disk / "adapter") == contents[1]


def test_a_failure_leaves_the_model_as_it_was(pair, tmp_path, monkeypatch):
    """PEFT marks the configuration for inference while it writes it."""
    (model, _), _ = pair

    def fail(config, folder, **options):
        assert config.inference_mode
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tucka.TuckAConfig, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space"):
        save(model, tmp_path / "x")
    assert not model.peft_config["default"].inference_mode and below(tmp_path) == set()


def test_a_disk_that_fills_up_at_any_size(pair, tmp_path):
    """The system refuses files above a limit, whichever of the adapter's files reaches it first."""
    models, contents = pair
    save(models[0], tmp_path)
    before = below(tmp_path)

    def act(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return message_of(models[1], tmp_path)

    for limit in (0, 1000, len(contents[1][ADAPTER[1]]) - 1):
        answer = answer_of_child(lambda limit=limit: act(limit))
        assert answer.startswith(f"{errno.EFBIG}: ") and f"not saved to {tmp_path}, which holds" in answer
        assert held(tmp_path) == contents[0] and below(tmp_path) == before


def test_a_directory_that_may_not_be_written_to(pair, tmp_path):
    models, contents = pair
    save(models[0], tmp_path / "adapter")
    before = below(tmp_path)
    (tmp_path / "adapter").chmod(0o555)

    def act(name):
        os.chdir(tmp_path)
        if os.getuid() == 0:  # whom no mode stops
            os.chmod(".", 0o755)
            os.setgid(65534)
            os.setuid(65534)
        else:
            os.chmod(".", 0o555)
        return message_of(models[1], name)

    for name in ("adapter", "missing/adapter"):
        answer = answer_of_child(lambda name=name: act(name))
        assert answer.startswith(f"{errno.EACCES}: ") and f"not saved to {name}, which holds" in answer
    tmp_path.chmod(0o755)
    assert held(tmp_path / "adapter") == contents[0] and below(tmp_path) == before


def test_a_file_where_the_directory_should_be(pair, tmp_path):
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/adapter"):
        with pytest.raises(OSError, match="the adapter was not saved to"):
            save(pair[0][0], tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine" and below(tmp_path) == {"file"}
