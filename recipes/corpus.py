"""The embedded corpus: documentation and docstrings that every Python installation carries.

No text is shipped and nothing is downloaded. The help topics of `pydoc` and the docstrings of the standard library's
own modules, read from their source files, make about two million characters of English about programming. The same
Python version gives the same text; every tenth module is validation.
"""

import ast
import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
_SHORTEST = 80  # characters; shorter docstrings say little


@lru_cache(maxsize=1)
def python_documentation() -> dict[str, list[str]]:
    """Return documents by split, "train" and "validation", deduplicated, in an order that is the same everywhere."""
    documents = {f"topic {name}": text.strip() for name, text in topics.items()}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _SKIPPED.isdisjoint(relative.parts):
            continue
        text = _docstrings(path)
        if text:
            documents[relative.as_posix()] = text
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    seen = set()
    for name in sorted(documents):
        digest = hashlib.sha256(documents[name].encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        held_out = hashlib.sha256(name.encode()).digest()[0] % 10 == 0
        splits["validation" if held_out else "train"].append(documents[name])
    return splits


def _docstrings(path: Path) -> str:
    """Return the docstrings of a source file, in order, each headed by the name of what it documents."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ""
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST:
                parts.append(f"{getattr(node, 'name', path.stem)}\n\n{text}")
    return "\n\n".join(parts)
