"""What the recipes share: arguments from a settings file and flags, data files, errors before training, results."""

import difflib
import json
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_ivon import data
from hf_ivon.json_files import write_json


class RecipeError(ValueError):
    """Input that a recipe cannot run on; shown as one line, before any training."""


def parse_args(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse an optional settings file (JSON or YAML, first), then flags, which override it.

    Raises:
        RecipeError: If the file cannot be read, or has a key that no argument has.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(list(dataclass_types))
    if argv and not argv[0].startswith("-"):
        argv = _settings_as_flags(Path(argv[0]), parser) + argv[1:]
    try:
        return parser.parse_args_into_dataclasses(argv)
    except ValueError as err:
        raise RecipeError(str(err)) from err


def split_flags(argv: Sequence[str] | None = None) -> tuple[list[str], list[str]]:
    """Return the flags before `--`, a study's own, and those after it, which it hands on; None is the command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]


def _settings_as_flags(path: Path, parser: HfArgumentParser) -> list[str]:
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise RecipeError(f"The settings file must be .json or .yaml, got {str(path)!r}. Flags start with `--`.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, yaml.YAMLError) as err:
        raise RecipeError(f"The settings file {str(path)!r} cannot be read: {err}") from err
    if not isinstance(settings, dict):
        raise RecipeError(f"The settings file {str(path)!r} must hold an object of argument names and values.")
    known = {action.dest for action in parser._actions}
    flags = []
    for key, value in settings.items():
        if key.startswith("_"):  # a note to the reader
            continue
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else " See --help for the valid ones."
            raise RecipeError(f"`{key}` in {str(path)!r} is not an argument.{hint}")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{key}", *(json.dumps(v) if isinstance(v, (dict, bool)) else str(v) for v in values)]
    return flags


def check_output_dir(args: TrainingArguments) -> None:
    """Refuse to train into a directory that holds something, unless the run resumes.

    Raises:
        RecipeError: If the directory is in use.
    """
    directory = Path(args.output_dir)
    if directory.is_dir() and any(directory.iterdir()) and not args.resume_from_checkpoint:
        raise RecipeError(
            f"`output_dir` must be empty or new, got {args.output_dir!r}, which holds files. Choose another one, or "
            f"continue its run with --resume_from_checkpoint."
        )


@contextmanager
def from_hub(argument: str, value: Any, kind: str) -> Generator[None, None, None]:
    """Turn what goes wrong with a name or directory into a `RecipeError` that says which argument it was."""
    try:
        yield
    except RecipeError:
        raise
    except (OSError, ValueError) as err:
        raise RecipeError(f"`{argument}` must be {kind} on the Hub or its directory, got {value!r}: {err}") from err


def load_rows(path: str, columns: Sequence[str]) -> Any:
    """Load a local file of rows (json, jsonl, csv or txt, also .gz) as a `datasets.Dataset`.

    Raises:
        RecipeError: If the file is missing, of another kind, empty, or lacks a column.
    """
    try:
        return data.load_rows(path, columns)
    except ValueError as err:
        raise RecipeError(str(err)) from err


def check_rows(rows: Any, columns: Sequence[str], where: str) -> Any:
    """Return the rows, if there are some and they have the columns.

    Raises:
        RecipeError: If a column is missing, or there is no row.
    """
    try:
        return data.check_rows(rows, columns, where)
    except ValueError as err:
        raise RecipeError(str(err)) from err


def write_results(directory: str, results: dict[str, Any]) -> Path:
    """Write `results.json` into a directory, whole or not at all."""
    return write_json(Path(directory) / "results.json", results)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Return a plain text table; floats with four digits."""

    def cell(value: Any) -> str:
        return f"{value:.4f}" if isinstance(value, float) else "-" if value is None else str(value)

    lines = [[cell(v) for v in row] for row in [header, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines]  # fmt: skip
    return "\n".join([text[0], "  ".join("-" * w for w in widths), *text[1:]])


def main_guard(main: Callable[[], Any]) -> None:
    """Run a recipe's main function; what it was given wrong becomes one line on stderr and exit code 2."""
    try:
        main()
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
