"""Training arguments: IVON's options beside those of Transformers, as flags, as `optim_args`, in JSON and in code."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_ivon.options import check_options

logger = logging.getLogger(__name__)

# What an option is when neither its flag nor `optim_args` sets it: the paper's finetuning setting (App. C.4).
_DEFAULTS: dict[str, Any] = {
    "ess": "auto",
    "hess_init": 1.0,
    "beta1": 0.9,
    "beta2": 0.99999,
    "clip_radius": 1e-3,
    "rescale_lr": True,
    "debias": True,
    "mc_samples": 1,
    "hess_approx": "price",
    "prior_mean": "zero",
    "prior_on": "all",
    "seed": None,
}
_PRIOR_ON = ("all", "decay")


@dataclass
class IVONTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose `optim` may also be ``"ivon"``, the default.

    Every other optimizer of Transformers works as it does there, so that a baseline is one flag away. Each `ivon_*`
    option can also be given without its prefix in `optim_args`, as in ``--optim_args "ess=1e7,hess_init=1e-3"``.

    Defaults that differ from Transformers, because IVON's step is a Newton step: `optim` is ``"ivon"``;
    `learning_rate` and `weight_decay` are 0.1 and 1e-5 for IVON (the paper's App. C.4), and 5e-5 and 0.0, as ever, for
    other optimizers. `weight_decay` is the prior precision per example. `max_grad_norm` clips the gradient that moves
    the mean, never the gradients that the Hessian is learnt from.
    """

    optim: str = field(
        default="ivon",
        metadata={"help": "The optimizer: 'ivon', or any name that Transformers knows (AdamW: adamw_torch)."},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate. Default: 0.1 for ivon, 5e-5 for other optimizers."}
    )
    weight_decay: float | None = field(
        default=None,
        metadata={
            "help": "For ivon the prior precision per example, on every weight (see ivon_prior_on), default 1e-5; "
            "for other optimizers the weight decay, default 0."
        },
    )
    ivon_ess: str | None = field(
        default=None,
        metadata={
            "help": "Effective sample size lambda, a number or 'auto' (default): what the loss averages over: the "
            "training examples, or for a language model the label tokens."
        },
    )
    ivon_hess_init: float | None = field(
        default=None,
        metadata={
            "help": "Start value of the Hessian, > 0; sigma starts at (ess * (hess_init + wd)) ** -0.5. Default 1."
        },
    )
    ivon_beta1: float | None = field(default=None, metadata={"help": "Decay of the gradient average. Default 0.9."})
    ivon_beta2: float | None = field(default=None, metadata={"help": "Decay of the Hessian average. Default 0.99999."})
    ivon_clip_radius: float | None = field(
        default=None, metadata={"help": "Element-wise bound of the Newton step, 'inf' is off. Default 1e-3."}
    )
    ivon_rescale_lr: bool | None = field(
        default=None,
        metadata={
            "help": "Multiply the learning rate by hess_init + weight_decay; only without clipping. Default true."
        },
    )
    ivon_debias: bool | None = field(default=None, metadata={"help": "Debias the gradient average. Default true."})
    ivon_mc_samples: int | None = field(
        default=None,
        metadata={"help": "Weight samples per micro-batch; each costs a forward and backward. Default 1."},
    )
    ivon_hess_approx: str | None = field(
        default=None, metadata={"help": "Hessian estimator: 'price' (default) or 'gradsq'."}
    )
    ivon_prior_mean: str | None = field(
        default=None,
        metadata={"help": "Prior mean: 'zero' (default) or 'init', the weights that training starts from."},
    )
    ivon_prior_on: str | None = field(
        default=None,
        metadata={
            "help": "Weights under the prior: 'all' (default), or 'decay', without biases and normalization weights, "
            "whose prior is then flat."
        },
    )
    ivon_seed: int | None = field(default=None, metadata={"help": "Seed of the weight noise. Default: seed."})

    def __post_init__(self) -> None:
        """Resolve the defaults that depend on the optimizer, and check IVON's options.

        Raises:
            ValueError: If an option is unknown, out of range, or given twice with different values.
        """
        is_ivon = self.optim == "ivon"
        if self.learning_rate is None:
            self.learning_rate = 0.1 if is_ivon else 5e-5
        if self.weight_decay is None:
            self.weight_decay = 1e-5 if is_ivon else 0.0
        if is_ivon:
            self.optim = "adamw_torch"  # the base class accepts its own names only
        super().__post_init__()
        if is_ivon:
            self.optim = "ivon"
            self.ivon_options()
        elif self._flags():
            logger.warning(
                "%s have no effect with optim=%r; they are for optim='ivon'.",
                ", ".join(self._flags()),
                str(self.optim),
            )

    def set_optimizer(self, name: str = "ivon", *args: Any, **kwargs: Any) -> IVONTrainingArguments:
        """Set the optimizer as `TrainingArguments.set_optimizer` does; `name` may be ``"ivon"``.

        Args:
            name: Name of the optimizer.
            args: Passed on.
            kwargs: Passed on; `args` is `optim_args`.

        Returns:
            These arguments.
        """
        super().set_optimizer("adamw_torch" if name == "ivon" else name, *args, **kwargs)
        if name == "ivon":
            self.optim = "ivon"
            self.ivon_options()
        return self

    def ivon_options(self) -> dict[str, Any]:
        """Return the options of IVON: flags, then `optim_args`, then defaults.

        Returns:
            Keyword arguments of `IVON` without `lr` and `weight_decay`; `ess` may be ``"auto"``, and `prior_on` is for
            the parameter groups.

        Raises:
            ValueError: If an option is unknown, out of range, or given twice with different values.
        """
        flags, written = self._flags(), _parse_optim_args(self.optim_args)
        for name, value in flags.items():
            key = name.removeprefix("ivon_")
            if key in written and written[key] != _convert(key, value):
                raise ValueError(
                    f"`{name}` must agree with `optim_args`, got {value!r} and {key}={written[key]!r}. Give it once."
                )
        given = {name.removeprefix("ivon_"): _convert(name.removeprefix("ivon_"), v) for name, v in flags.items()}
        options = {**_DEFAULTS, **written, **given}
        if options["seed"] is None:
            options["seed"] = self.seed
        if options["prior_on"] not in _PRIOR_ON:
            raise ValueError(
                f"`ivon_prior_on` must be one of {', '.join(_PRIOR_ON)}, got {options['prior_on']!r}. 'all' is usual."
            )
        if options["prior_mean"] == "given":
            raise ValueError("`ivon_prior_mean` must be 'zero' or 'init', got 'given'. Tensors go to `IVON` in code.")
        checked = {k: v for k, v in options.items() if not (k == "ess" and v == "auto")}
        check_options({**checked, "lr": self.learning_rate, "weight_decay": self.weight_decay})
        return options

    def _flags(self) -> dict[str, Any]:
        names = [f"ivon_{key}" for key in _DEFAULTS]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _parse_optim_args(text: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in (text or "").replace(" ", "").split(","):
        if not part:
            continue
        key, equals, value = part.partition("=")
        if key not in _DEFAULTS or not equals:
            raise ValueError(
                f"`optim_args` must be 'key=value,...' with keys {', '.join(sorted(_DEFAULTS))}, got {part!r}. The "
                f"learning rate and the prior precision are `learning_rate` and `weight_decay`."
            )
        options[key] = _convert(key, value)
    return options


def _convert(key: str, value: Any) -> Any:
    """Turn a string from the command line or a settings file into the type of the option."""
    if not isinstance(value, str) or key in ("hess_approx", "prior_mean", "prior_on") or value == "auto":
        return value
    if isinstance(_DEFAULTS[key], bool):
        if value.lower() in ("true", "1", "yes", "false", "0", "no"):
            return value.lower() in ("true", "1", "yes")
        raise ValueError(f"`{key}` must be true or false, got {value!r}. Correct it.")
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"`{key}` must be a number, got {value!r}. Correct it.") from None
    whole = key in ("mc_samples", "seed") and math.isfinite(number) and number == int(number)
    return int(number) if whole else number
