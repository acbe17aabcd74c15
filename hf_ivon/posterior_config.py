"""What a posterior was learnt with, and the rules of the file that says so."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT_VERSION = 1


@dataclass
class PosteriorConfig:
    """What a posterior's variances were learnt with; stands in `posterior_config.json`.

    Args:
        ess: Effective sample size λ; a number, or a number by tensor name where parameter groups differ.
        weight_decay: Prior precision per example δ, loss/param²; number or by name.
        hess_init: Start value of the Hessian h0, loss/param² per example; number or by name.
        num_examples: Number of training examples N, None if not known.
        num_tokens: Number of label tokens, for losses that average over tokens; None otherwise.
        steps: Optimizer steps that the posterior has seen.
        betas: Decays of the gradient and of the Hessian average.
        estimator: Where the Hessian is from: ``"ivon-"`` and the `hess_approx`, or the name of another estimator.
        mean_digest: Digest of the mean that the variances belong to, see `mean_digest`.
        base_model: Name or path of the model that training started from, if known.
        base_revision: Its revision, if known.
        versions: Library versions that wrote the posterior.
        format_version: Version of the files' format.
    """

    ess: float | dict[str, float]
    weight_decay: float | dict[str, float]
    hess_init: float | dict[str, float]
    num_examples: int | None
    num_tokens: int | None
    steps: int
    betas: tuple[float, float]
    estimator: str
    mean_digest: str
    base_model: str | None = None
    base_revision: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON types."""
        return {**dataclasses.asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PosteriorConfig:
        """Build a configuration from JSON types, checking all of them.

        Args:
            values: What `to_dict` returned; unknown keys are errors.

        Returns:
            The configuration.

        Raises:
            ValueError: If a key is missing, unknown or of the wrong kind; all problems are named.
        """
        problems = config_problems(values)
        if problems:
            raise ValueError("; ".join(problems))
        return cls(**{**values, "betas": tuple(values["betas"])})

    @property
    def loss_size(self) -> int | None:
        """What the training loss averaged over: label tokens, or else examples; None if neither is known."""
        return self.num_examples if self.num_tokens is None else self.num_tokens

    def of(self, name: str, key: str) -> float:
        """Return `ess`, `weight_decay` or `hess_init` of one tensor."""
        value = getattr(self, name)
        return value[key] if isinstance(value, dict) else value

    def of_module(self, prefix: str) -> PosteriorConfig:
        """Return the same for the tensors of one module, by the names that they have in it."""

        def inside(value: Any) -> Any:
            names = [n for n in value if n.startswith(prefix)] if isinstance(value, dict) else None
            return value if names is None else {n.removeprefix(prefix): value[n] for n in names}

        return dataclasses.replace(
            self, ess=inside(self.ess), weight_decay=inside(self.weight_decay), hess_init=inside(self.hess_init)
        )


def one_or_all(values: dict[str, float]) -> float | dict[str, float]:
    """Return the value that all names have, or, where they differ, all of them."""
    return next(iter(values.values())) if len(set(values.values())) == 1 else values


def config_problems(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the JSON form of a `PosteriorConfig`, one string a problem.

    Args:
        values: The JSON object.

    Returns:
        Problems, empty if there is none.
    """
    if values.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        return [
            f"`format_version` is {values['format_version']!r} and this version of hf_ivon reads {FORMAT_VERSION}: "
            f"upgrade hf_ivon"
        ]

    def number(value: Any, zero: bool = False) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (0 <= value if zero else 0 < value) and value < float("inf")

    def scalar(value: Any, zero: bool = False) -> bool:
        values = value.values() if isinstance(value, dict) else [value]
        return all(number(v, zero) for v in values)

    def count(value: Any) -> bool:
        return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)

    rules = {
        "ess": (scalar, "a positive number, or one by tensor name"),
        "weight_decay": (lambda v: scalar(v, zero=True), "a number of at least 0, or one by tensor name"),
        "hess_init": (scalar, "a positive number, or one by tensor name"),
        "num_examples": (count, "a whole number above 0, or null"),
        "num_tokens": (count, "a whole number above 0, or null"),
        "steps": (lambda v: v == 0 or (v is not None and count(v)), "a whole number"),
        "betas": (
            lambda v: isinstance(v, (list, tuple)) and len(v) == 2 and all(number(b, True) for b in v),
            "a pair",
        ),
        "estimator": (lambda v: isinstance(v, str), "a string"),
        "mean_digest": (lambda v: isinstance(v, str), "a string"),
    }
    optional = {
        "base_model": (lambda v: v is None or isinstance(v, str), "a string or null"),
        "base_revision": (lambda v: v is None or isinstance(v, str), "a string or null"),
        "versions": (
            lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values()),
            "an object of strings",
        ),
    }
    problems = [f"`{k}` is missing" for k in rules if k not in values]
    unknown = set(values) - {f.name for f in dataclasses.fields(PosteriorConfig)}
    problems += [f"`{k}` is not a key of this format" for k in sorted(unknown)]
    problems += [
        f"`{k}` must be {rule}, got {values[k]!r}"
        for k, (ok, rule) in (rules | optional).items()
        if k in values and not ok(values[k])
    ]
    return problems


def setting_text(value: float | Mapping[str, float]) -> str:
    """Return a setting to read; where it differs by tensor, its range."""
    if not isinstance(value, Mapping):
        return f"{value:.6g}"
    return f"{min(value.values()):.6g} to {max(value.values()):.6g}, by tensor"


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that shape a checkpoint, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for name in ("hf_ivon", "torch", "transformers", "accelerate", "peft", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
