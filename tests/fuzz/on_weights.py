"""What can be done to the header and the tensors of a weights file."""

import math
import struct
from collections.abc import Callable
from random import Random

from .directories import WEIGHTS, Directory, Tensor, header_end, header_of, with_header
from .registry import PATHS, SIZES, TEXTS, mutation


@mutation
def header_length(directory: Directory, rng: Random) -> Directory:
    weights = directory.files[WEIGHTS]
    true = header_end(weights) - 8
    length = rng.choice((0, 1, 2, true - 1, true + 1, len(weights), 10**8, 10**8 + 1, 2**31, 2**63 - 1, 2**64 - 1))
    return directory.with_file(WEIGHTS, length.to_bytes(8, "little") + weights[8:])


@mutation
def declared(directory: Directory, rng: Random) -> Directory:
    """A shape, an offset or a type that the bytes do not bear out."""
    weights = directory.files[WEIGHTS]
    header = header_of(weights)
    for key in rng.sample(sorted(key for key in header if key != "__metadata__"), rng.randint(1, 2)):
        entry = header[key]
        what = rng.choice(("shape", "shape", "data_offsets", "dtype", "entry"))
        if what == "shape":
            shape = [rng.choice((size, *SIZES)) for size in entry["shape"]]
            entry["shape"] = rng.choice((shape, [*shape, 0], [], [[1]], None, "3", {"0": 1}, [1.5], [-1], shape * 40))
        elif what == "data_offsets":
            begin, end = entry["data_offsets"]
            odd = ([end, begin], [begin, 2**64 - 1], [-1, end], [0, end], [begin], [begin, end, end], None, ["0", "1"])
            entry["data_offsets"] = rng.choice((*odd, [begin + 1, end + 1], [0, 0], [begin, begin]))
        elif what == "dtype":
            entry["dtype"] = rng.choice(("F64", "F16", "I64", "BOOL", "F8_E4M3", "C64", "F4", "object", "", 3, None))
        else:
            header[key] = rng.choice((None, [], 3, "x", {}, {**entry, "extra": 1}, [entry]))
    return directory.with_file(WEIGHTS, with_header(weights, header))


@mutation
def metadata(directory: Directory, rng: Random) -> Directory:
    weights = directory.files[WEIGHTS]
    texts = ({"format": "tf"}, {"format": "pkl"}, {"format": 1}, {"x": {"y": 1}}, {"k" * 9999: "v" * 99999})
    odd = {"__metadata__": rng.choice((*texts, {}, None, [], "pt"))}
    return directory.with_file(WEIGHTS, with_header(weights, {**header_of(weights), **odd}))


@mutation
def nested_header(directory: Directory, rng: Random) -> Directory:
    depth = rng.choice((100, 127, 128, 1000, 100_000))
    text = rng.choice(('{"a":' * depth + "1" + "}" * depth, "[" * depth + "]" * depth, "[" * depth))
    return directory.with_file(WEIGHTS, with_header(directory.files[WEIGHTS], text))


# --- tensors of a file that is whole -----------------------------------------------------------------------------

ITEM = dict(F64=8, F32=4, F16=2, BF16=2, I64=8, I32=4, I16=2, I8=1, U64=8, U16=2, U8=1, BOOL=1, C64=8, F8_E4M3=1,
            F8_E5M2=1, F8_E8M0=1)  # fmt: skip
"""Bytes of a number."""


def _with_one(directory: Directory, rng: Random, change: Callable[[Tensor], Tensor | list]) -> Directory:
    tensors = list(directory.tensors)
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(tensors))
        new = change(tensors[place])
        tensors[place : place + 1] = new if isinstance(new, list) else [new]
    return directory.with_tensors(tensors)


@mutation
def values(directory: Directory, rng: Random) -> Directory:
    """NaN, infinities, the largest and the smallest numbers."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.dtype != "F32" or not tensor.data:
            return tensor
        data = bytearray(tensor.data)
        number = rng.choice((math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, 0.0))
        everywhere = rng.random() < 0.3
        places = range(0, len(data), 4) if everywhere else [4 * rng.randrange(len(data) // 4)]
        for place in places:
            data[place : place + 4] = struct.pack("<f", number)
        return tensor._replace(data=bytes(data))

    return _with_one(directory, rng, change)


@mutation
def reshaped(directory: Directory, rng: Random) -> Directory:
    """Another shape, with as many bytes as it takes."""

    def change(tensor: Tensor) -> Tensor:
        shape = [rng.choice((size, size, size + 1, 0, 1, 2, 16, 64)) for size in tensor.shape]
        shape = rng.choice((shape, shape[::-1], shape[:-1], [*shape, 1], [1, *shape], [math.prod(shape)], []))
        return tensor._replace(shape=shape, data=bytes(math.prod(shape) * ITEM[tensor.dtype]))

    return _with_one(directory, rng, change)


@mutation
def retyped(directory: Directory, rng: Random) -> Directory:
    """Another type, with as many bytes as it takes."""

    def change(tensor: Tensor) -> Tensor:
        dtype = rng.choice(sorted(ITEM))
        count = math.prod(tensor.shape) * ITEM[dtype]
        return tensor._replace(dtype=dtype, data=rng.choice((bytes(count), rng.randbytes(count), b"\x01" * count)))

    return _with_one(directory, rng, change)


@mutation
def widened(directory: Directory, rng: Random) -> Directory:
    """Whole and consistent, but made for a model of another width."""
    width = rng.choice((8, 15, 17, 24, 32, 768))

    def resized(tensor: Tensor) -> Tensor:
        shape = [width if size == 16 else size for size in tensor.shape]
        return tensor._replace(shape=shape, data=bytes(math.prod(shape) * ITEM[tensor.dtype]))

    return directory.with_tensors([resized(tensor) for tensor in directory.tensors])


@mutation
def deepened(directory: Directory, rng: Random) -> Directory:
    """Whole and consistent, but made for a model of another depth."""
    shift = rng.choice((1, 2, 10))
    further = [t._replace(key=t.key.replace("layer.1.", f"layer.{1 + shift}.")) for t in directory.tensors]
    return directory.with_tensors(rng.choice((further, [*directory.tensors, *further], further[: len(further) // 2])))


@mutation
def rescaled(directory: Directory, rng: Random) -> Directory:
    """Sizes of the configuration changed, and the tensors with them."""
    field, size = rng.choice("rktp"), rng.choice((1, 2, 3, 5, 7, 16, 17, 200, 5000))
    old = directory.config[field]

    def resized(tensor: Tensor) -> Tensor:
        shape = [size if number == old else number for number in tensor.shape]
        if math.prod(shape) > 10**6:
            return tensor
        return tensor._replace(shape=shape, data=bytes(math.prod(shape) * ITEM[tensor.dtype]))

    return directory.with_fields(**{field: size}).with_tensors([resized(t) for t in directory.tensors])


@mutation
def keys(directory: Directory, rng: Random) -> Directory:
    """Names with path tricks, other prefixes, control characters, absurd lengths."""

    def change(tensor: Tensor) -> Tensor:
        parts = tensor.key.split(".")
        place = rng.randrange(len(parts))
        odd = rng.choice((*PATHS, *TEXTS, parts[place] * 2, "", "default", "modules_to_save.default", "x" * 100_000))
        parts[place] = rng.choice((odd, odd + parts[place], parts[place] + odd))
        return tensor._replace(key=".".join(parts))

    return _with_one(directory, rng, change)


@mutation
def missing(directory: Directory, rng: Random) -> Directory:
    tensors = directory.tensors
    left = rng.choice((0, 1, len(tensors) - 1, rng.randrange(len(tensors))))
    return directory.with_tensors(rng.sample(tensors, left))


@mutation
def doubled(directory: Directory, rng: Random) -> Directory:
    """A key twice; a shared factor again at a layer that borrows it."""

    def change(tensor: Tensor) -> list:
        other = tensor.key.replace("layer.0.", "layer.1.") if rng.random() < 0.5 else tensor.key
        return [tensor, tensor._replace(key=other, data=bytes(len(tensor.data)))]

    return _with_one(directory, rng, change)


BASE_WEIGHTS = {
    "classifier.weight": [2, 16], "classifier.bias": [2], "pooler.dense.weight": [16, 16], "dense.weight": [16, 16],
    "word_embeddings.weight": [20, 16], "layer.0.query.weight": [16, 16], "layer.0.query.base_layer.weight": [16, 16],
    "layer.1.query.bias": [16], "layer.1.value.base_layer.bias": [16], "classifier.original_module.weight": [2, 16],
    "classifier.modules_to_save.default.weight": [2, 16], "pooler.modules_to_save.dense.weight": [16, 16],
    "layer.0.query.tucka_experts.default.core": [2, 1, 3, 3], "layer.0.query.tucka_experts.other.core": [2, 1, 3, 3],
}  # fmt: skip


@mutation
def base_weights(directory: Directory, rng: Random) -> Directory:
    """Weights of the base model, which an adapter must not replace."""
    extra = []
    for name in rng.sample(sorted(BASE_WEIGHTS), rng.randint(1, 4)):
        prefix = rng.choice(("base_model.model.", "base_model.model.", "", "model.", "base_model.", "_orig_mod."))
        shape = BASE_WEIGHTS[name]
        extra.append(Tensor(prefix + name, "F32", shape, b"\x00\x00\x80\x3f" * math.prod(shape)))
    return directory.with_tensors([*directory.tensors, *extra])


@mutation
def extra_tensors(directory: Directory, rng: Random) -> Directory:
    """More tensors than the adapter has: for layers that are not adapted, empty ones, many."""
    layer = "base_model.model.layer.0.key"
    parts = ("tucka_experts.core", "tucka_experts.input_factor", "tucka_router.centroids", "tucka_x.y", "lora_A.weight")
    one = Tensor(f"{layer}.{rng.choice(parts)}", "F32", [2, 2], bytes(16))
    place = rng.choice(("x", layer))
    many = [Tensor(f"{place}.tucka_experts.{i}", "F32", [0], b"") for i in range(rng.choice((100, 1000)))]
    return directory.with_tensors([*directory.tensors, *rng.choice(([one], many))])
