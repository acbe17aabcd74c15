"""The Trainer's options of IVON: their defaults by preset, and how strings become values."""

from __future__ import annotations

import math
from typing import Any

# `hess_init` for "fisher", which counts it as one estimate: at 1 that alone would be a thousand times the curvature of
# a weight after a hundred steps.
FISHER_START = 1e-6
# What an option is when neither a flag, `optim_args` nor the preset sets it: the paper's finetuning (App. C.4).
DEFAULTS: dict[str, Any] = {
    "preset": "paper",
    "ess": "auto",
    "temperature": 1.0,
    "relative_sigma": 0.0,
    "hess_init": 1.0,
    "beta1": 0.9,
    "beta2": 0.99999,
    "clip_radius": 1e-3,
    "rescale_lr": True,
    "debias": True,
    "mc_samples": 1,
    "hess_approx": "price",
    "batch_size": "auto",
    "prior_mean": "zero",
    "prior_on": "all",
    "eval_ess_scale": 1.0,
    "momentum_dtype": "float32",
    "low_memory": False,
    "seed": None,
    "foreach": None,
    "fused": None,
}
# The weight decay is what `relative_sigma` makes of it: a prior at the pretrained weights, of that width.
_FISHER: dict[str, Any] = {"weight_decay": None, "hess_approx": "fisher", "beta2": 0.98, "prior_mean": "init"}
# Each preset over the defaults, with `learning_rate` and `weight_decay`. The evidence is in recipes/PAPERS.md.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"learning_rate": 0.1, "weight_decay": 1e-5},
    "finetuning": {**_FISHER, "learning_rate": 0.1, "temperature": 0.005, "relative_sigma": 0.17},
    # Trained with a third of that noise, and averaged over more of it.
    "averaging": {
        **_FISHER,
        "learning_rate": 0.05,
        "temperature": 5e-5,
        "relative_sigma": 0.05,
        "eval_ess_scale": 0.05,
    },
    # Were `ess` the number of tokens, the Hessian's start, and so the first steps, would depend on the dataset's size.
    "pretraining": {"learning_rate": 0.5, "weight_decay": 1e-6, "ess": 5e6, "relative_sigma": 0.05},
}
_STRINGS = ("preset", "hess_approx", "prior_mean", "prior_on", "momentum_dtype")
_BOOLEANS = ("rescale_lr", "debias", "foreach", "fused", "low_memory")
_INTEGERS = ("mc_samples", "seed")


def parse(text: str | None) -> dict[str, Any]:
    """Return the options that `optim_args` sets.

    Args:
        text: Of the form ``"key=value,..."``; None is nothing.

    Returns:
        Option name to value.

    Raises:
        ValueError: If a key is unknown or given twice, or a value has the wrong type.
    """
    options: dict[str, Any] = {}
    for part in (text or "").replace(" ", "").split(","):
        if not part:
            continue
        key, equals, value = part.partition("=")
        if key not in DEFAULTS or not equals:
            raise ValueError(
                f"`optim_args` must be 'key=value,...' with keys {', '.join(sorted(DEFAULTS))}, got {part!r}. The "
                f"learning rate and the prior precision are `learning_rate` and `weight_decay`."
            )
        if key in options:
            raise ValueError(f"`optim_args` must give each option once, got {key} twice. Remove one of them.")
        options[key] = convert(key, value)
    return options


def convert(key: str, value: Any) -> Any:
    """Turn a string from the command line or a settings file into the type of the option.

    Args:
        key: Name of the option.
        value: A string, or a value that has its type already.

    Returns:
        The value; ``"auto"`` stays what it is.

    Raises:
        ValueError: If the string is not of that type.
    """
    if not isinstance(value, str) or key in _STRINGS or value == "auto":
        return value
    if key in _BOOLEANS:
        if value.lower() in ("true", "1", "yes", "false", "0", "no"):
            return value.lower() in ("true", "1", "yes")
        raise ValueError(f"`{key}` must be true or false, got {value!r}. Correct it.")
    try:
        if key in _INTEGERS and value.removeprefix("-").isdecimal():
            return int(value)  # a float would round a large one
        number = float(value)
    except ValueError:
        raise ValueError(f"`{key}` must be a number, got {value!r}. Correct it.") from None
    whole = key in _INTEGERS and math.isfinite(number) and number == int(number)
    return int(number) if whole else number
