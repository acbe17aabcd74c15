"""JSON files: read with a message that names the file, and written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def to_text(value: Any) -> str:
    """Return a JSON file's text, indented, with a line break at the end."""
    return json.dumps(value, indent=2) + "\n"


def write_json(path: Path, value: Any) -> Path:
    """Write a JSON file, whole or not at all, and return its path; its directory is made if it does not exist."""
    return _write(path, to_text(value))


def write_json_lines(path: Path, rows: Iterable[Any]) -> Path:
    """Write a file with a line of JSON for each row, as `write_json` does."""
    return _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_json(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """Return the object in a JSON file; None, and a problem, if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
        return None
    except (OSError, ValueError) as err:
        problems.append(f"{path.name} is not readable JSON ({err})")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name} does not hold a JSON object")
        return None
    return value
