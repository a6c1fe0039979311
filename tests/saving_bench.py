"""Two adapters to save over one another, and what a reader finds of them."""

import os

from conftest import adapted
from kill_steps import exit_code, fork

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def answer_of_child(function):
    """What a function returns, a text, in a child process."""
    reading, writing = os.pipe()
    child = fork(lambda: os.write(writing, function().encode()))
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    assert exit_code(child) == 0
    return answer


def held(directory, names=ADAPTER):
    """The bytes of an adapter's files as a reader finds them."""
    return {name: (directory / name).read_bytes() if (directory / name).exists() else None for name in names}


def new_pair(new_folder):
    """Two adapters that differ in configuration and weights, and their files as PEFT writes them."""
    models, contents = [adapted("bert", r=4), adapted("bert", r=6, alpha=1.0)], []
    for model in models:
        folder = new_folder()
        model.save_pretrained(folder)
        contents.append(held(folder))
    assert not set(contents[0].values()) & set(contents[1].values())
    return models, contents
