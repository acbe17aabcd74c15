"""The options of IVON and their ranges."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _positive(value: Any) -> bool:
    return _number(value) and 0 < value < math.inf


def _non_negative(value: Any) -> bool:
    return _number(value) and 0 <= value < math.inf


def _decay(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _learning_rate(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.numel() == 1) or _non_negative(value)


# name: (test, rule as the message states it, what to do)
_RULES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "lr": (_learning_rate, "a number of at least 0", "0.1 suits finetuning with `clip_radius=1e-3`."),
    "ess": (
        _positive,
        "a positive number",
        "Pass the number of training examples, or of tokens for a language model.",
    ),
    "eval_ess_scale": (_positive, "a positive number", "1 is the posterior of training; below 1 it is wider."),
    "temperature": (_positive, "a positive number", "1 is the paper's; smaller is a narrower posterior."),
    "relative_sigma": (_non_negative, "a number of at least 0", "0.05 to 0.2 are usual; 0 is off."),
    "hess_init": (_positive, "a positive number", "Values from 1e-3 to 1 are usual."),
    "beta1": (_decay, "in [0, 1)", "0.9 is usual."),
    "beta2": (_decay, "in [0, 1)", "Values from 0.999 to 0.99999 are usual."),
    "weight_decay": (_non_negative, "a number of at least 0", "Values from 1e-6 to 1e-4 are usual."),
    "mc_samples": (lambda v: _integer(v) and v >= 1, "an integer of at least 1", "1 is usual."),
    "clip_radius": (
        lambda v: _number(v) and v > 0,
        "a positive number or inf",
        "1e-3 suits transformers; inf turns it off.",
    ),
    "rescale_lr": (lambda v: isinstance(v, bool), "True or False", "Pass a bool."),
    "debias": (lambda v: isinstance(v, bool), "True or False", "Pass a bool."),
    "hess_approx": (
        lambda v: v in ("fisher", "gradsq", "price"),
        "'fisher', 'gradsq' or 'price'",
        "'price' is the paper's default; 'fisher' learns within a finetuning run.",
    ),
    "batch_size": (
        _positive,
        "a positive number",
        "Pass what the loss of a step is an average of: examples, or label tokens, of all processes together.",
    ),
    "prior_mean": (
        lambda v: v in ("given", "init", "zero"),
        "'init', 'zero' or one tensor per parameter",
        "'zero' is Algorithm 1.",
    ),
    "momentum_dtype": (
        lambda v: v in ("float32", "bfloat16"),
        "'float32' or 'bfloat16'",
        "'bfloat16' halves its memory.",
    ),
    "low_memory": (lambda v: isinstance(v, bool), "True or False", "True keeps no copy of the weights in training."),
    "foreach": (lambda v: v is None or isinstance(v, bool), "True, False or None", "None chooses."),
    "fused": (lambda v: v is None or isinstance(v, bool), "True, False or None", "None chooses."),
    "seed": (lambda v: _integer(v) and 0 <= v < 2**63, "an integer in [0, 2**63)", "Pass a non-negative integer."),
}


# Options of an optimizer that say how it runs, not what it learns; pickles of older ones have not all of them.
_HOW_TO_RUN = ("foreach", "fused", "low_memory")


def is_squared(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the groups' estimator is of squared gradients, not of gradients times noise."""
    return any(group["hess_approx"] in ("fisher", "gradsq") for group in groups)


def ess_of(group: Mapping[str, Any], train: bool) -> float:
    """Return the effective sample size of a group: that of training, or that of predictions and of what is saved."""
    return group["ess"] if train else group["ess"] * group.get("eval_ess_scale", 1.0)  # older states have none


def group_of(p: Tensor, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the group of a parameter.

    Args:
        p: The parameter.
        groups: The optimizer's groups.

    Raises:
        ValueError: If it is in none of them.
    """
    for group in groups:
        if any(q is p for q in group["params"]):
            return group
    raise ValueError(f"The parameter must belong to this optimizer, got one of shape {tuple(p.shape)} that does not.")


def plain_numbers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with numbers of other libraries, as numpy's, as Python's: files of pure data hold only these."""

    def plain(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return value
        return int(value) if isinstance(value, numbers.Integral) else float(value)

    return {name: plain(value) for name, value in options.items()}


def check_options(options: Mapping[str, Any]) -> None:
    """Check every option of a parameter group.

    Args:
        options: Option name to value; names that are no options of IVON are passed over.

    Raises:
        ValueError: If a value is out of range; names the option, the rule, the value and a remedy.
    """
    for name, (accepts, rule, remedy) in _RULES.items():
        if name in options and not accepts(options[name]):
            raise ValueError(f"`{name}` must be {rule}, got {options[name]!r}. {remedy}")


def check_low_memory(options: Mapping[str, Any]) -> None:
    """Check that a Hessian that learns in the backward pass can do so.

    Args:
        options: All options of a parameter group.

    Raises:
        ValueError: If what it learns from is known only at the end of a step.
    """
    if options.get("low_memory") and (options["hess_approx"] != "price" or options["mc_samples"] != 1):
        raise ValueError(
            f"`low_memory` must go with `hess_approx='price'` and `mc_samples=1`, got {options['hess_approx']!r} and "
            f"{options['mc_samples']}: squares and averages of gradients are known only at the end of a step. Set "
            f"them, or leave `low_memory` out; `momentum_dtype='bfloat16'` saves memory with any option."
        )


def run_alike(groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return saved groups with the options that say how an optimizer runs, which remain its own.

    Args:
        groups: Parameter groups of a state.
        defaults: Options of the optimizer that is to have them.

    Raises:
        ValueError: If it cannot run with the others of theirs.
    """
    own = {name: defaults[name] for name in _HOW_TO_RUN if name in defaults}
    merged = [{**group, **own} for group in groups]
    for group in merged:
        check_low_memory(group)
    return merged


def check_group(options: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Check the options of a new parameter group, and that it shares with the others what cannot differ.

    Args:
        options: All options of the new group.
        groups: The groups that are there.
        defaults: Options of the optimizer.

    Raises:
        ValueError: If a value is out of range, does not go with another, or with the other groups: how gradients are
            captured, and how passes run.
    """
    check_options(options)
    check_low_memory(options)
    if any(group["hess_approx"] != options["hess_approx"] for group in groups):
        raise ValueError(
            f"`hess_approx` must be the same in all groups, got {options['hess_approx']!r} beside "
            f"{groups[0]['hess_approx']!r}. Choose one."
        )
    for name in _HOW_TO_RUN:
        if options.get(name) != defaults.get(name):
            raise ValueError(
                f"`{name}` must be the same in all groups, got {options.get(name)!r} in a group of an optimizer with "
                f"{defaults.get(name)!r}. Pass it to the optimizer, not to a group."
            )
