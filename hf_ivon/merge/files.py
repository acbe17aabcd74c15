"""The files of a merge: checkpoints read row by row from memory-mapped safetensors, and one written as it is made."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_ivon.checkpoint import CONFIG_NAME
from hf_ivon.posterior_config import PosteriorConfig, config_problems

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_UNSAFE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
        path: The file.
        dtype: Its dtype.
        shape: Its shape.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class TensorFiles(Mapping[str, Tensor]):
    """Tensors of one kind in a directory, by name; nothing is read before it is asked for, and nothing is kept.

    Args:
        directory: The directory.
        stem: "model", "adapter_model" or "posterior".
        problems: Where to say what is wrong with the files.
    """

    directory: Path
    stem: str
    problems: list[str]
    entries: dict[str, Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the files' headers."""
        index = self.directory / f"{self.stem}.safetensors.index.json"
        files = [self.directory / f"{self.stem}.safetensors"]
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = [self.directory / name for name in sorted(set(weight_map.values()))]
            except (ValueError, KeyError, AttributeError, TypeError):
                self.problems.append(f"{index} is no valid index")
                return
        for file in files:
            if file.parent != self.directory or not file.is_file():
                unsafe = sorted(p.name for pattern in _UNSAFE for p in self.directory.glob(pattern))
                hint = f" ({', '.join(unsafe[:3])}: pickles are not read; save it as safetensors)" if unsafe else ""
                self.problems.append(f"{file} is missing{hint}")
                continue
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a dictionary
                        part = opened.get_slice(name)
                        self.entries[name] = Entry(file, _DTYPES[part.get_dtype()], tuple(part.get_shape()))
            except (SafetensorError, OSError, KeyError) as err:
                self.problems.append(f"{file} cannot be read ({err})")

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.entries[name].path, framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor in its own dtype; a 0-dim tensor counts as one row."""
        entry = self.entries[name]
        if not entry.shape:
            return self[name]
        with safe_open(entry.path, framework="pt") as opened:
            return opened.get_slice(name)[start:stop]


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

            patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
            try:
                directory = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
            except (OSError, ValueError) as err:
                problems.append(f"{name} is neither a directory nor can it be downloaded ({err})")
        is_adapter = (directory / "adapter_config.json").is_file()
        tensors = TensorFiles(directory, "adapter_model" if is_adapter else "model", problems)
        posterior = config = None
        if (directory / CONFIG_NAME).is_file():
            try:
                values = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
                wrong = config_problems(values) if isinstance(values, dict) else ["is no object"]
            except ValueError as err:
                wrong = [str(err)]
            if wrong:
                problems.append(f"{directory / CONFIG_NAME}: {'; '.join(wrong)}")
            else:
                config = PosteriorConfig.from_dict(values)
                posterior = TensorFiles(directory, "posterior", problems)
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
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
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
