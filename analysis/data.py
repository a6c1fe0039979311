"""Models and data from local files, for what an adapter is measured with.

Arrays (``.safetensors``, ``.npz``) hold the model's arguments, one row per sample; texts (``.jsonl``, ``.csv``, also
``.gz``) are tokenised. Nothing is unpickled.
"""

from __future__ import annotations

import inspect
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

ARRAYS = (".safetensors", ".npz")
TABLES = (".jsonl", ".csv")
TEXT = "text"
LABEL = "__label__"
"""Entry of the batches that holds the labels; no model has an argument of that name."""

MOST_TOKENS = 512
"""Texts are cut to so many tokens, or to what the model takes if that is less."""


class Data(NamedTuple):
    """Batches of a file.

    Attributes
    ----------
    batches : list of dict
        The model's arguments; and where labels were asked for, those of the samples under `LABEL`.
    labels : str or None
        `LABEL`, as `analysis.observe` takes it, or None without labels.
    samples : int
        How many samples the batches hold.
    """

    batches: list[dict[str, Any]]
    labels: str | None
    samples: int


def load_model(adapter: str | Path, model: str | Path | None = None) -> PeftModel:
    """Load a saved adapter onto its base model, in evaluation mode.

    Parameters
    ----------
    adapter : str or Path
        Directory of the adapter.
    model : str or Path, optional
        Directory or hub id of the base model; default: what the adapter's configuration names, if that is a local
        directory.

    Raises
    ------
    ValueError
        If the base model is unknown, has no architecture in transformers, or does not fit the adapter.
    OSError
        If the base model cannot be read.
    """
    name = str(model) if model is not None else _default_base(adapter)
    found = _configuration(name).architectures or []
    if not found:
        raise ValueError(f"the configuration of {name} names no architecture, so its class is unknown")
    kind = getattr(transformers, found[0], None)
    if kind is None:
        raise ValueError(f"{name} is a {found[0]}, which transformers {transformers.__version__} lacks")
    return PeftModel.from_pretrained(kind.from_pretrained(name), str(adapter)).eval()


def read_data(
    path: str | Path,
    model: PeftModel,
    *,
    labels: str | None = None,
    tokenizer: str | Path | None = None,
    samples: int = 512,
    size: int = 32,
) -> Data:
    """Read batches that a model takes.

    Parameters
    ----------
    path : str or Path
        Arrays of equal length that are arguments of the model (others are left out), or a table with a column "text",
        which is tokenised, padded and truncated.
    model : PeftModel
        Takes the batches.
    labels : str, optional
        Array or column with a label (a class, a domain, a task; a number or a word) for every sample.
    tokenizer : str or Path, optional
        Directory or hub id; default: that of the base model.
    samples : int
        Of longer files, so many samples are drawn, the same every time and in their order.
    size : int
        Samples in a batch.

    Returns
    -------
    Data

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is of another kind, broken or empty, lacks arguments or labels, or its arrays differ in length.
    """
    path = Path(path)
    if samples < 1 or size < 1:
        raise ValueError(f"samples and the size of a batch are at least 1, got {samples} and {size}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    suffix = _suffix(path)
    if suffix in ARRAYS:
        arrays = _read_arrays(path)
        rows = _drawn(_common_length(path, arrays), samples)
        found = None if labels is None else _labels(path, labels, arrays)
        given = {name: _tensor(name, values[rows], model) for name, values in _arguments(path, arrays, model).items()}
        return _batches(given, None if found is None else found[rows], size)
    if suffix in TABLES:
        table = _read_table(path)
        found = None if labels is None else _labels(path, labels, {name: table[name].to_numpy() for name in table})
        rows = _drawn(len(table), samples)
        given = _tokens(path, table[TEXT].iloc[rows], model, tokenizer)
        return _batches(given, None if found is None else found[rows], size)
    raise ValueError(f"data is one of {', '.join((*ARRAYS, *TABLES))} (tables also .gz), got {path.name}")


# --- models --------------------------------------------------------------------------------------------------------


def _default_base(adapter: str | Path) -> str:
    name = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not name or not Path(name).is_dir():
        named = f"names {name!r}, which is no local directory" if name else "names none"
        raise ValueError(f"the base model has to be given: the adapter's configuration {named}")
    return name


def _configuration(name: str) -> Any:
    """The configuration of a base model."""
    local = Path(name).is_dir()
    # What starts like a path or has several parts is no id of the hub, which would be asked in vain.
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"there is no directory {name} with a base model")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        place = "the directory" if local else "no local directory, and the hub's"
        raise ValueError(f"base model {name!r} ({place}) cannot be read: {error}") from error


def _base(model: PeftModel) -> nn.Module:
    return model.get_base_model()


# --- arrays --------------------------------------------------------------------------------------------------------


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def _read_arrays(path: Path) -> dict[str, np.ndarray | Tensor]:
    try:
        if path.suffix.lower() == ".safetensors":
            return dict(load_file(path))
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (SafetensorError, zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, TypeError) as error:
        # Pickles are a ValueError, and a single array without a name is a TypeError.
        raise ValueError(f"{path} is not a whole {path.suffix} file of plain arrays: {error}") from error


def _common_length(path: Path, arrays: Mapping[str, np.ndarray | Tensor]) -> int:
    """The number of samples."""
    lengths = {name: values.shape[0] if values.ndim else None for name, values in arrays.items()}
    if not lengths or len(set(lengths.values())) > 1 or not all(lengths.values()):
        shown = ", ".join(f"{name}: {length}" for name, length in lengths.items()) or "no array"
        raise ValueError(f"{path} holds arrays of one length, one row per sample; found {shown}")
    return next(length for length in lengths.values() if length)


def _arguments(
    path: Path, arrays: Mapping[str, np.ndarray | Tensor], model: PeftModel
) -> dict[str, np.ndarray | Tensor]:
    """The arrays that the model takes; targets only where it needs them to run at all."""
    base: Any = _base(model)
    taken = set(inspect.signature(base.forward).parameters)
    if not base.config.is_encoder_decoder:
        # Measures need no loss, and a label that the head does not know would end the run.
        taken.discard("labels")
    found = {name: values for name, values in arrays.items() if name in taken}
    if not found:
        shown = ", ".join(arrays)
        raise ValueError(f"{path} holds {shown}, none of them an argument of {type(base).__name__} ({_main(base)}, …)")
    return found


def _main(base: Any) -> str:
    return str(base.main_input_name)


def _tensor(name: str, values: np.ndarray | Tensor, model: PeftModel) -> Tensor:
    """Numbers as the model reads them: floats in its precision, indices as 64-bit integers."""
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "biuf":
            raise ValueError(f"argument {name!r} of the model is numeric, got an array of {values.dtype}")
        values = torch.from_numpy(np.ascontiguousarray(values.astype(values.dtype.newbyteorder("="))))
    if values.is_floating_point():
        return values.to(next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()))
    return values if values.dtype == torch.bool else values.long()


# --- tables --------------------------------------------------------------------------------------------------------


def _read_table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_json(path, lines=True) if _suffix(path) == ".jsonl" else pd.read_csv(path)
    except (ValueError, OSError, EOFError, pd.errors.ParserError) as error:
        raise ValueError(f"{path} cannot be read as a table: {error}") from error
    if TEXT not in table.columns or table.empty:
        shown = ", ".join(map(str, table.columns)) or "none"
        raise ValueError(f"{path} has rows and a column {TEXT!r}; found {len(table)} rows and the columns {shown}")
    wrong = [index for index, text in enumerate(table[TEXT]) if not isinstance(text, str)]
    if wrong:
        value = table[TEXT].iloc[wrong[0]]
        raise ValueError(f"column {TEXT!r} of {path} holds texts, found {value!r} in row {wrong[0] + 1}")
    return table


def _tokens(path: Path, texts: pd.Series, model: PeftModel, tokenizer: str | Path | None) -> dict[str, Tensor]:
    base: Any = _base(model)
    name = str(tokenizer or base.config.name_or_path)
    try:
        cutter = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"texts need a tokenizer, and there is none at {name!r}; save one beside the model, or give arrays "
            f"({' or '.join(ARRAYS)}) instead of {path.name}"
        ) from error
    if cutter.pad_token is None:
        cutter.pad_token = cutter.eos_token
    # Some tokenizers know no limit and some configurations none; T5 has neither.
    positions = getattr(base.config, "max_position_embeddings", None) or MOST_TOKENS
    limits = [MOST_TOKENS, cutter.model_max_length, positions]
    encoded = cutter(list(texts), padding=True, truncation=True, max_length=min(limits), return_tensors="pt")
    taken = inspect.signature(base.forward).parameters
    given = {key: value for key, value in encoded.items() if key in taken}
    if base.config.is_encoder_decoder:
        start = base.config.decoder_start_token_id
        given["decoder_input_ids"] = torch.full((len(texts), 1), 0 if start is None else start)
    return given


# --- labels and batches --------------------------------------------------------------------------------------------


def _labels(path: Path, name: str, columns: Mapping[str, Any]) -> np.ndarray:
    """One label per sample; words stay words."""
    if name not in columns:
        raise ValueError(f"{path} has no labels {name!r}; it holds {', '.join(map(str, columns))}")
    found = columns[name]
    values = found.numpy() if isinstance(found, Tensor) else np.asarray(found)
    if values.ndim != 1:
        raise ValueError(f"labels {name!r} of {path} have one value per sample, got shape {tuple(values.shape)}")
    if pd.isna(values).any():
        raise ValueError(f"labels {name!r} of {path} are missing in {int(pd.isna(values).sum())} of {len(values)} rows")
    return values if values.dtype.kind in "biuf" else values.astype(str)


def _drawn(length: int, samples: int) -> np.ndarray:
    """Rows to read: all, or a random sample, since files are often sorted by class or domain."""
    if length <= samples:
        return np.arange(length)
    return np.sort(np.random.default_rng(0).choice(length, samples, replace=False))


def _batches(given: Mapping[str, Tensor], labels: np.ndarray | None, size: int) -> Data:
    count = len(next(iter(given.values())))
    batches = []
    for start in range(0, count, size):
        batch: dict[str, Any] = {name: values[start : start + size] for name, values in given.items()}
        if labels is not None:
            batch[LABEL] = labels[start : start + size]
        batches.append(batch)
    return Data(batches, None if labels is None else LABEL, count)
