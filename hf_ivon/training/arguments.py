"""Training arguments: IVON's options beside those of Transformers, as flags, as `optim_args`, in JSON and in code."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_ivon.options import check_low_memory, check_options
from hf_ivon.training.presets import DEFAULTS, FISHER_START, PRESETS, convert, parse

logger = logging.getLogger(__name__)

_PRIOR_ON = ("all", "decay")


@dataclass
class IVONTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose `optim` may also be ``"ivon"``, the default.

    Every other optimizer of Transformers works as it does there, so that a baseline is one flag away. Each `ivon_*`
    option can also be given without its prefix in `optim_args`, as in ``--optim_args "ess=1e7,hess_init=1e-3"``.

    Defaults that differ from Transformers, because IVON's step is a Newton step: `optim` is ``"ivon"``;
    `learning_rate` and `weight_decay` are 0.1 and 1e-5 for IVON (the paper's App. C.4), and 5e-5 and 0.0, as ever, for
    other optimizers; a copy made by `dataclasses.replace` keeps the values, so give them again with another `optim`.
    `weight_decay` is the prior precision per example. `max_grad_norm` clips the gradient that moves the mean, never
    the gradients that the Hessian is learnt from.
    """

    optim: str = field(
        default="ivon",
        metadata={"help": "The optimizer: 'ivon', or any name that Transformers knows (AdamW: adamw_torch)."},
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate. Default: 0.1 for ivon (see ivon_preset), 5e-5 for other optimizers."},
    )
    weight_decay: float | None = field(
        default=None,
        metadata={
            "help": "For ivon the prior precision per example, on every weight (see ivon_prior_on), default 1e-5 (see "
            "ivon_preset); for other optimizers the weight decay, default 0."
        },
    )
    ivon_preset: str | None = field(
        default=None,
        metadata={
            "help": "What is not set by other flags: 'paper' (default, its setting for finetuning), 'finetuning' (a "
            "Hessian that short runs learn), 'averaging' (that, for predictions that are averaged), or 'pretraining' "
            "(from scratch; sets ivon_ess). Sets learning_rate and weight_decay too."
        },
    )
    ivon_ess: str | None = field(
        default=None,
        metadata={
            "help": "Effective sample size lambda, a number or 'auto' (default): what the loss averages over: the "
            "training examples, or for a language model the label tokens."
        },
    )
    ivon_temperature: float | None = field(
        default=None,
        metadata={"help": "With ivon_ess=auto: lambda is what the loss averages over, divided by it, > 0. Default 1."},
    )
    ivon_relative_sigma: float | None = field(
        default=None,
        metadata={
            "help": "The widest sigma over the root mean square of the trained weights, 0.05 to 0.2. Sets "
            "ivon_hess_init, for 'fisher' weight_decay. Default 0: they are as given."
        },
    )
    ivon_hess_init: float | None = field(
        default=None,
        metadata={
            "help": "Start value of the Hessian, > 0; sigma starts at (ess * (hess_init + wd)) ** -0.5. Default 1, "
            "for 'fisher', which counts it as one estimate, 1e-6."
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
        default=None,
        metadata={
            "help": "Hessian estimator: 'price' (default), 'gradsq', or 'fisher', which learns in hundreds of steps."
        },
    )
    ivon_batch_size: str | None = field(
        default=None,
        metadata={
            "help": "For 'fisher': what the loss of a step averages over in all processes, a number or 'auto' "
            "(default), counted in each step: examples, or for a language model label tokens."
        },
    )
    ivon_prior_mean: str | None = field(
        default=None,
        metadata={"help": "Prior mean: 'zero' (default) or 'init', the weights that training starts from."},
    )
    ivon_prior_on: str | None = field(
        default=None,
        metadata={
            "help": "Weights under the prior: 'all' (default), or 'decay', without biases and normalization weights, "
            "whose prior is then flat; not with 'fisher'."
        },
    )
    ivon_eval_ess_scale: float | None = field(
        default=None,
        metadata={
            "help": "Factor on lambda outside of training, for predictions and what is saved, > 0; below "
            "1 they are wider than what training used. Default 1."
        },
    )
    ivon_momentum_dtype: str | None = field(
        default=None, metadata={"help": "'float32' (default), or 'bfloat16' to halve the memory of the momentum."}
    )
    ivon_low_memory: bool | None = field(
        default=None,
        metadata={
            "help": "As little optimizer memory as AdamW's: weight samples are taken off by drawing them again, which "
            "moves the mean by a rounding error. With 'price' and one MC sample. Default false."
        },
    )
    ivon_seed: int | None = field(default=None, metadata={"help": "Seed of the weight noise. Default: seed."})
    ivon_foreach: bool | None = field(
        default=None, metadata={"help": "Work on small tensors together. Default: chosen by their sizes."}
    )
    ivon_fused: bool | None = field(
        default=None,
        metadata={"help": "Run the optimizer's passes compiled. Default: for more than a million trained weights."},
    )
    ivon_eval_num_samples: int = field(
        default=0,
        metadata={"help": "Weight samples that evaluate and predict average over; 0, the default, is the mean."},
    )

    def __post_init__(self) -> None:
        """Resolve the defaults that depend on the optimizer, and check IVON's options.

        Raises:
            ValueError: If an option is unknown, out of range, given twice with different values, or does not go with
                IVON.
        """
        is_ivon = self.optim == "ivon"
        preset = preset_of(self) if is_ivon else {"learning_rate": 5e-5, "weight_decay": 0.0}
        self.learning_rate = _resolve("learning_rate", self.learning_rate, preset["learning_rate"])
        self.weight_decay = _resolve("weight_decay", self.weight_decay, preset["weight_decay"])
        if is_ivon:
            self.optim = "adamw_torch"  # the base class accepts its own names only
        super().__post_init__()
        if is_ivon:
            self.optim = "ivon"
            self.ivon_options()
            if not isinstance(self.ivon_eval_num_samples, int) or self.ivon_eval_num_samples < 0:
                raise ValueError(
                    f"`ivon_eval_num_samples` must be an integer of at least 0, got {self.ivon_eval_num_samples!r}. 0 "
                    f"is the mean, 16 is usual."
                )
            check_supported(self)
        elif flags := [*_flags(self), *(["eval_num_samples"] if self.ivon_eval_num_samples else [])]:
            names = ", ".join(f"ivon_{key}" for key in flags)
            optim = self.optim.value  # an OptimizerNames, after the base class
            logger.warning("No effect with optim=%r: %s. Leave them out, or pass optim='ivon'.", optim, names)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle as plain `TrainingArguments`, so that `training_args.bin` opens where hf_ivon is not installed."""
        construct, (_, *arguments), *rest = super().__reduce__()
        return construct, (TrainingArguments, *arguments), *rest

    def __copy__(self) -> IVONTrainingArguments:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> IVONTrainingArguments:
        other = memo[id(self)] = object.__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def set_optimizer(
        self,
        name: str = "ivon",
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        epsilon: float | None = None,
        args: str | None = None,
    ) -> IVONTrainingArguments:
        """Set all that is linked to the optimizer, as `TrainingArguments.set_optimizer` does.

        Args:
            name: Name of the optimizer; may be ``"ivon"``.
            learning_rate: Peak learning rate; None is the optimizer's default.
            weight_decay: Prior precision per example, for other optimizers weight decay; None is the default.
            beta1: Decay of the gradient average; None is the optimizer's default.
            beta2: Decay of the Hessian average, for other optimizers of the second moment; None is the default.
            epsilon: For other optimizers only; None is the default.
            args: `optim_args`.

        Returns:
            These arguments.

        Raises:
            ValueError: If a value is out of range, or `epsilon` is given for IVON.
        """
        if name != "ivon":
            given = {"learning_rate": learning_rate, "weight_decay": weight_decay, "args": args}
            given |= {"beta1": beta1, "beta2": beta2, "epsilon": epsilon}
            super().set_optimizer(name, **{key: value for key, value in given.items() if value is not None})
            return self
        if epsilon is not None:
            raise ValueError(f"`epsilon` must be left out for optim='ivon', got {epsilon!r}. IVON has none.")
        self.optim, self.optim_args = "ivon", args
        preset = preset_of(self)
        self.learning_rate = _resolve("learning_rate", learning_rate, preset["learning_rate"])
        self.weight_decay = _resolve("weight_decay", weight_decay, preset["weight_decay"])
        self.ivon_beta1, self.ivon_beta2 = beta1, beta2
        self.ivon_options()
        check_supported(self)
        return self

    def ivon_options(self) -> dict[str, Any]:
        """Return the options of IVON: flags, then `optim_args`, then those of the preset, then defaults.

        Returns:
            Keyword arguments of `IVON` without `lr` and `weight_decay`; `ess` and `batch_size` may be ``"auto"``,
            `temperature` and `relative_sigma` say how others are resolved, and `prior_on` is for the parameter groups.

        Raises:
            ValueError: If an option is unknown, out of range, or given twice with different values.
        """
        flags, given = _flags(self), _given(self)
        options = {**DEFAULTS, **preset_of(self), **given}
        if "temperature" in given and "ess" not in given:
            options["ess"] = DEFAULTS["ess"]  # which it is for, whatever the preset has
        if options["hess_approx"] == "fisher" and "hess_init" not in given:
            options["hess_init"] = FISHER_START
        if "ess" in given and given["ess"] != "auto" and given.get("temperature", 1.0) != 1.0:
            raise ValueError(
                f"`temperature` must be left out where `ess` is a number, got {given['temperature']!r} and "
                f"{given['ess']!r}. It is for ess=auto."
            )
        if options["relative_sigma"]:
            fisher = options["hess_approx"] == "fisher"
            own = self.weight_decay not in (None, preset_of(self)["weight_decay"])
            fixed = own if fisher else "hess_init" in given
            if fixed and "relative_sigma" in given:
                name, value = ("weight_decay", self.weight_decay) if fisher else ("hess_init", given["hess_init"])
                raise ValueError(
                    f"`relative_sigma` must be left out where `{name}` is given, got {given['relative_sigma']!r} and "
                    f"{value!r}: it sets that. Leave out one of them."
                )
            options["relative_sigma"] *= not fixed
        if self.weight_decay is None and not (options["relative_sigma"] and options["hess_approx"] == "fisher"):
            raise ValueError(
                "`weight_decay` must be given with this preset where `relative_sigma` does not set it, that is where "
                "that is 0 or `hess_approx` is not 'fisher', got None. Pass --weight_decay."
            )
        # In the arguments of Transformers 0 is what nobody has set, and the preset's takes its place.
        own = isinstance(self, IVONTrainingArguments)
        if own and options["hess_approx"] == "fisher" and self.weight_decay == 0:
            raise ValueError(
                "`weight_decay` must be above 0 with hess_approx='fisher' (presets finetuning and averaging), got 0. "
                "That estimator forgets hess_init, and nothing would bound the noise of weights without a prior: "
                "leave --weight_decay out, so that the preset sets it, or set hess_approx='price'."
            )
        for key in ("preset", "learning_rate", "weight_decay"):
            del options[key]
        if options["seed"] is None:
            options["seed"] = self.seed
        names = {key: f"ivon_{key}" for key in flags} | {"lr": "learning_rate"}
        if options["prior_on"] not in _PRIOR_ON:
            raise ValueError(
                f"`{names.get('prior_on', 'prior_on')}` must be one of {', '.join(_PRIOR_ON)}, got "
                f"{options['prior_on']!r}. 'all' is usual."
            )
        if options["prior_on"] == "decay" and options["hess_approx"] == "fisher":
            raise ValueError(
                f"`{names.get('prior_on', 'prior_on')}` must be 'all' with hess_approx='fisher' (presets finetuning "
                f"and averaging), got 'decay'. That estimator forgets hess_init, and nothing would bound the noise of "
                f"weights without a prior; for a flat prior, set hess_approx='price'."
            )
        if options["prior_mean"] == "given":
            raise ValueError("`ivon_prior_mean` must be 'zero' or 'init', got 'given'. Tensors go to `IVON` in code.")
        for key, value in {**options, "lr": self.learning_rate, "weight_decay": self.weight_decay}.items():
            if (key in ("ess", "batch_size") and value == "auto") or (key == "weight_decay" and value is None):
                continue
            try:
                check_options({key: value})
            except ValueError as err:  # the message names the option as it was given
                raise ValueError(str(err).replace(f"`{key}`", f"`{names.get(key, key)}`", 1)) from None
        try:
            check_low_memory(options)
        except ValueError as err:
            given = names.get("low_memory", "low_memory")
            presets = "The presets finetuning and averaging have 'fisher'."
            raise ValueError(str(err).replace("`low_memory`", f"`{given}`") + f" {presets}") from None
        return options


def check_supported(args: TrainingArguments) -> None:
    """Refuse what IVON cannot do right yet, before anything is trained.

    Args:
        args: Training arguments.

    Raises:
        ValueError: If they ask for it; the message names the alternative.
    """
    version = int((args.fsdp_config or {}).get("version", 2))
    options = IVONTrainingArguments.ivon_options(args) if args.optim == "ivon" else DEFAULTS
    refused = {
        "DeepSpeed (it steps inside the backward pass)": (args.deepspeed_plugin is not None, "Leave out --deepspeed"),
        "FSDP1": (bool(args.fsdp) and version == 1, "Set version 2 in --fsdp_config"),
        "mc_samples above 1 with FSDP": (bool(args.fsdp) and options["mc_samples"] > 1, "Set it to 1"),
        "low_memory with FSDP": (bool(args.fsdp) and options["low_memory"], "Leave it out, as memory is sharded"),
    }
    for what, (asked, remedy) in refused.items():
        if asked:
            raise ValueError(f"optim='ivon' does not support {what}. {remedy}, or choose another `optim`.")


def preset_of(args: TrainingArguments) -> dict[str, Any]:
    """Return what the preset sets, with `learning_rate` and `weight_decay`.

    Args:
        args: Training arguments of any class.

    Returns:
        Option name to value.

    Raises:
        ValueError: If there is no such preset.
    """
    name = _given(args).get("preset", DEFAULTS["preset"])
    if name not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {name!r}. 'paper' is the default.")
    return PRESETS[name]


def _given(args: TrainingArguments) -> dict[str, Any]:
    """Return the options that are set, by flags or in `optim_args`."""
    flags, written = _flags(args), parse(args.optim_args)
    for key, value in flags.items():
        if key in written and written[key] != value:
            raise ValueError(
                f"`ivon_{key}` must agree with `optim_args`, got {value!r} and {key}={written[key]!r}. Give it once."
            )
    return {**written, **flags}


def _flags(args: TrainingArguments) -> dict[str, Any]:
    """Return the `ivon_*` options that are set, by their names without the prefix."""
    values = {key: getattr(args, f"ivon_{key}", None) for key in DEFAULTS}
    return {key: convert(key, value) for key, value in values.items() if value is not None}


def _resolve(name: str, value: Any, default: float | None) -> float | None:
    """Return the default for None, and a number for the string that YAML makes of `1e-3`."""
    if value is None:
        return default
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a number, got {value!r}. Correct it.") from None
