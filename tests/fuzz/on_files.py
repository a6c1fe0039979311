"""What can be done to files whatever is in them, and to what stands in their place."""

import pickle
from random import Random

from .directories import CONFIG, PICKLE, WEIGHTS, Directory, header_end, with_header
from .registry import mutation

MARKER = "executed"
"""File that a payload makes in the current directory."""


def _damaged(content: bytes, rng: Random, start: int = 0, end: int | None = None) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(start, max(start + 1, min(end or len(changed), len(changed))))
        act = rng.randrange(4)
        if act == 0:
            changed[place] ^= 1 << rng.randrange(8)
        elif act == 1:
            changed[place] = rng.randrange(256)
        elif act == 2:
            del changed[place : place + rng.randint(1, 8)]
        else:
            changed[place:place] = rng.randbytes(rng.randint(1, 8))
    return bytes(changed)


@mutation
def config_bytes(directory: Directory, rng: Random) -> Directory:
    return directory.with_file(CONFIG, _damaged(directory.files[CONFIG], rng))


@mutation
def config_characters(directory: Directory, rng: Random) -> Directory:
    """Swap, drop or double characters that JSON lives by."""
    text = directory.files[CONFIG].decode()
    places = [i for i, c in enumerate(text) if c in '{}[]",:0123456789ntfalsru.-']
    for place in rng.sample(places, rng.randint(1, 3)):
        text = text[:place] + rng.choice('{}[]",:0123456789eE+-.x\\') * rng.randrange(3) + text[place + 1 :]
    return directory.with_file(CONFIG, text.encode())


@mutation
def header_bytes(directory: Directory, rng: Random) -> Directory:
    weights = directory.files[WEIGHTS]
    return directory.with_file(WEIGHTS, _damaged(weights, rng, 0, header_end(weights)))


@mutation
def data_bytes(directory: Directory, rng: Random) -> Directory:
    weights = bytearray(directory.files[WEIGHTS])
    for _ in range(rng.choice((1, 4, 64))):
        weights[rng.randrange(header_end(weights), len(weights))] ^= 1 << rng.randrange(8)
    return directory.with_file(WEIGHTS, bytes(weights))


@mutation
def cut(directory: Directory, rng: Random) -> Directory:
    name = rng.choice((CONFIG, WEIGHTS, WEIGHTS))
    content = directory.files[name]
    return directory.with_file(name, content[: rng.choice((0, 1, 7, 8, 9, rng.randrange(len(content))))])


@mutation
def grown(directory: Directory, rng: Random) -> Directory:
    name = rng.choice((CONFIG, WEIGHTS))
    tail = rng.choice((b"\0", b" ", b"\0" * 4096, rng.randbytes(64), directory.files[name], b"{}"))
    return directory.with_file(name, directory.files[name] + tail)


@mutation
def swapped_files(directory: Directory, rng: Random) -> Directory:
    content = rng.choice((directory.files[CONFIG], b"PK\x03\x04", b"\x80\x04.", b"GGUF", b"\x89HDF\r\n", b"", b"{}"))
    return directory.with_file(WEIGHTS, content)


class _Payload:
    def __reduce__(self):
        return open, (MARKER, "w")


PAYLOAD = pickle.dumps(_Payload())


@mutation
def pickles(directory: Directory, rng: Random) -> Directory:
    """A pickle that would make a file, beside the weights, in their place or under their name."""
    where = rng.randrange(4)
    if where == 0:
        return directory.with_file(PICKLE, PAYLOAD)
    if where == 1:
        return directory.without(WEIGHTS).with_file(PICKLE, PAYLOAD)
    if where == 2:
        return directory.with_file(WEIGHTS, PAYLOAD)
    return directory.with_file(CONFIG, PAYLOAD)


@mutation
def special_files(directory: Directory, rng: Random) -> Directory:
    """Directories, pipes, links and files of holes where files are expected."""
    name = rng.choice((CONFIG, WEIGHTS, WEIGHTS))
    devices = ("/dev/zero", "/dev/urandom", "/dev/stdin", "/proc/self/mem")
    targets = (name, CONFIG, "nowhere", "..", "/etc/passwd", *devices)
    what = rng.choice(("directory", "fifo", "link", "link", "holes", "gone"))
    if what == "gone":
        return directory.without(name)
    size = 2**20 if name == CONFIG else rng.choice((8, 2**20, 2**33, 2**42))
    return directory.with_special(name, what, dict(link=rng.choice(targets), holes=(b"", size)).get(what))


@mutation
def holes(directory: Directory, rng: Random) -> Directory:
    """A whole file that declares far more than was written: all the rest is a hole."""
    groups = rng.choice((10**5, 10**7))
    length = groups * 9 * 4
    entry = dict(dtype="F32", shape=[groups, 1, 3, 3], data_offsets=[0, length])
    head = with_header(bytes(8), {"base_model.model.layer.0.x.tucka_experts.core": entry})
    return directory.with_fields(k=groups).with_special(WEIGHTS, "holes", (head, len(head) + length))
