"""What importing the package costs, and what it offers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ivon

LIGHT = [
    "optim",
    "posterior",
    "averaging",
    "checkpoint",
    "metrics",
    "predict",
    "merge",
    "convert",
    "draws",
    "curvature",
    "data",
    "hub",
    "replicas",
    "sensitivity",
]


@pytest.mark.parametrize("module", LIGHT)
def test_torch_layers_do_not_import_transformers(module):
    """Someone who only wants the optimizer, or merges files, must not pay for Transformers."""
    code = (
        f"import sys, hf_ivon.{module}; "
        "heavy = {'transformers', 'accelerate', 'peft', 'datasets', 'matplotlib'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_import_is_lazy():
    """`import hf_ivon` alone must not even load torch."""
    code = "import sys, hf_ivon; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_exists():
    """A name in `__all__` that does not load is a broken promise."""
    for name in hf_ivon.__all__:
        assert getattr(hf_ivon, name) is not None
    assert dir(hf_ivon) == sorted(hf_ivon.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = hf_ivon.nonsense


def test_every_module_has_its_layer_in_the_house():
    """What the table of CONTRIBUTING.md does not name may import anything, and be imported from anywhere."""
    root = Path(hf_ivon.__file__).parents[1]
    named = set(re.findall(r"`(\w+)`", (root / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert {path.stem for path in (root / "hf_ivon").glob("[!_]*.py")} <= named
