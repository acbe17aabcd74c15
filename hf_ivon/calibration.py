"""How wide a posterior should be for predictions, fitted on held-out examples, or on those of training."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ivon.data import is_language_model, metrics_of
from hf_ivon.json_files import read_json
from hf_ivon.mean import unwrap
from hf_ivon.predict import posterior_perplexity, posterior_predict

if TYPE_CHECKING:
    from os import PathLike

    import torch
    from torch import nn

    from hf_ivon.mixture import Mixture
    from hf_ivon.posterior import Posterior
    from hf_ivon.predict import Batches

logger = logging.getLogger(__name__)

# What counts as another loss, nats: where the mean is the best, narrower is always a little better.
_LEAST = 1e-4
_FARTHEST = 2.0**20
_BISECTIONS = 3


def fit_ess_scale(
    model: nn.Module,
    posterior: Posterior | Mixture,
    data: Batches,
    *,
    loss: float | None = None,
    num_samples: int = 16,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> float:
    """Find how wide a posterior should be for predictions.

    On held-out examples it is the width whose averaged predictions have the lowest negative log-likelihood: the search
    goes from an `ess_scale` of 1 in factors of two while it gets lower, then looks a factor of √2 to either side.

    On training examples that would be the narrowest. There it can be the widest posterior whose samples have, on
    average, no higher loss than `loss`, to a factor of 2^(1/8). Half of what the training loss was on examples that
    were seen for the first time (`first_sight_loss`) was close to the best width in what was measured
    (recipes/PAPERS.md).

    Either way all widths have the same noise, and some ten averaged predictions of the data are made.

    Args:
        model: A classifier of one label an example or token, or a causal language model, that holds the mean.
        posterior: The posterior that belongs to the model, or a mixture.
        data: Batches with labels, as for `posterior_predict`.
        loss: Nats per example or token, for training examples; None for held-out ones.
        num_samples: Number of weight samples, at least 1.
        seed: Chooses the weight samples.
        device: Where the batches go; None is the device of the model's first parameter.
        progress: Show a bar for each pass over the data.

    Returns:
        The factor on the posterior's precision, for `ess_scale` of predictions or for `Posterior.scaled`.

    Raises:
        ValueError: If `num_samples` is below 1 or `loss` not positive, the model is a regression, the data has no
            labels, or as for `posterior_predict`.
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}. 16 is usual.")
    if loss is not None and not 0 < loss < math.inf:
        raise ValueError(f"`loss` must be positive and finite, got {loss!r}. Leave it out for held-out examples.")
    predict = functools.partial(_nll, model, posterior, data, device=device, progress=progress)

    @functools.cache
    def averaged(scale: float) -> float:
        if loss is None:
            found = predict(ess_scale=scale, num_samples=num_samples, seed=seed)
        else:
            singles = [predict(ess_scale=scale, num_samples=1, seed=seed + i) for i in range(num_samples)]
            found = sum(singles) / num_samples
        logger.info("ess_scale=%.3g: negative log-likelihood %.4f.", scale, found)
        return found

    return _lowest(averaged) if loss is None else _widest(averaged, loss)


def first_sight_loss(directory: str | PathLike[str]) -> float:
    """Return what a Trainer's run had for training loss on examples that it had not been trained on yet.

    Args:
        directory: Holds `trainer_state.json`, as an output directory and its checkpoints do.

    Returns:
        The average of the losses that were logged in the second half of the first epoch, nats.

    Raises:
        ValueError: If the file is missing, or no loss was logged then.
    """
    problems: list[str] = []
    state = read_json(Path(directory) / "trainer_state.json", problems) or {}
    entries = state.get("log_history") or []
    losses = [float(entry["loss"]) for entry in entries if "loss" in entry and 0.5 < entry.get("epoch", 0.0) <= 1.0]
    if not losses:
        problem = problems[0] if problems else "trainer_state.json has no loss of the second half of the first epoch"
        raise ValueError(f"{problem}. Give the loss itself, or train with fewer --logging_steps.")
    return sum(losses) / len(losses)


def _lowest(loss: Callable[[float], float]) -> float:
    best = 1.0
    for factor in (0.5, 2.0):
        while 1 / _FARTHEST < best < _FARTHEST and loss(best * factor) < loss(best) - _LEAST:
            best *= factor
        if best != 1.0:
            break
    return min((best, best / math.sqrt(2.0), best * math.sqrt(2.0)), key=loss)


def _widest(loss: Callable[[float], float], limit: float) -> float:
    scale = 1.0
    while loss(scale) > limit and scale < _FARTHEST:
        if loss(scale) - loss(2.0 * scale) < _LEAST and math.isfinite(loss(scale)):
            return scale  # the mean's own loss is higher: this is the mean
        scale *= 2.0
    while scale > 1 / _FARTHEST and loss(scale / 2.0) <= limit:
        scale /= 2.0
    factor = 2.0
    for _ in range(_BISECTIONS):
        factor = math.sqrt(factor)
        scale = scale / factor if loss(scale / factor) <= limit else scale
    return scale


def _nll(model: nn.Module, posterior: Posterior | Mixture, data: Batches, **settings: Any) -> float:
    if is_language_model(unwrap(model)):
        found = posterior_perplexity(model, posterior, data, **settings)
    else:
        found = metrics_of(posterior_predict(model, posterior, data, **settings))
    if "nll" not in found:
        raise ValueError(
            "`model` must predict classes or tokens, got a regression, whose likelihood depends on the noise of its "
            "labels. Compare several values of `ess_scale` yourself."
        )
    return found["nll"] if math.isfinite(found["nll"]) else math.inf
