"""The metrics as modules of `evaluate`: one script for all, whose configurations are the functions' names.

`hf_ivon.metrics.load` makes one; so does `evaluate.load(hf_ivon.metrics.SCRIPT, "brier_score")`, which copies this
file elsewhere and runs it there.
"""

from __future__ import annotations

import inspect
from typing import Any

import datasets
import evaluate
import torch

from hf_ivon import metrics

_ROWS = datasets.Sequence(datasets.Value("float64"))
# What a function takes says what its predictions and references are.
_FEATURES = {
    "labels": (_ROWS, datasets.Value("int64"), "probabilities, one row an example", "class numbers"),
    "reference": (_ROWS, _ROWS, "probabilities or samples, one row an example", "those of a reference"),
    "outside": (
        datasets.Value("float64"),
        datasets.Value("bool"),
        "scores, higher where the model is surer",
        "whether the example is of the domain",
    ),
}
_DTYPES = {"labels": torch.int64, "reference": torch.float64, "outside": torch.bool}


class EvaluationMetric(evaluate.Metric):
    """A metric of `hf_ivon.metrics`, named by `config_name`; `compute` takes its options, such as `num_bins`."""

    def _info(self) -> Any:
        if self.config_name not in metrics.NAMES:
            raise ValueError(
                f"The metric must be one of {', '.join(metrics.NAMES)}, got {self.config_name!r}. Name it as the "
                f"second argument of `evaluate.load`."
            )
        self._function = getattr(metrics, self.config_name)
        _, self._second, *_ = inspect.signature(self._function).parameters
        first, second, predictions, references = _FEATURES[self._second]
        return evaluate.MetricInfo(
            description=inspect.getdoc(self._function),
            citation="",
            inputs_description=f"predictions: {predictions}. references: {references}.",
            features=datasets.Features({"predictions": first, "references": second}),
        )

    def _compute(self, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
        given = torch.as_tensor(predictions, dtype=torch.float64)
        other = torch.as_tensor(references, dtype=_DTYPES[self._second])
        if self._second == "outside":
            given, other = given[other], given[~other]
        value = self._function(given, other, **options)
        return value if isinstance(value, dict) else {self.config_name: value}
