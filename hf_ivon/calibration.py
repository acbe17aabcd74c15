"""How wide a posterior should be for predictions, fitted on held-out examples."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from hf_ivon.data import is_language_model, metrics_of
from hf_ivon.mean import unwrap
from hf_ivon.predict import posterior_perplexity, posterior_predict

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hf_ivon.mixture import Mixture
    from hf_ivon.posterior import Posterior
    from hf_ivon.predict import Batches

logger = logging.getLogger(__name__)

# What counts as lower, nats: where the mean is the best, narrower is always a little better.
_LEAST = 1e-4
_FARTHEST = 2.0**20


def fit_ess_scale(
    model: nn.Module,
    posterior: Posterior | Mixture,
    data: Batches,
    *,
    num_samples: int = 16,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> float:
    """Find the width of a posterior whose averaged predictions have the lowest negative log-likelihood.

    The search goes from an `ess_scale` of 1 in factors of two while the likelihood gets better, then looks a factor of
    √2 to either side, all with the same noise: some ten averaged predictions of the data.

    Args:
        model: A classifier of one label an example or token, or a causal language model, that holds the mean.
        posterior: The posterior that belongs to the model, or a mixture.
        data: Batches with labels, as for `posterior_predict`, of examples that the model was not trained on: on those
            that it was, the narrowest posterior is the best.
        num_samples: Number of weight samples, at least 1.
        seed: Chooses the weight samples.
        device: Where the batches go; None is the device of the model's first parameter.
        progress: Show a bar for each pass over the data.

    Returns:
        The factor on the posterior's precision, for `ess_scale` of predictions or for `Posterior.scaled`.

    Raises:
        ValueError: If `num_samples` is below 1, the model is a regression, the data has no labels, or as for
            `posterior_predict`.
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}. 16 is usual.")
    losses: dict[float, float] = {}

    def loss(scale: float) -> float:
        if scale not in losses:
            settings = {"num_samples": num_samples, "seed": seed, "ess_scale": scale}
            settings |= {"device": device, "progress": progress}
            if is_language_model(unwrap(model)):
                found = posterior_perplexity(model, posterior, data, **settings)
            else:
                found = metrics_of(posterior_predict(model, posterior, data, **settings))
            if "nll" not in found:
                raise ValueError(
                    "`model` must predict classes or tokens, got a regression, whose likelihood depends on the noise "
                    "of its labels. Compare several values of `ess_scale` yourself."
                )
            losses[scale] = found["nll"] if math.isfinite(found["nll"]) else math.inf
            logger.info("ess_scale=%.3g: negative log-likelihood %.4f.", scale, losses[scale])
        return losses[scale]

    best = 1.0
    for factor in (0.5, 2.0):
        while 1 / _FARTHEST < best < _FARTHEST and loss(best * factor) < loss(best) - _LEAST:
            best *= factor
        if best != 1.0:
            break
    return min((best, best / math.sqrt(2.0), best * math.sqrt(2.0)), key=loss)
