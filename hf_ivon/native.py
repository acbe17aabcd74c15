"""The passes of `hf_ivon.passes` in C++, for CPUs: built by the machine's compiler in a second, and kept."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from hf_ivon.by_address import ByAddress, Key, Reciprocals

_SOURCE = Path(__file__).with_name("passes.cpp")
_FLAGS = "-O3 -march=native -std=c++17 -fopenmp -fno-math-errno -fno-trapping-math -shared -fPIC".split()
# So many elements are worth one more thread.
_SHARE = 2**15


class Native(ByAddress):
    """The passes, from the library that `passes.cpp` was built to.

    Raises:
        OSError: If the library cannot be built or loaded.
    """

    narrow = (torch.float32, torch.bfloat16)

    def __init__(self) -> None:
        library = build()
        number, factor, pointer, flag = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
        key, options = ctypes.POINTER(Key), ctypes.POINTER(Reciprocals)
        types: dict[str, list[Any]] = {
            "sample": [*[pointer] * 5, key, factor, factor, flag, flag],
            "adopt": [*[pointer] * 3, flag],
            "take_product": [*[pointer] * 4, factor, flag],
            "add_product": [*[pointer] * 5, factor, flag],
            "subtract_noise": [*[pointer] * 5, key, *[factor] * 4, flag],
            "square": [*[pointer] * 3, factor, flag],
            "update": [*[pointer] * 7, options, flag, flag],
        }
        self._functions = {name: library[f"ivon_{name}"] for name in types}
        for name, function in self._functions.items():
            function.argtypes = [number, *types[name], flag]

    def _run(self, name: str, device: torch.device, elements: int, count: int, sizes: Any, *arguments: Any) -> bool:
        given = [a == torch.bfloat16 if isinstance(a, torch.dtype) else a for a in arguments]
        self._functions[name](count, sizes, *given, _threads(elements))
        return True


def _threads(elements: int) -> int:
    return min(torch.get_num_threads(), 1 + elements // _SHARE)


def build() -> ctypes.CDLL:
    """Return the library that belongs to `passes.cpp`, this processor and the compiler; it is built if there is none.

    It is kept in `$XDG_CACHE_HOME/hf_ivon`, in `~/.cache/hf_ivon` where that is not set, if one can write there.

    Raises:
        OSError: If there is no compiler, or it fails; the message is its first error.
    """
    found = [name for name in ("g++", "c++", "clang++") if shutil.which(name)]
    given = os.environ.get("CXX", "")
    try:
        compiler = shlex.split(given) or found[:1]
    except ValueError as error:
        raise OSError(f"`CXX` must be a command, got {given!r}: {error}") from error
    if not compiler:
        raise OSError("no C++ compiler found")
    command = [*compiler, *_FLAGS]
    # What the compiler defines tells its version, and the processor that `native` is here: a home is often shared.
    machine = _output([*command, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), " ".join(command).encode(), machine])).hexdigest()
    directory = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "hf_ivon"
    kept = directory / f"passes-{key[:16]}.so"
    if kept.exists():
        with suppress(OSError):  # damaged
            return ctypes.CDLL(str(kept))
    place = None
    if directory.is_absolute():  # else there is no home
        with suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            place = tempfile.TemporaryDirectory(dir=directory)
    with place or tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary) / kept.name
        _output([*command, str(_SOURCE), "-o", str(built)])
        library = ctypes.CDLL(str(built))
        with suppress(OSError):  # the next process builds its own
            with built.open("rb+") as file:
                os.fsync(file.fileno())
            if place is not None:
                built.replace(kept)
    return library


def _output(command: Sequence[str]) -> bytes:
    """Return what a command writes.

    Raises:
        OSError: If it cannot be run or fails.
    """
    ran = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if ran.returncode:
        lines = ran.stderr.decode(errors="replace").splitlines() or [f"exit status {ran.returncode}"]
        raise OSError(next((line for line in lines if "error" in line), lines[0]))
    return ran.stdout
