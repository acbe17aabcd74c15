"""The files of a merge: checkpoints read row by row from memory-mapped safetensors, and one written as it is made."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hf_ivon.checkpoint import open_posterior, posterior_files
from hf_ivon.posterior_config import PosteriorConfig
from hf_ivon.tensor_files import DTYPES, TensorFiles

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
    tensors: TensorFiles
    posterior: TensorFiles | None
    config: PosteriorConfig | None

    @classmethod
    def open(cls, name: str, revision: str | None, problems: list[str]) -> Checkpoint:
        """Open a directory, or a repository on the Hub.

        Args:
            name: A directory, or a repository's id.
            revision: Of the repository.
            problems: Where to say what is wrong with it.

        Returns:
            The checkpoint; what could be opened of it.
        """
        directory = Path(name)
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*"]
            try:
                directory = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
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

    def json(self, file: str) -> dict[str, Any]:
        """Return a JSON file of the directory, empty if there is none."""
        path = self.directory / file
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class Writer:
    """Writes a safetensors file tensor by tensor; what is written is on the disk and not in memory.

    Args:
        path: The file.
        layout: Dtype and shape by name; tensors must be written in this order.
        metadata: Strings for the file's header.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name, (dtype, shape) in layout.items():
            start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._expected = 8 + len(text) + end
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, rows: Tensor) -> None:
        """Append rows of the tensor that is next."""
        self._file.write(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> Writer:
        """Open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; a file that is not complete is an error."""
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        if kind is None and size != self._expected:
            raise RuntimeError(f"The file has {size} bytes and should have {self._expected}. Please report this.")


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
