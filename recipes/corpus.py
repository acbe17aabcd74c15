"""The embedded corpus: documentation and docstrings that every Python installation carries.

No text is shipped and nothing is downloaded. The help topics of `pydoc` and the docstrings of the standard library's
own modules, read from their source files, make about two million characters of English about programming. The same
Python version gives the same text; every tenth module is validation. A paragraph that several modules share is taken
once, so that none is in both splits.
"""

import ast
import hashlib
import sysconfig
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "__pycache__"}
_SHORTEST = 80  # characters; shorter docstrings say little, shorter paragraphs may repeat


@lru_cache(maxsize=1)
def python_documentation() -> dict[str, list[str]]:
    """Return documents by split, "train" and "validation", deduplicated, in an order that is the same everywhere."""
    documents = {f"topic {name}": text.strip() for name, text in topics.items()}
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED.isdisjoint(relative.parts):
            documents[relative.as_posix()] = _docstrings(path)
    held_out = {name for name in documents if hashlib.sha256(name.encode()).digest()[0] % 10 == 0}
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for name in sorted(documents, key=lambda name: (name in held_out, name)):  # validation last: what is left of it
        text = _new_paragraphs(documents[name], seen)
        if text:
            splits["validation" if name in held_out else "train"].append(text)
    return splits


def _new_paragraphs(text: str, seen: set[str]) -> str:
    """Return the text without long paragraphs that were seen before, and remember its own."""
    paragraphs = text.split("\n\n")
    new = [p for p in paragraphs if len(p) < _SHORTEST or " ".join(p.split()) not in seen]
    seen.update(" ".join(p.split()) for p in paragraphs)
    return "\n\n".join(new)


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
