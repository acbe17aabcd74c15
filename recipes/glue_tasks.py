"""The GLUE tasks: their columns, labels and metrics.

The metrics are those of the `glue` metric of the `evaluate` library, computed by scikit-learn and SciPy, so that
nothing is downloaded.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Task:
    """One task: its text columns, number of classes (1 is regression) and the metric of the paper's Table 11."""

    columns: tuple[str, ...]
    num_labels: int
    metric: str


TASKS = {
    "cola": Task(("sentence",), 2, "matthews_correlation"),
    "mnli": Task(("premise", "hypothesis"), 3, "accuracy"),
    "mrpc": Task(("sentence1", "sentence2"), 2, "f1"),
    "qnli": Task(("question", "sentence"), 2, "accuracy"),
    "qqp": Task(("question1", "question2"), 2, "accuracy"),
    "rte": Task(("sentence1", "sentence2"), 2, "accuracy"),
    "sst2": Task(("sentence",), 2, "accuracy"),
    "stsb": Task(("sentence1", "sentence2"), 1, "spearmanr"),
    "wnli": Task(("sentence1", "sentence2"), 2, "accuracy"),
}


def task_metrics(task: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the task's metrics: classes, or values for stsb, against labels, both (N,)."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    if TASKS[task].num_labels == 1:
        return {
            "pearson": float(pearsonr(predictions, labels)[0]),
            "spearmanr": float(spearmanr(predictions, labels)[0]),
        }
    metrics = {"accuracy": float(accuracy_score(labels, predictions))}
    if task == "cola":
        metrics["matthews_correlation"] = float(matthews_corrcoef(labels, predictions))
    if task in ("mrpc", "qqp"):
        metrics["f1"] = float(f1_score(labels, predictions))
    return metrics
