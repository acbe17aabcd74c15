"""The files of a merge: checkpoints read row by row from memory-mapped safetensors, and one written as it is made."""

from __future__ import annotations

import json
import os
import struct
import threading
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

# Of a repository: the model, its posterior, and what it is used with; neither other formats of it, nor checkpoints.
_WANTED = [
    *(f"{stem}*.safetensors" for stem in ("model", "adapter_model", "posterior")),
    *("*.json", "*.txt", "*.model", "*.bpe", "*.tiktoken", "*.jinja", "*.py", "LICENSE*", "NOTICE*"),
]
_UNWANTED = ["checkpoint-*/*", "onnx/*", "openvino/*", "original/*", "runs/*"]
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Rows(Protocol):
    """Tensors by name that are read when they are asked for: `TensorFiles`, or what looks like them."""

    entries: dict[str, Entry]

    def __getitem__(self, name: str) -> Tensor: ...  # noqa: D105
    def __iter__(self) -> Iterator[str]: ...  # noqa: D105
    def __len__(self) -> int: ...  # noqa: D105
    def __contains__(self, name: object) -> bool: ...  # noqa: D105
    def expect(self, name: str, start: int, stop: int) -> None: ...  # noqa: D102
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
        prefix: What the posterior's own names have before those of the mean, such as "0.model." where the mean is a
            module of a SentenceTransformer; `posterior` and `config` go by the names of the mean.
    """

    name: str
    directory: Path
    is_adapter: bool
    tensors: Rows
    posterior: Rows | None
    config: PosteriorConfig | None
    prefix: str = ""

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
            try:
                directory = Path(
                    snapshot_download(
                        repository, revision=revision or None, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
                    )
                )
            except (OSError, ValueError) as err:
                problems.append(f"{name} is neither a directory nor can it be downloaded ({err})")
                directory = Path(os.devnull)
        is_adapter = (directory / "adapter_config.json").is_file()
        wrong: list[str] = []
        tensors = TensorFiles(directory, "adapter_model" if is_adapter else "model", wrong)
        if not tensors and not wrong:
            wrong.append(f"{tensors.files[0].name} holds no tensors")
        posterior: Rows | None = None
        config, prefix = None, ""
        if posterior_files(directory):
            config, posterior = open_posterior(directory, wrong)
            prefix = _prefix(posterior.entries, tensors.entries)
        if prefix and posterior is not None:
            posterior = _Module(posterior, prefix)
            config = None if config is None else config.of_module(prefix)
        wrong += _module_problems(directory)
        if directory.is_dir():
            problems += [f"{name}: {problem}" for problem in wrong]
        return cls(name, directory, is_adapter, tensors, posterior, config, prefix)

    @property
    def short_name(self) -> str:
        """The last part of the name, which heads and data sets go by."""
        name = self.name if Path(self.name).is_dir() else self.name.partition("@")[0]
        return os.path.basename(os.path.abspath(name))  # of a link its own name, and not that of what it leads to

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


class _Module:
    """A posterior's tensors of one module, by the names that they have in it.

    Args:
        original: The tensors.
        prefix: What their names have before those in the module.
    """

    def __init__(self, original: Rows, prefix: str) -> None:
        self._original, self._prefix = original, prefix
        self.entries = {n.removeprefix(prefix): e for n, e in original.entries.items() if n.startswith(prefix)}

    def __getitem__(self, name: str) -> Tensor:
        return self._original[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def expect(self, name: str, start: int, stop: int) -> None:
        """Let the system begin to read rows."""
        self._original.expect(self._prefix + name, start, stop)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor."""
        return self._original.rows(self._prefix + name, start, stop)


def _prefix(posterior: Mapping[str, Entry], mean: Mapping[str, Entry]) -> str:
    """Return what a posterior's names have before those of the mean; nothing if they are the same, or unlike."""
    if any(name in mean for name in posterior):
        return ""
    for name in posterior:
        parts = name.split(".")
        for i in range(1, len(parts)):
            if ".".join(parts[i:]) in mean:
                return ".".join(parts[:i]) + "."
    return ""


def module_directories(directory: Path) -> list[Path]:
    """Return where a SentenceTransformer keeps its modules beside the first one, whose files are in its directory."""
    file = directory / "modules.json"
    modules = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [directory / m["path"] for m in modules if m.get("path")]


def _module_problems(directory: Path) -> list[str]:
    try:
        modules = module_directories(directory)
        outside = [m for m in modules if ".." in m.relative_to(directory).parts]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as err:
        return [f"modules.json cannot be read, or names no directories in the model's own ({err})"]
    if outside:
        return [f"modules.json names {outside[0]}, which is not in the model's directory: copy it there"]
    return [
        f"its module {module.name} has weights of its own, which cannot be merged: merge the transformer alone"
        for module in modules
        if any(module.rglob("*.safetensors")) or any(module.rglob("*.bin"))
    ]


class Writer:
    """Writes safetensors files rows by rows, from any threads; what is written is on its way to the disk.

    Args:
        directory: Where to.
        stem: "model", "adapter_model" or "posterior".
        layout: Dtype and shape by name.
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
        split = split_state_dict_into_shards_factory(
            dict(layout),
            get_storage_size=_num_bytes,
            filename_pattern=f"{stem}{{suffix}}.safetensors",
            max_shard_size=max_shard_size,
        )
        shards = split.filename_to_tensors if layout else {}
        self._shards = [_Shard(directory / f, {n: layout[n] for n in names}, metadata) for f, names in shards.items()]
        self._shard_of = {name: shard for shard in self._shards for name in shard.places}
        self.files = [shard.path for shard in self._shards]
        if split.is_sharded:
            index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
            path = directory / f"{stem}.safetensors.index.json"
            write_json(path, index)

    def write(self, name: str, rows: Tensor, start: int = 0) -> None:
        """Write rows of a tensor.

        Args:
            name: The tensor.
            rows: Some of its rows, in its dtype; each row must be written once.
            start: Which row they begin with.
        """
        self._shard_of[name].write(name, rows, start)

    def __enter__(self) -> Writer:
        """Open."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; a file that is not complete is an error."""
        for shard in self._shards:
            shard.close()
        if kind is None and (wrong := [shard.path.name for shard in self._shards if shard.missing]):
            raise RuntimeError(f"Not everything was written into {', '.join(wrong)}. Please report this.")


class _Shard:
    """One file of a `Writer`: opened at its first row, closed when the last one is in it.

    Args:
        path: The file.
        layout: Dtype and shape of its tensors, in order.
        metadata: Strings for its header.

    Attributes:
        places: Where each tensor begins, and how long its rows are, bytes.
        missing: How many bytes are not written yet.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        ends = [0]
        for name, (dtype, shape) in layout.items():
            ends.append(ends[-1] + _num_bytes((dtype, shape)))
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": ends[-2:]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        starts = [len(self._header) + end for end in ends]
        self.places = {
            name: (start, _num_bytes((dtype, shape[1:])))
            for start, (name, (dtype, shape)) in zip(starts, layout.items(), strict=False)
        }
        self.path, self.missing = path, ends[-1]
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()
        if not self.missing:
            path.write_bytes(self._header)

    def write(self, name: str, rows: Tensor, start: int) -> None:
        """Write rows of a tensor, from row `start` on."""
        if not rows.numel():
            return  # the file may be complete, and closed
        data = rows.contiguous().reshape(-1).view(torch.uint8).numpy().data
        offset, row_bytes = self.places[name]
        with self._lock:
            if self._file is None:
                self._file = self.path.open("xb")
                self._file.write(self._header)
            self._file.seek(offset + start * row_bytes)
            self._file.write(data)
            self.missing -= len(data)
            if not self.missing:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()

    def close(self) -> None:
        """Close the file, complete or not."""
        with self._lock:
            if self._file is not None:
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
