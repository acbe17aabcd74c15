"""`import hf_ivon.auto`: `--optim ivon` in any script that uses a Trainer.

The name "ivon" is added to Transformers' optimizer names, so that the script's own argument parser takes it, and every
Trainer whose arguments say so gets `IVONTrainerMixin` in front of its class. Trainers with another optimizer are left
as they are, and `disable` takes everything back. Import it before the script parses its arguments.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import Trainer
from transformers.training_args import OptimizerNames

from hf_ivon.training.trainer import IVONTrainerMixin

# Trainers of TRL that generate in their training step: it would be with weight samples, also in another process.
_GENERATING = {
    "GRPOTrainer",
    "RLOOTrainer",
    "OnlineDPOTrainer",
    "NashMDTrainer",
    "XPOTrainer",
    "GKDTrainer",
    "MiniLLMTrainer",
    "PPOTrainer",
    "DistillationTrainer",
}
_PATCHED = {"__init__": False, "train": True}  # whether a Trainer is adopted before the call or after it
_originals: dict[str, Any] = {}


def enable() -> None:
    """Make every Trainer understand ``optim="ivon"``; done on import, harmless to repeat."""
    if _originals:
        return
    _add_name()
    for name, before in _PATCHED.items():
        _originals[name] = getattr(Trainer, name)
        setattr(Trainer, name, _adopting(_originals[name], before=before))


def disable() -> None:
    """Take back what `enable` did; Trainers that already train with IVON go on."""
    for name, original in _originals.items():
        setattr(Trainer, name, original)
    _originals.clear()
    _remove_name()


def adopt(trainer: Trainer) -> None:
    """Make a Trainer train with weight samples and save the posterior, if its arguments ask for IVON.

    Args:
        trainer: A Trainer of any class; with another optimizer it is left as it is.

    Raises:
        ValueError: If its class generates text inside its training step.
    """
    if isinstance(trainer, IVONTrainerMixin) or trainer.args.optim != "ivon":
        return
    for cls in type(trainer).__mro__:
        if cls.__name__ in _GENERATING and cls.__module__.startswith("trl."):
            raise ValueError(
                f"optim='ivon' does not support {cls.__name__}: it generates inside its training step, which would be "
                f"with a weight sample. Choose another `optim`, or a trainer that learns from given data (SFT, DPO)."
            )
    trainer.__class__ = _with_mixin(type(trainer))


@functools.cache
def _with_mixin(cls: type[Trainer]) -> type[Trainer]:
    """Return the class with IVON in front: also of what it overrides without calling `super()`."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, (IVONTrainerMixin, cls), names)


def _adopting(original: Any, *, before: bool) -> Any:
    @functools.wraps(original)
    def wrapper(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if before:
            adopt(self)
        result = original(self, *args, **kwargs)
        if not before:
            adopt(self)
        return result

    return wrapper


def _add_name() -> None:
    """Add the member to the enumeration in place: parsers, dataclasses and comparisons all read it from there."""
    names = OptimizerNames
    member = str.__new__(names, "ivon")
    member._name_, member._value_, member.__objclass__ = "IVON", "ivon", names
    member._sort_order_ = len(names._member_names_)
    # Pickled as a plain string, so that `training_args.bin` opens where hf_ivon is not installed.
    member.__reduce_ex__ = lambda protocol: (str, ("ivon",))
    names._member_names_.append("IVON")
    names._member_map_["IVON"] = member
    names._value2member_map_["ivon"] = member
    type.__setattr__(names, "IVON", member)


def _remove_name() -> None:
    names = OptimizerNames
    if "IVON" in names._member_map_:
        names._member_names_.remove("IVON")
        del names._member_map_["IVON"], names._value2member_map_["ivon"]
        type.__delattr__(names, "IVON")


enable()
