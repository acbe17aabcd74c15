"""What the columns of a file of examples hold, checked row by row: texts, and labels as a model takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LABELS = ("label", "labels")  # what the column of labels is called


def text_columns_of(rows: Any, given: Sequence[str] = ()) -> list[str]:
    """Return the columns that are given, or all that hold text, except the label; a field may be missing."""
    return list(given) or [c for c in rows.column_names if c not in LABELS and holds_text(rows, c)]


def holds_text(rows: Any, column: str) -> bool:
    """Tell whether the first field of a column that is not missing is text."""
    return isinstance(next((value for value in rows[column] if value is not None), None), str)


def texts_of(rows: Any, column: str, where: str) -> list[str]:
    """Return the texts of a column.

    Args:
        rows: A `datasets.Dataset`.
        column: The column.
        where: What the message calls the rows.

    Returns:
        One text per row.

    Raises:
        ValueError: If a row has none; the message says which.
    """
    values = list(rows[column])
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise ValueError(
                f"The column `{column}` of {where} must hold text in every row, got {value!r} in row {row}, counted "
                f"from 0. Fill it in, leave the row out, or name other columns by --text-columns."
            )
    return values


def labels_of(rows: Any, column: str, config: Any, where: str) -> list[Any]:
    """Return the labels of a column as a model takes them: class numbers, or numbers for a regression.

    Args:
        rows: A `datasets.Dataset`.
        column: The column; its labels may also be names of classes that `label2id` in the configuration has.
        config: The model's configuration; None takes all labels for class numbers.
        where: What the message calls the rows.

    Returns:
        One label per row; of a model that predicts several numbers or labels at once, lists of them.

    Raises:
        ValueError: If a row has no label, or one of another kind; the message says which.
    """
    problem, classes = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
    is_regression = problem == "regression" or (problem is None and classes == 1)
    names: dict[str, int] = {} if is_regression else getattr(config, "label2id", None) or {}
    if problem == "multi_label_classification" or (is_regression and classes != 1):
        expected, read = "lists of numbers", _list_of_numbers
    elif is_regression:
        expected, read = "numbers", _number
    else:
        shown = "" if "LABEL_0" in names else f" or {', '.join(map(repr, list(names)[:5]))}"
        expected, read = f"class numbers{shown}", _class
    labels = []
    for row, value in enumerate(rows[column]):
        label = read(names.get(value, value) if isinstance(value, str) else value)
        if label is None:
            raise ValueError(
                f"The column `{column}` of {where} must hold {expected}, got {value!r} in row {row}, counted from 0. "
                f"Number the labels as the model was trained with them, or leave the row out."
            )
        labels.append(label)
    return labels


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _class(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _list_of_numbers(value: Any) -> list[float] | None:
    numbers = [_number(v) for v in value] if isinstance(value, list) else [None]
    return None if None in numbers else [float(n) for n in numbers if n is not None]
