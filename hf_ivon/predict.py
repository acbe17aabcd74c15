"""Predictions averaged over the posterior: one pass over the data per weight sample, memory of a single one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from hf_ivon.averaging import ScoreAverage, entropy
from hf_ivon.data import is_language_model
from hf_ivon.draws import check_samples, weight_samples
from hf_ivon.mean import unwrap, weights_lock

if TYPE_CHECKING:
    from hf_ivon.mixture import Mixture
    from hf_ivon.posterior import Posterior

    Batches = DataLoader | Iterable[Mapping[str, Any]]

_IGNORED = -100  # the label of tokens that the loss leaves out, as in Transformers
_LOOKED_AT = 256  # numbers of each row that passes over the data are compared by


@dataclass(frozen=True)
class Prediction:
    """What a model predicts on average over its posterior. Rows are examples, or tokens, in the order of the data.

    Args:
        num_samples: Number of weight samples that were averaged; 0 is a prediction at the mean.
        labels: The data's labels, (N,), None if it has none.
        probabilities: Class probabilities, (N, C), fp64, averaged over weight samples; None for regression.
        prediction_mean: Regression: average over weight samples, (N,), fp64, unit of the labels.
        prediction_variance: Regression: variance over weight samples (divided by their number), (N,), fp64, squared
            unit of the labels. It is what the uncertainty about the weights adds; noise of the labels is not in it.
            0 at the mean.
        expected_entropy: Classification: average over weight samples of the entropy of each one's probabilities, (N,),
            nats.
        variation_ratio: Classification: share of the weight samples whose likeliest class is not the commonest one,
            (N,).
    """

    num_samples: int
    labels: Tensor | None = None
    probabilities: Tensor | None = None
    prediction_mean: Tensor | None = None
    prediction_variance: Tensor | None = None
    expected_entropy: Tensor | None = None
    variation_ratio: Tensor | None = None

    @property
    def entropy(self) -> Tensor:
        """Entropy of the averaged probabilities, (N,), nats: all that is uncertain about the label."""
        return entropy(self._probabilities())

    @property
    def mutual_information(self) -> Tensor:
        """What knowing the weights would tell about the label, (N,), nats: entropy less expected entropy."""
        self._probabilities()
        assert self.expected_entropy is not None  # comes with probabilities
        return (self.entropy - self.expected_entropy).clamp_min(0.0)

    def _probabilities(self) -> Tensor:
        if self.probabilities is None:
            raise ValueError("The prediction must be of classes to have an entropy, got numbers. Use the variance.")
        return self.probabilities


def posterior_predict(
    model: nn.Module,
    posterior: Posterior | Mixture | None,
    data: Batches,
    *,
    num_samples: int,
    tolerance: float = 0.0,
    seed: int = 0,
    ess_scale: float = 1.0,
    device: torch.device | str | None = None,
    progress: bool = False,
    on_sample: Callable[[Prediction], None] | None = None,
) -> Prediction:
    r"""Predict with weights drawn from the posterior, :math:`\frac1S \sum_s p(y | x, \theta_s)`.

    A model with one output is a regression, any other a classification with one label an example, or one label a
    token: then the rows of the result are the tokens whose label is not -100, or, where the data has no labels, the
    tokens that are not masked. The model is evaluated without dropout; afterwards its weights are the mean again, bit
    for bit, and its modes what they were.

    Args:
        model: Gives logits of shape (batch, classes), (batch, tokens, classes) or (batch, 1), as a tensor, the first
            of a tuple, or under `logits`.
        posterior: The posterior that belongs to the model, or a mixture; may be None when `num_samples` is 0.
        data: Batches, each a mapping of the model's arguments; `labels` are kept back from the model. It is read
            once per weight sample, and has to give the same examples in the same order each time.
        num_samples: Number of weight samples; 0 predicts at the mean.
        tolerance: Stop earlier, once two weight samples in a row each move the average by less than this: of
            probabilities the total variation, of numbers the distance, averaged over the examples. 0 takes all.
        seed: Chooses the weight samples.
        ess_scale: Factor on the precision of the posterior, > 0; below 1 it is wider than it was saved.
        device: Where the batches go; None is the device of the model's first parameter.
        progress: Show a bar for each pass over the data.
        on_sample: Called after each weight sample with the average so far, while the model is at its mean.

    Returns:
        The averaged prediction, on the CPU; its `num_samples` says how many were taken.

    Raises:
        TypeError: If a batch is not a mapping.
        ValueError: If `num_samples` is negative, `data` is empty, shuffled or readable only once, labels do not fit,
            or the model is not one for classification or regression.

    Source:
        arXiv:2402.17641, Section 4.2: posterior averaging in the space of probabilities.
    """
    problem = getattr(getattr(unwrap(model), "config", None), "problem_type", None)
    if problem == "multi_label_classification":
        raise ValueError(
            "`model` must predict one label an example, got a model with `problem_type` "
            "'multi_label_classification'. Use `posterior.sampled` and average its probabilities yourself."
        )
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"`tolerance` must be at least 0, got {tolerance!r}. 0 takes all samples, 1e-3 is fine.")
    average: ScoreAverage | None = None
    votes, labels, small = torch.zeros((), dtype=torch.float64), None, 0
    settings: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "ess_scale": ess_scale}
    settings |= {"device": device, "progress": progress}
    for rows, labels in _passes(model, posterior, data, _outputs, **settings):
        regression = rows.shape[1] == 1
        if problem == "regression" and not regression:
            raise ValueError(
                f"`model` must have one output for regression, got {rows.shape[1]}. Use `posterior.sampled` and "
                f"average its outputs yourself."
            )
        average = average or ScoreAverage("none" if regression else "softmax")
        before = average.mean
        average.add(rows)
        votes = votes + nn.functional.one_hot(rows.argmax(dim=1), rows.shape[1])
        moved = (average.mean - before).abs().sum(dim=1).mean() / (1 if regression else 2)
        small = small + 1 if moved < tolerance else 0
        if on_sample is not None:
            on_sample(_prediction(average, votes, labels, num_samples))
        if small == 2:
            break
    assert average is not None  # there is a pass, or it raised
    return _prediction(average, votes, labels, num_samples)


def _prediction(average: ScoreAverage, votes: Tensor, labels: Tensor | None, num_samples: int) -> Prediction:
    taken = average.count if num_samples else 0
    if average.function == "none":
        mean, variance = average.mean[:, 0], average.variance[:, 0]
        return Prediction(taken, labels, prediction_mean=mean, prediction_variance=variance)
    ratio = 1 - votes.amax(dim=1) / average.count
    found = {"probabilities": average.mean, "expected_entropy": average.expected_entropy, "variation_ratio": ratio}
    return Prediction(taken, labels, **found)


def posterior_perplexity(
    model: nn.Module,
    posterior: Posterior | Mixture | None,
    data: Batches,
    *,
    num_samples: int,
    seed: int = 0,
    ess_scale: float = 1.0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, float]:
    r"""Return a causal language model's perplexity, every token's probability averaged over the posterior.

    .. math:: \exp\Big(-\frac1T \sum_t \log \frac1S \sum_s p(y_t | y_{<t}, \theta_s)\Big)

    Labels are as in Transformers: they are the tokens themselves and are shifted here, so that the first position is
    never predicted; -100 leaves a token out. Every other token counts alike, whatever the batches are.

    Args:
        model: Gives logits of shape (batch, length, vocabulary).
        posterior: The posterior that belongs to the model, or a mixture; may be None when `num_samples` is 0.
        data: Batches with `labels` of shape (batch, length), as for `posterior_predict`.
        num_samples: Number of weight samples; 0 predicts at the mean.
        seed: Chooses the weight samples.
        ess_scale: Factor on the precision of the posterior, > 0; below 1 it is wider than it was saved.
        device: Where the batches go; None is the device of the model's first parameter.
        progress: Show a bar for each pass over the data.

    Returns:
        `perplexity`; `nll`, its logarithm, nats per token; `num_tokens`, the number T of predicted tokens.

    Raises:
        TypeError: If a batch is not a mapping.
        ValueError: If `num_samples` is negative, `data` is empty, shuffled, readable only once or without a token to
            predict, or the logits do not fit the labels.
    """
    total = torch.full((), -math.inf, dtype=torch.float64)
    settings: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "ess_scale": ess_scale}
    settings |= {"device": device, "progress": progress}
    for rows, _ in _passes(model, posterior, data, _token_log_probabilities, **settings):
        total = torch.logaddexp(total, rows)
    if not total.numel():
        raise ValueError(
            "`data` must have at least one token to predict, got none. Sequences need two tokens or more, and labels "
            "other than -100."
        )
    nll = math.log(max(num_samples, 1)) - total.mean()
    return {"perplexity": nll.exp().item(), "nll": nll.item(), "num_tokens": total.numel()}


def _passes(
    model: nn.Module,
    posterior: Posterior | Mixture | None,
    data: Batches,
    read: Callable[[nn.Module, dict[str, Any]], tuple[Tensor, Tensor | None]],
    *,
    num_samples: int,
    seed: int,
    ess_scale: float,
    device: torch.device | str | None,
    progress: bool,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield values and labels of the whole data set, once per weight sample; in between the model is at the mean."""
    check_samples(posterior, num_samples, seed)
    _check_data(data)
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    first = None
    samples = weight_samples(model, posterior, num_samples=num_samples, seed=seed, ess_scale=ess_scale)
    for index, weights in enumerate(samples):
        with torch.no_grad(), evaluation_mode(model), weights:
            batches = shown(data, f"weight sample {index + 1} of {num_samples}" if num_samples else "mean", progress)
            parts, checksum = [], 0
            for batch in batches:
                parts.append(read(model, _on_device(batch, device)))
                checksum = _checksum(batch, checksum)
        if not parts:
            raise ValueError("`data` must have at least one batch, got none. Check the data set and its filters.")
        rows = torch.cat([values for values, _ in parts])
        given = [labels for _, labels in parts if labels is not None]
        labels = torch.cat(given) if given else None
        if labels is not None and len(labels) != len(rows):
            raise ValueError(
                f"`data` must have one label per example, got {len(labels)} labels for {len(rows)} examples. "
                f"Give `labels` of shape (batch,) in every batch or in none."
            )
        if first is None:
            first = rows.shape, checksum, labels
        elif (rows.shape, checksum) != first[:2] or not _equal(labels, first[2]):
            raise ValueError(
                "`data` must give the same examples in the same order whenever it is read, got other ones for the "
                "second weight sample. Turn off shuffling and random augmentation."
            )
        yield rows, labels


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _checksum(batch: Mapping[str, Any], before: int) -> int:
    """Return a checksum of a batch's inputs and of those before it; of long rows, only of every so manyth number."""
    for name in sorted(batch):
        value = batch[name]
        if isinstance(value, Tensor) and value.layout == torch.strided:
            rows = value.detach().flatten(1) if value.ndim > 1 else value.detach().reshape(-1, 1)
            rows = rows[:, :: rows.shape[1] // _LOOKED_AT + 1].cpu()
            before = zlib.crc32(rows.reshape(-1).contiguous().view(torch.uint8).numpy().data, before)
    return before


def _check_data(data: Batches) -> None:
    if iter(data) is data:
        raise ValueError(
            f"`data` must be readable once per weight sample, got {type(data).__name__}, which is used up after one. "
            f"Pass a DataLoader or a list of batches."
        )
    sampler = getattr(getattr(data, "batch_sampler", None), "sampler", getattr(data, "sampler", None))
    if isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
        raise ValueError(
            f"`data` must give the same examples in the same order whenever it is read, got a DataLoader that "
            f"shuffles, by a {type(sampler).__name__}. Use `shuffle=False`, or a `Subset` of the data set."
        )


def shown(data: Iterable[Any], title: str, progress: bool, unit: str = "batch") -> Iterable[Any]:
    """Return the data, with a bar of progress if one is wanted."""
    if not progress:
        return data
    from tqdm.auto import tqdm

    return tqdm(data, desc=title, unit=unit, leave=False)


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None, None, None]:
    """Put every module in evaluation mode; on exit each has the mode it had. Other threads' predictions wait."""
    with weights_lock(model):
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _on_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"Each batch of `data` must be a mapping of the model's arguments, got {type(batch).__name__}. Use a "
            f"collator that returns a dict."
        )
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def logits_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Return a model's logits, wherever its output has them; a `ValueError` if it has none."""
    return logits_in(model(**inputs))


def logits_in(outputs: Any) -> Tensor:
    """Return the logits in a model's output; a `ValueError` if there are none."""
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" not in outputs:
        raise ValueError(
            f"`model` must give `logits`, got {', '.join(f'`{name}`' for name in outputs)}. Use `posterior.sampled` "
            f"and work with its outputs yourself."
        )
    return outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]


def _outputs(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Return the outputs, (rows, classes or 1), fp64 on the CPU, and their labels, (rows,)."""
    labels = batch.pop("labels", None)
    logits = logits_of(model, batch)
    logits = logits[:, None] if logits.ndim == 1 else logits
    if logits.ndim == 3 and not is_language_model(unwrap(model)):
        logits, labels = _kept_tokens(logits, labels, batch.get("attention_mask"))
    if logits.ndim != 2:
        raise ValueError(
            f"`model` must give logits of shape (batch, classes) or, to classify tokens, (batch, tokens, classes), "
            f"got {tuple(logits.shape)}. For a language model use `posterior_perplexity`."
        )
    return logits.cpu().double(), None if labels is None else labels.reshape(-1).cpu()


def _kept_tokens(logits: Tensor, labels: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the rows of the tokens that have a label, or without labels of those that are not padding."""
    shape = logits.shape[:2]
    if labels is not None and labels.shape != shape:
        raise ValueError(
            f"`labels` must be one per token, of shape {tuple(shape)}, got {tuple(labels.shape)}. Label tokens that "
            f"do not count {_IGNORED}."
        )
    if labels is not None:
        kept = labels.to(logits.device) != _IGNORED
    else:
        kept = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
    return logits[kept.to(logits.device)], None if labels is None else labels[kept.to(labels.device)]


def _token_log_probabilities(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each label that counts, fp64 on the CPU, and these labels."""
    labels = batch.pop("labels", None)
    if labels is None:
        raise ValueError("Each batch of `data` must have `labels`, got none. For plain text pass the input ids again.")
    logits = logits_of(model, batch)
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"`model` must give logits of shape (batch, length, vocabulary) for `labels` of shape (batch, length), "
            f"got {tuple(logits.shape)} for {tuple(labels.shape)}. Use a causal language model without virtual tokens."
        )
    labels = labels[:, 1:].to(logits.device)
    counted = labels != _IGNORED
    labels = labels[counted]
    nll = nn.functional.cross_entropy(logits[:, :-1][counted].float(), labels, reduction="none")
    return nll.neg().cpu().double(), labels.cpu()
