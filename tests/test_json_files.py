"""JSON files: whole or not at all."""

import json

import pytest

from hf_ivon import json_files


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    """A full disk would cost the results of an earlier run, or leave half of them behind."""
    path = json_files.write_json(tmp_path / "new" / "results.json", {"x": 1.5})
    with pytest.raises(TypeError, match="not JSON serializable"):
        json_files.write_json(path, {"x": object()})

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(json_files.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        json_files.write_json(path, {"x": 2.5})
    assert json.loads(path.read_text()) == {"x": 1.5}
    assert list(path.parent.iterdir()) == [path]
