"""The library of the passes in C++: built once, wherever there is a compiler, for whatever processor."""

import ctypes
import os
import subprocess
import sys

import pytest

from hf_ivon import fused_passes, native
from hf_ivon.native import Native

pytestmark = pytest.mark.compiler


def test_several_processes_have_one_library(tmp_path, monkeypatch):
    """Each rank of each run would spend a second on what is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.build()
    [built] = (tmp_path / "hf_ivon").iterdir()
    before = built.stat().st_mtime_ns
    script = "from hf_ivon import native; native.build()"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert [built] == list((tmp_path / "hf_ivon").iterdir())
    assert built.stat().st_mtime_ns == before


@pytest.mark.parametrize("where", ["file", "~"])
def test_a_cache_that_cannot_be_written_does_not_matter(where, tmp_path, monkeypatch):
    """Homes of containers are often read-only, or missing: then Python says `~`, and here would be a folder of it."""
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", where if where == "~" else str(tmp_path / where))
    assert isinstance(native.build(), ctypes.CDLL)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_damaged_library_is_built_again(tmp_path, monkeypatch):
    """A full disk would else make training slow for good."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.build()
    [kept] = (tmp_path / "hf_ivon").iterdir()
    size = kept.stat().st_size
    kept.unlink()  # the one that is loaded stays as it is
    kept.write_bytes(b"")
    assert isinstance(native.build(), ctypes.CDLL)
    assert kept.stat().st_size == size


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    """Why training is slower than it could be must be found in the log."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "a folder").mkdir()
    compiler = tmp_path / "a folder" / "c++"
    compiler.write_text("#!/bin/sh\necho note >&2\necho 'fatal error: omp.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{compiler}' -O1")
    with pytest.raises(OSError, match="omp.h: No such file"):
        native.build()
    monkeypatch.setenv("CXX", "g++ '")
    with pytest.raises(OSError, match="`CXX` must be a command"):
        native.build()
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="no C\\+\\+ compiler found"):
        native.build()


@pytest.mark.parametrize("processor", ["native", "x86-64-v3", "x86-64"])
def test_processors_of_other_widths_draw_the_same(processor, monkeypatch, tmp_path):
    """A run that is resumed on an older machine must go on with the same noise."""
    flags = [flag if flag != "-march=native" else f"-march={processor}" for flag in native._FLAGS]
    probe = subprocess.run(["g++", *flags, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"the compiler does not know {processor}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", flags)
    fused_passes.check(Native(), "cpu")
