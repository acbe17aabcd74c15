"""Variational learning with IVON for Hugging Face Transformers.

The names below are loaded on first use, so that ``import hf_ivon`` stays light: the optimizer, the posterior and the
merge rules need torch and safetensors only; the Trainer, generation and pipelines bring Transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "IVON": "optim",
    "IVONTrainer": "training.trainer",
    "IVONTrainerMixin": "training.trainer",
    "IVONTrainingArguments": "training.arguments",
    "Mixture": "mixture",
    "Posterior": "posterior",
    "PosteriorConfig": "posterior_config",
    "PosteriorFormatError": "checkpoint",
    "Sensitivity": "sensitivity",
    "estimate_sensitivity": "sensitivity",
    "fit_ess_scale": "calibration",
    "load_posterior": "checkpoint",
    "minimum_bayes_risk": "generation",
    "pipeline": "pipelines",
    "posterior_generate": "generation",
    "posterior_perplexity": "predict",
    "posterior_predict": "predict",
    "sample_generations": "generation",
    "save_posterior": "checkpoint",
}

__all__ = [
    "IVON",
    "IVONTrainer",
    "IVONTrainerMixin",
    "IVONTrainingArguments",
    "Mixture",
    "Posterior",
    "PosteriorConfig",
    "PosteriorFormatError",
    "Sensitivity",
    "__version__",
    "estimate_sensitivity",
    "fit_ess_scale",
    "load_posterior",
    "merge",
    "minimum_bayes_risk",
    "pipeline",
    "posterior_generate",
    "posterior_perplexity",
    "posterior_predict",
    "sample_generations",
    "save_posterior",
]

if TYPE_CHECKING:
    from hf_ivon import merge as merge
    from hf_ivon.calibration import fit_ess_scale
    from hf_ivon.checkpoint import PosteriorFormatError, load_posterior, save_posterior
    from hf_ivon.generation import minimum_bayes_risk, posterior_generate, sample_generations
    from hf_ivon.mixture import Mixture
    from hf_ivon.optim import IVON
    from hf_ivon.pipelines import pipeline
    from hf_ivon.posterior import Posterior
    from hf_ivon.posterior_config import PosteriorConfig
    from hf_ivon.predict import posterior_perplexity, posterior_predict
    from hf_ivon.sensitivity import Sensitivity, estimate_sensitivity
    from hf_ivon.training.arguments import IVONTrainingArguments
    from hf_ivon.training.trainer import IVONTrainer, IVONTrainerMixin


def __getattr__(name: str) -> object:
    if name == "merge":
        return importlib.import_module(f"{__name__}.merge")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
