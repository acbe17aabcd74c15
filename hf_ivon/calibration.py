"""How wide a posterior should be for predictions, fitted on held-out examples, or on those of training."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ivon.data import is_language_model, metrics_of
from hf_ivon.draws import weight_samples
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
_FAR_ABOVE = 10 * _LEAST
# Of `ess_scale`: at the one samples are the mean, wider than by the other is not looked for.
_NARROWEST, _WIDEST = 2.0**40, 2.0**-20
_BISECTIONS = 3
# Where the second half of an epoch begins at the earliest, for logs that do not meet its middle.
_FIRST_HALF = 0.4


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
    goes from an `ess_scale` of 1 in factors of two while it gets lower, then looks a factor of √2 to either side. If
    it ends above the mean's, it starts again from the best of widths far apart.

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
        ValueError: If `num_samples` is below 1, `loss` is not positive or met by every width, the model is a
            regression or predicts NaN at its mean, the data has no labels, or as for `posterior_predict`.
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}. 16 is usual.")
    if loss is not None and not 0 < loss < math.inf:
        raise ValueError(f"`loss` must be positive and finite, got {loss!r}. Leave it out for held-out examples.")
    predict = functools.partial(_nll, model, data=data, device=device, progress=progress)

    @functools.cache
    def averaged(scale: float) -> float:
        if loss is None:
            found = predict(posterior, num_samples=num_samples, seed=seed, ess_scale=scale)
        else:
            found = 0.0
            for sample in weight_samples(model, posterior, num_samples=num_samples, seed=seed, ess_scale=scale):
                with sample:
                    found += predict(None, num_samples=0) / num_samples
        logger.info("ess_scale=%.3g: negative log-likelihood %.4f.", scale, found)
        return found

    if not math.isfinite(averaged(_NARROWEST)):
        raise ValueError("`model` must give finite predictions, but at its mean some are NaN or inf. Check the model.")
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
    state = read_json(Path(directory) / "trainer_state.json", problems)
    if state is None:
        raise ValueError(f"{problems[0]} in {str(directory)!r}. Give the loss itself.")
    losses, before = [], 0.0
    for entry in state.get("log_history") or []:
        loss, epoch = entry.get("loss"), entry.get("epoch")
        if isinstance(loss, (int, float)) and isinstance(epoch, (int, float)):
            if before >= _FIRST_HALF and epoch <= 1.0 and math.isfinite(loss):
                losses.append(float(loss))
            before = epoch
    if not losses:
        raise ValueError(
            "trainer_state.json has no loss of steps in the second half of the first epoch. Give the loss itself, or "
            "train with fewer --logging_steps."
        )
    return sum(losses) / len(losses)


def _lowest(loss: Callable[[float], float]) -> float:
    best = _downhill(loss, 1.0)
    if loss(best) > loss(_NARROWEST) + _FAR_ABOVE:
        # Of samples that all are useless some are a little less so: whatever is better than the mean is elsewhere.
        best = _downhill(loss, min((_NARROWEST / 16.0**i for i in range(11)), key=loss))
    return min((best, best / math.sqrt(2.0), best * math.sqrt(2.0)), key=loss)


def _downhill(loss: Callable[[float], float], start: float) -> float:
    best = start
    for factor in (0.5, 2.0):
        while _WIDEST < best <= _NARROWEST and loss(best * factor) < loss(best) - _LEAST:
            best *= factor
        if best != start:
            break
    return best


def _widest(loss: Callable[[float], float], limit: float) -> float:
    if loss(_NARROWEST) > limit:
        logger.warning(
            "The model's loss at its mean, %.4f, is above `loss`, %.4f: predictions at the mean are what is left.",
            loss(_NARROWEST),
            limit,
        )
        return _NARROWEST
    scale = 1.0
    while loss(scale) > limit:
        scale *= 2.0
    while loss(scale / 2.0) <= limit:
        scale /= 2.0
        if scale <= _WIDEST:
            raise ValueError(f"`loss` must be below that of the widest posterior, got {limit!r}. Give a smaller one.")
    factor = 2.0
    for _ in range(_BISECTIONS):
        factor = math.sqrt(factor)
        scale = scale / factor if loss(scale / factor) <= limit else scale
    return scale


def _nll(model: nn.Module, posterior: Posterior | Mixture | None, data: Batches, **settings: Any) -> float:
    """Return the negative log-likelihood; inf where predictions are NaN, as those of too wide a posterior can be."""
    if is_language_model(unwrap(model)):
        found = posterior_perplexity(model, posterior, data, **settings)["nll"]
        return found if math.isfinite(found) else math.inf
    prediction = posterior_predict(model, posterior, data, **settings)
    if prediction.probabilities is None:
        raise ValueError(
            "`model` must predict classes or tokens, got a regression, whose likelihood depends on the noise of its "
            "labels. Compare several values of `ess_scale` yourself."
        )
    if prediction.labels is not None and prediction.probabilities.isnan().any():
        return math.inf
    return metrics_of(prediction)["nll"]
