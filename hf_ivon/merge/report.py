"""What a merge did: how much each model contributed to each tensor, and how far the rule is from plain averaging."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ivon.hub.card import repositories
from hf_ivon.merge import methods
from hf_ivon.parts import layer_of

_STRIDE = 64  # one of so many weights is looked at for the logarithms, which cost more than the merge
_DROWNED = 10.0  # how many times a Hessian of the base is those of the models where these hardly count any more
_FLAT = 0.01  # distance from averaging, of the models' spread, up to which a rule is called averaging


class TensorStatistics:
    """Sums over blocks of one tensor, of an even part of them if it is large.

    Args:
        num: Number of models.
    """

    def __init__(self, num: int) -> None:
        self._shares = [0.0] * num
        self._distance = self._spread = 0.0
        # Of each model's trust: the sum of natural logarithms, of their squares, and their number.
        self._log: list[list[float]] = [[0.0, 0.0, 0] for _ in range(num)]

    def add(self, merged: Tensor, models: Sequence[Tensor], trust: Sequence[Tensor], weights: Sequence[float]) -> None:
        """Take in a block: tensors of one shape.

        Args:
            merged: What the rule made.
            models: What it was made of.
            trust: Hessian or precision of each model; none for rules without.
            weights: One number per model.
        """
        plain = methods.average(models, weights)
        self._distance += _squared(merged - plain)
        self._spread += sum(_squared(m - plain) for m in models)
        for i, weight in enumerate(weights):
            self._shares[i] += weight * (float(trust[i].sum()) if trust else merged.numel())
        for log, values in zip(self._log, trust, strict=False):
            logs = values.reshape(-1)[::_STRIDE].clamp_min(1e-30).log_()
            log[0], log[1], log[2] = log[0] + float(logs.sum()), log[1] + _squared(logs), log[2] + logs.numel()

    def absorb(self, other: TensorStatistics) -> None:
        """Add the sums of other blocks of the same tensor."""
        self._shares = [a + b for a, b in zip(self._shares, other._shares, strict=True)]
        self._distance, self._spread = self._distance + other._distance, self._spread + other._spread
        for log, more in zip(self._log, other._log, strict=True):
            log[:] = [a + b for a, b in zip(log, more, strict=True)]

    def summary(self, starts: Sequence[float] = (), base_hessian: float | None = None) -> dict[str, Any]:
        """Return the report of the tensor in JSON types.

        Args:
            starts: What each model's trust would be with the Hessian that its training began with; none for rules
                without.
            base_hessian: What the rule took for the Hessian of the base, if that is one number.
        """
        total = sum(self._shares)
        report: dict[str, Any] = {
            "shares": [s / total if total else 1 / len(self._shares) for s in self._shares],
            "distance_from_average": (self._distance / self._spread) ** 0.5 if self._spread else 0.0,
        }
        if self._log[0][2] and starts:
            moments = [(s / n, q / n, math.log(start)) for (s, q, n), start in zip(self._log, starts, strict=True)]
            report |= {} if base_hessian is None else {"base_hessian": base_hessian}
            report["trust_typical"] = [math.exp(s) for s, _, _ in moments]
            report["trust_spread"] = [math.sqrt(max(0.0, q - s * s)) for s, q, _ in moments]
            report["trust_from_start"] = [math.sqrt(max(0.0, q - 2 * s * c + c * c)) for s, q, c in moments]
        return report


def _squared(tensor: Tensor) -> float:
    flat = tensor.reshape(-1)
    return float(torch.dot(flat, flat))


def notes(
    method: str, tensors: Mapping[str, Mapping[str, Any]], limited_prior: tuple[float, float] | None = None
) -> list[str]:
    """Return what the user should know of a merge, one sentence or two each.

    Args:
        method: The rule.
        tensors: `TensorStatistics.summary` by tensor name.
        limited_prior: The prior's Hessian, and the smaller one that the rule took for the Hessian of the base, if so.
    """
    found = []
    priors = [
        (t["base_hessian"], statistics.median(t["trust_typical"])) for t in tensors.values() if "base_hessian" in t
    ]
    if limited_prior is not None:
        prior, limit = limited_prior
        found.append(
            f"The models' prior has the Hessian {prior:.2g}, with which the rule would add up all that they learnt. "
            f"Their average Hessian, {limit:.2g}, stands for that of the base; --base-hessian takes another number."
        )
    elif priors and statistics.median(prior / max(trust, 1e-30) for prior, trust in priors) > _DROWNED:
        prior, trust = (statistics.median(values) for values in zip(*priors, strict=True))
        found.append(
            f"The Hessian of the base, {prior:.2g}, drowns those of the models, which are {trust:.2g} in a typical "
            f"tensor: the rule adds up all that the models learnt, as task arithmetic does. Pass a smaller one, as "
            f"--base-hessian {trust:.0e}, or smaller weights."
        )
    merged = [t for t in tensors.values() if "shares" in t]
    distances = [t["distance_from_average"] for t in merged]
    spreads = [d for t in merged for d in t.get("trust_spread", [])]
    # Next to averaging are also merges with one weight above 0, and of one model with itself.
    far = method != "uncertainty" and distances and max(distances) >= _FLAT
    if far or not spreads or max(spreads) >= _FLAT:
        return found
    rule = "task arithmetic with a scale" if method == "uncertainty" else "plain averaging"
    return [
        *found,
        f"The posteriors are so flat that {method} is {rule}: within a tensor all weights are trusted alike to 1%. "
        f"Train longer or with a smaller beta2, so that the Hessians move, or estimate them with `hf-ivon curvature`.",
    ]


def layers(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return each model's share by layer, averaged over the layer's tensors; see `hf_ivon.parts.layer_of`."""
    groups: dict[str, list[list[float]]] = {}
    for name, tensor in tensors.items():
        if "shares" in tensor:
            groups.setdefault(layer_of(name), []).append(tensor["shares"])
    return {group: [sum(column) / len(rows) for column in zip(*rows, strict=True)] for group, rows in groups.items()}


def card(report: Mapping[str, Any]) -> str:
    """Return a model card of a merge, with the metadata that the Hub reads.

    Args:
        report: The report, as in `merge_report.json`.
    """
    sources = [*report["models"], *([report["base_model"]] if report["base_model"] else [])]
    on_hub = repositories(sources)
    head = ["---", "tags:", "- merge", "- hf_ivon", *(["base_model:", *(f"- {s}" for s in on_hub)] if on_hub else [])]
    lines = [*head, "---", "", "# Merged model", ""]
    lines += [f"Merged by `{report['method']}` with [hf_ivon](https://pypi.org/project/hf_ivon/) from:", ""]
    lines += [f"- {name}, weight {weight:g}" for name, weight in zip(report["models"], report["weights"], strict=True)]
    if report["base_model"]:
        lines += ["", f"Base model: {report['base_model']}"]
    shares = layers(report["tensors"])
    if shares:
        lines += ["", "Share of each model, by layer:", ""]
        lines += ["| layer | " + " | ".join(report["models"]) + " |", "|---" * (len(report["models"]) + 1) + "|"]
        lines += [f"| {layer} | " + " | ".join(f"{s:.1%}" for s in row) + " |" for layer, row in shares.items()]
    for note in report["notes"]:
        lines += ["", f"Note: {note}"]
    return "\n".join(lines) + "\n"
