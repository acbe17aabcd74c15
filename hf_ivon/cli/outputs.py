"""Where a command's numbers and figures go: looked at before the work, written after the numbers were printed."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import typer


def check_outputs(output: Path | None, plots: Path | None) -> None:
    """Refuse, before anything is computed, a file or a directory of figures that could not be written.

    Args:
        output: The file; None is none.
        plots: The directory of figures; None is none.

    Raises:
        ImportError: If figures are wanted and cannot be drawn.
        ValueError: If one of them cannot be where it should be.
    """
    if output is not None:
        if output.is_dir():
            raise ValueError(f"`output` must be a file, got the directory {str(output)!r}. Add a file's name.")
        _check_directory("output", output.absolute().parent)
    if plots is not None:
        _check_directory("plots", plots.absolute())
        try:
            import matplotlib  # noqa: F401
        except ImportError as err:
            raise ImportError("Figures need `matplotlib`: pip install 'hf_ivon[plots]'.") from err


def _check_directory(name: str, directory: Path) -> None:
    """Refuse a directory that is not there and cannot be made."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(
            f"`{name}` must be in a directory, got {str(there)!r}, which is a file. Choose another place."
        )
    if not os.access(there, os.W_OK):
        raise ValueError(f"`{name}` must be where files may be written, got {str(there)!r}. Choose another place.")


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
