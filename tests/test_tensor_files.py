"""Tensors in safetensors files: every dtype that torch has is read, whole and by rows, and another one is named."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from hf_ivon import Posterior, load_posterior, save_posterior, tensor_files
from hf_ivon.tensor_files import TensorFiles
from tests import tiny

OTHERS = ("uint16", "uint32", "uint64", "complex64", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


@pytest.mark.parametrize("name", ["float64", "bfloat16", "int8", "bool", *OTHERS])
def test_a_file_holds_any_dtype(tmp_path, name):
    """A model with a buffer of an unusual dtype would be called a truncated file, and its posterior not be loaded."""
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip("this torch does not have it")
    stored = torch.arange(6 * torch.empty(0, dtype=dtype).itemsize, dtype=torch.uint8) % 2
    stored = stored.view(dtype).reshape(3, 2)
    model = tiny.bert()
    tensors = {key: p.detach() for key, p in model.named_parameters()}
    save_file({**tensors, "extra": stored}, tmp_path / "model.safetensors")
    posterior = tiny.posterior_of(model)
    save_posterior(posterior, tmp_path)
    assert isinstance(load_posterior(tmp_path), Posterior)
    problems = []
    files = TensorFiles(tmp_path, "model", problems)
    assert not problems
    assert (files.entries["extra"].dtype, files.entries["extra"].shape) == (dtype, (3, 2))
    for found, expected in ((files["extra"], stored), (files.rows("extra", 1, 3), stored[1:])):
        assert found.dtype == dtype
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch cannot write it")
def test_a_dtype_that_is_not_read_is_named(tmp_path):
    """Someone would look for a broken download where the file only holds numbers of 4 bits."""
    packed = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file({"a": packed, "b": packed.clone(), "c": torch.ones(2)}, tmp_path / "model.safetensors")
    problems = []
    files = TensorFiles(tmp_path, "model", problems)
    assert list(files) == ["c"]
    assert problems == ["model.safetensors holds tensors of the dtype F4, which is not read"]


@pytest.mark.parametrize("shared", [True, False])
def test_a_few_files_are_open_at_once_and_none_after(tmp_path, monkeypatch, shared):
    """Shards of a large model are more than a process may open; one closed under a thread would give another's rows.

    Without reads at a position, as on Windows, where an open file cannot be replaced, none is kept open.
    """
    values = {f"{i}": torch.arange(64.0).reshape(8, 8) + 100 * i for i in range(6)}
    for name, value in values.items():
        save_file({name: value}, tmp_path / f"model-{name}.safetensors")
    index = {"weight_map": {name: f"model-{name}.safetensors" for name in values}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(tensor_files, "_FILES_OPEN", 2)
    if not shared:
        monkeypatch.delattr(os, "preadv", raising=False)
    opened, closed = [], []
    monkeypatch.setattr(tensor_files.os, "close", lambda fd, close=os.close: closed.append(close(fd)))
    monkeypatch.setattr(tensor_files.os, "open", lambda *args, start=os.open: [opened.append(1), start(*args)][1])
    problems = []
    files = TensorFiles(tmp_path, "model", problems)
    assert not problems

    def read(i):
        name, start = f"{i * 5 % 6}", i % 8
        return torch.equal(files.rows(name, start, start + 1), values[name][start : start + 1])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(200)))
    assert len(opened) > 6 if shared else not opened
    assert len(opened) - len(closed) == (2 if shared else 0)
    part = pickle.loads(pickle.dumps(files.part(["3"])))  # as a posterior that another process is given
    files = None
    assert torch.equal(part.rows("3", 0, 8), values["3"])
    part = None
    assert len(opened) == len(closed), "a file stays open"
