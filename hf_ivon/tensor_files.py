"""Tensors in safetensors files, found by their headers and read when they are asked for, whole or by rows."""

from __future__ import annotations

import copy
import json
import math
import os
import struct
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_ivon.json_files import read_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_FILES_OPEN = 4  # of one `TensorFiles`; there may be more shards than files that a process may open
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".state")


@dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
        path: The file.
        dtype: Its dtype.
        shape: Its shape.
        offset: Where in the file it begins, bytes.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class _File:
    """A file open for reading, from several threads at once, for as long as it is referred to.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        if hasattr(os, "preadv"):  # without, as on Windows, each read opens the file: a position cannot be shared
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)

    def expect(self, offset: int, count: int) -> None:
        """Let the system begin to read `count` bytes from `offset` on."""
        if self._descriptor is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_WILLNEED)

    def read(self, into: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset` on; an `EOFError` if there are not as many."""
        while into:
            if self._descriptor is not None:
                count = os.preadv(self._descriptor, [into], offset)
            else:
                with self._path.open("rb", buffering=0) as file:
                    file.seek(offset)
                    count = file.readinto(into)
            if not count:
                raise EOFError
            into, offset = into[count:], offset + count


def _keep_open() -> Callable[[Path], _File]:
    """Return what opens files and keeps the last few: to open one for each piece takes a sixth of a merge's time."""
    return lru_cache(_FILES_OPEN)(_File)


class TensorFiles(Mapping[str, Tensor]):
    """Tensors of one kind in a directory, by name; only headers are read until one is asked for, and nothing is kept.

    Args:
        directory: The directory.
        stem: "model", "adapter_model" or "posterior": one file `STEM.safetensors`, or shards with an index.
        problems: Where to say what is wrong with the files.

    Attributes:
        files: The files that there should be.
        entries: What is known of each tensor without reading it.
        metadata: The strings in each file's header, by file name.
    """

    def __init__(self, directory: Path, stem: str, problems: list[str]) -> None:
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self._file = _keep_open()
        single = directory / f"{stem}.safetensors"
        expected: dict[str, set[str]] | None = None
        index = directory / f"{single.name}.index.json"
        if not single.is_file() and index.is_file():
            expected = _read_index(index, problems)
        self.files = [single] if expected is None else [directory / name for name in expected]
        for path in self.files:
            if not path.is_file():
                problems.append(f"{path.name} is missing{_pickles(directory, stem)}")
                continue
            try:
                names = self._read_header(path, problems)
            except (SafetensorError, OSError) as err:
                problems.append(f"{path.name} is truncated or not a safetensors file ({err})")
                continue
            if expected is not None and names != expected[path.name]:
                wrong = sorted(names ^ expected[path.name])
                problems.append(f"{path.name} and the index disagree about {', '.join(wrong[:3])}")

    def _read_header(self, path: Path, problems: list[str]) -> set[str]:
        unknown = set()
        with safe_open(path, framework="pt") as file:
            self.metadata[path.name] = dict(file.metadata() or {})
            names = set(file.keys())
            offsets = _offsets(path)
            for name in sorted(names):
                part = file.get_slice(name)
                shape, stored = tuple(part.get_shape()), part.get_dtype()
                if stored in DTYPES:
                    self.entries[name] = Entry(path, DTYPES[stored], shape, offsets[name])
                else:
                    unknown.add(stored)
        if unknown:
            problems.append(f"{path.name} holds tensors of the dtype {', '.join(sorted(unknown))}, which is not read")
        return names

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.entries[name].path, framework="pt") as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # the base class would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _file=_keep_open())  # a copy, or another process, opens its own

    def part(self, names: Iterable[str]) -> Self:
        """Return the same files with some of their tensors only."""
        part = copy.copy(self)
        part.entries = {name: self.entries[name] for name in names}
        return part

    def expect(self, name: str, start: int, stop: int) -> None:
        """Let the system begin to read rows that will be asked for, piece by piece, soon."""
        entry = self.entries[name]
        if entry.shape:
            row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
            self._file(entry.path).expect(entry.offset + start * row_bytes, (stop - start) * row_bytes)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor in its own dtype; a 0-dim tensor counts as one row."""
        entry = self.entries[name]
        if not entry.shape:
            return self[name]
        # Read and not mapped: mapping a few rows at a time costs more than copying them.
        rows = torch.empty(max(0, min(stop, entry.shape[0]) - start), *entry.shape[1:], dtype=entry.dtype)
        if not rows.numel():
            return rows
        row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        try:
            self._file(entry.path).read(rows.view(-1).view(torch.uint8).numpy().data, entry.offset + start * row_bytes)
        except EOFError:
            raise OSError(f"{entry.path} ended while `{name}` was read. Is it being written to?") from None
        return rows


def _offsets(path: Path) -> dict[str, int]:
    """Return where each tensor begins in a file whose header was found to be right."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return {name: 8 + size + v["data_offsets"][0] for name, v in header.items() if name != "__metadata__"}


def headers(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return something with a `shape` for each tensor; tensors in files are not read for it."""
    return tensors.entries if isinstance(tensors, TensorFiles) else tensors


def _read_index(path: Path, problems: list[str]) -> dict[str, set[str]]:
    """Return the names that each file should hold."""
    index = read_json(path, problems)
    if index is None:
        return {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(map(_is_file_name, weight_map.values())):
        problems.append(f"{path.name} has no valid `weight_map`")
        return {}
    files = sorted(set(weight_map.values()))
    return {file: {name for name, where in weight_map.items() if where == file} for file in files}


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value and value.endswith(".safetensors")


def _pickles(directory: Path, stem: str) -> str:
    found = sorted(p.name for p in directory.glob(f"*{stem}*") if p.suffix in _PICKLE_SUFFIXES)
    return f" ({', '.join(found[:3])} is a pickle, which is never read: save it as safetensors)" if found else ""
