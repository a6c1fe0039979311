"""Data sets of the hub, from the hub or from a directory that is laid out like one of its repositories."""

from __future__ import annotations

from pathlib import Path

from datasets import DatasetDict, load_dataset


def dataset(repository: str, name: str | None = None, path: Path | None = None) -> DatasetDict:
    """Load all splits of a dataset.

    Parameters
    ----------
    repository : str
        On the hub.
    name : str, optional
        Of a configuration in it, as "cola".
    path : Path, optional
        A directory in the place of the repository: a clone of it, or the folder of the configuration with files such
        as ``train-00000-of-00001.parquet``.

    Raises
    ------
    FileNotFoundError
        If there is no such directory.
    """
    if path is None:
        return load_dataset(repository, name)
    if not path.is_dir():
        raise FileNotFoundError(f"--dataset-path {path} is no directory; it stands for the repository {repository}")
    # A clone says in its README which folder is which configuration; without one, the folder has its name.
    if name is not None and (path / "README.md").exists():
        return load_dataset(str(path), name)
    folder = path / name if name is not None and (path / name).is_dir() else path
    return load_dataset(str(folder))
