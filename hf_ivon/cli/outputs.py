"""Where a command writes: tried before anything is computed for it; results are printed before they are written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import typer

FAILURES = (ValueError, ImportError, OSError)  # what is a message and exit code 2, and no traceback


def check_directory(option: str, directory: Path | None) -> None:
    """Make sure that a directory can be written into, without leaving anything there.

    Args:
        option: The option's name, for the message.
        directory: What was given for it; it may not exist yet. None is fine.

    Raises:
        ValueError: If it cannot be written into.
    """
    if directory is None:
        return
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryDirectory(prefix=".hf_ivon-", dir=existing):
            pass
    except OSError as err:
        raise ValueError(
            f"`{option}` must be a directory that can be written into, got {str(directory)!r} ({err.strerror} at "
            f"{str(existing)!r}). Choose another one."
        ) from err


def check_file(option: str, file: Path | None) -> None:
    """Make sure that a file can be written, without writing it.

    Args:
        option: The option's name, for the message.
        file: What was given for it; it may not exist yet. None is fine.

    Raises:
        ValueError: If it is a directory, or its own cannot be written into.
    """
    if file is not None and file.is_dir():
        raise ValueError(f"`{option}` must be a file, got the directory {str(file)!r}. Name a file in it.")
    check_directory(option, None if file is None else file.parent)


def check_outputs(output: Path | None, plots: Path | None) -> None:
    """Make sure that a file of results and a directory of figures can be written, and figures drawn.

    Args:
        output: The file; None is none.
        plots: The directory; None is none.

    Raises:
        ImportError: If figures are wanted and cannot be drawn.
        ValueError: If one of them cannot be where it should be.
    """
    check_file("output", output)
    check_directory("plots", plots)
    if plots is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as err:
            raise ImportError("Figures need `matplotlib`: pip install 'hf_ivon[plots]'.") from err


@contextmanager
def writing() -> Generator[None, None, None]:
    """Say what went wrong when results are written, in place of a traceback, and leave with 2.

    Yields:
        None, while they are.

    Raises:
        Exit: If the disk is full or refuses, or a figure cannot be drawn.
    """
    try:
        yield
    except (OSError, ValueError) as err:
        typer.echo(f"error: What is printed above was not written as a whole: {err}. Choose another place.", err=True)
        raise typer.Exit(2) from None
