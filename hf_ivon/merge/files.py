"""The files of a merge: checkpoints read row by row from memory-mapped safetensors, and one written as it is made."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from hf_ivon.checkpoint import open_posterior, posterior_files
from hf_ivon.json_files import read_json, write_json
from hf_ivon.posterior_config import PosteriorConfig
from hf_ivon.tensor_files import DTYPES, Entry, TensorFiles

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Rows(Protocol):
    """Tensors by name that are read when they are asked for: `TensorFiles`, or what looks like them."""

    entries: dict[str, Entry]

    def __getitem__(self, name: str) -> Tensor: ...  # noqa: D105
    def __iter__(self) -> Iterator[str]: ...  # noqa: D105
    def __len__(self) -> int: ...  # noqa: D105
    def __contains__(self, name: object) -> bool: ...  # noqa: D105
    def rows(self, name: str, start: int, stop: int) -> Tensor: ...  # noqa: D102


@dataclass
class Checkpoint:
    """A model or an adapter, with the posterior beside it if there is one.

    Attributes:
        name: What the user calls it.
        directory: Where it is.
        is_adapter: Whether it is a PEFT adapter.
        tensors: The mean.
        posterior: The variances; None if there is no posterior.
        config: What they were learnt with; None if there is no posterior.
    """

    name: str
    directory: Path
    is_adapter: bool
    tensors: Rows
    posterior: Rows | None
    config: PosteriorConfig | None

    @classmethod
    def open(cls, name: str, problems: list[str]) -> Checkpoint:
        """Open a directory, or a repository on the Hub.

        Args:
            name: A directory, or a repository's id, with "@REVISION" behind it for another than the newest.
            problems: Where to say what is wrong with it.

        Returns:
            The checkpoint; what could be opened of it.
        """
        directory = Path(name)
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            repository, _, revision = name.partition("@")
            patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]
            try:
                directory = Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
            except (OSError, ValueError) as err:
                problems.append(f"{name} is neither a directory nor can it be downloaded ({err})")
                directory = Path(os.devnull)
        is_adapter = (directory / "adapter_config.json").is_file()
        wrong: list[str] = []
        tensors = TensorFiles(directory, "adapter_model" if is_adapter else "model", wrong)
        posterior = config = None
        if posterior_files(directory):
            config, posterior = open_posterior(directory, wrong)
        if directory.is_dir():
            problems += [f"{name}: {problem}" for problem in wrong]
        return cls(name, directory, is_adapter, tensors, posterior, config)

    @property
    def short_name(self) -> str:
        """The last part of the name, which heads and data sets go by."""
        return Path(self.name.partition("@")[0] if not Path(self.name).is_dir() else self.name).resolve().name

    def json(self, file: str) -> dict[str, Any]:
        """Return a JSON file of the directory, empty if there is none; a `ValueError` if it is broken."""
        path = self.directory / file
        if not path.is_file():
            return {}
        problems: list[str] = []
        value = read_json(path, problems)
        if value is None:
            raise ValueError(f"The model {self.name} cannot be used: {problems[0]}. Download or save it again.")
        return value


class Writer:
    """Writes safetensors files tensor by tensor; what is written is on the disk and not in memory.

    Args:
        directory: Where to.
        stem: "model", "adapter_model" or "posterior".
        layout: Dtype and shape by name; tensors must be written in this order.
        metadata: Strings for the files' headers.
        max_shard_size: Largest file, in bytes or like "5GB"; more go into shards with an index.

    Attributes:
        files: The files written.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
        max_shard_size: int | str,
    ) -> None:
        self._layout, self._metadata = layout, dict(metadata)
        split = split_state_dict_into_shards_factory(
            dict(layout),
            get_storage_size=_num_bytes,
            filename_pattern=f"{stem}{{suffix}}.safetensors",
            max_shard_size=max_shard_size,
        )
        self._file_of = split.tensor_to_filename
        self._names = split.filename_to_tensors
        self.files = [directory / name for name in self._names] if layout else []
        self._file: BinaryIO | None = None
        self._expected = 0
        if split.is_sharded:
            index = {"metadata": {**split.metadata, **self._metadata}, "weight_map": split.tensor_to_filename}
            path = directory / f"{stem}.safetensors.index.json"
            write_json(path, index)

    def write(self, name: str, rows: Tensor) -> None:
        """Append rows of a tensor."""
        path = next(p for p in self.files if p.name == self._file_of[name])
        if self._file is None or self._file.name != str(path):
            self._finish()
            self._begin(path)
        assert self._file is not None
        self._file.write(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _begin(self, path: Path) -> None:
        header: dict[str, Any] = {"__metadata__": self._metadata}
        end = 0
        for name in self._names[path.name]:
            dtype, shape = self._layout[name]
            start, end = end, end + _num_bytes((dtype, shape))
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._expected = 8 + len(text) + end
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def _finish(self) -> None:
        if self._file is None:
            return
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        if size != self._expected:
            raise RuntimeError(f"The file has {size} bytes and should have {self._expected}. Please report this.")

    def __enter__(self) -> Writer:
        """Open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; a file that is not complete is an error."""
        if kind is None:
            self._finish()
        elif self._file is not None:
            self._file.close()


def _num_bytes(described: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = described
    return dtype.itemsize * torch.Size(shape).numel()


def row_blocks(shape: tuple[int, ...], max_elements: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of at most about `max_elements` elements; one range for a 0-dim tensor."""
    rows = shape[0] if shape else 1
    width = max(1, torch.Size(shape[1:]).numel())
    step = max(1, max_elements // width)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def replace_in_header(path: Path, old: str, new: str) -> None:
    """Replace a string in a safetensors file's header by another of the same length."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = file.read(size)
        if len(old) != len(new) or header.count(old.encode()) != 1:
            raise RuntimeError(f"The header of {path} cannot be completed. Please report this.")
        file.seek(8)
        file.write(header.replace(old.encode(), new.encode()))
