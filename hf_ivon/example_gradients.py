"""Gradients of single examples: batches taken apart, and the sums of their squared gradients."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_ivon.predict import logits_in, logits_of

logger = logging.getLogger(__name__)

Example = tuple[dict[str, Tensor], Tensor | None]

# What is held of examples that are taken together, in numbers (256 MiB of fp32): gradients, activations and logits.
# And the fewest and most of them: fewer than four are as fast one after another.
_BUDGET = 2**26
_FEWEST, _MOST = 4, 16


def single_examples(data: Iterable[Mapping[str, Any]], device: torch.device) -> Iterator[Example]:
    """Yield examples as batches of one, without what pads them.

    Args:
        data: Batches, each a mapping of the model's arguments.
        device: Where they go.

    Yields:
        The model's arguments for one example, and its labels if there are some.

    Raises:
        ValueError: If a batch holds no tensors beside labels.
    """
    for batch in data:
        # Tensors without dimensions, such as a count, are of no example.
        tensors = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor) and v.dim()}
        labels = tensors.pop("labels", None)
        if not tensors:
            raise ValueError("Each batch must hold tensors of the model's arguments, got none. Check the data.")
        for i in range(len(next(iter(tensors.values())))):
            one = {k: v[i : i + 1] for k, v in tensors.items()}
            target = None if labels is None else labels[i : i + 1]
            mask = one.get("attention_mask")
            if mask is not None and mask.dim() == 2 and not mask.bool().all():
                kept = mask[0].bool()
                if not kept.any():  # a row that fills up a batch
                    continue
                one = {k: v[:, kept] if v.dim() > 1 and v.shape[1] == len(kept) else v for k, v in one.items()}
                if target is not None and target.dim() == 2 and target.shape[1] == len(kept):
                    target = target[:, kept]
            yield one, target


def alike(examples: Iterable[Example], size: Callable[[dict[str, Tensor]], int]) -> Iterator[Example]:
    """Gather examples of equal shapes, which can be a batch without padding.

    Args:
        examples: Batches of one.
        size: From the inputs of one to how many like it a batch may have.

    Yields:
        Batches, each example in one of them.
    """
    waiting: dict[Any, list[Example]] = {}
    for inputs, labels in examples:
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in inputs.items()}
        kind = (tuple(sorted(shapes.items())), None if labels is None else (labels.shape, labels.dtype))
        waiting.setdefault(kind, []).append((inputs, labels))
        if len(waiting[kind]) >= size(inputs):
            yield _stacked(waiting.pop(kind))
    for rest in waiting.values():
        yield _stacked(rest)


def _stacked(examples: list[Example]) -> Example:
    if len(examples) == 1:
        return examples[0]
    inputs = {name: torch.cat([one[name] for one, _ in examples]) for name in examples[0][0]}
    labels = [target for _, target in examples if target is not None]
    return inputs, torch.cat(labels) if labels else None


class SquaredGradients:
    """Sums of squared gradients of single examples, fp32.

    Examples of equal shapes are taken together (`torch.func.vmap`) where what is held of them fits into a memory of
    fixed size, and one after another otherwise, or if the model cannot be vectorised.
    """

    # In two stages, so that a sum of millions does not swallow the next one.
    _STAGE = 1024

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
        """Start at zero.

        Args:
            model: Gives logits, (batch, ...).
            params: What to differentiate by, under any names.
        """
        self._model, self._params = model, params
        own = {p: name for name, p in model.named_parameters()}
        self._names = [own[p] for p in params.values()]
        self._can_vectorise = True
        # Activations and logits for each number of the inputs, by an example that has so many.
        self._held_per_input, self._watched_inputs = 0.0, 0
        self._recent = self._zeros()
        self._earlier: dict[str, Tensor] | None = None
        self._count = 0

    def together(self, inputs: dict[str, Tensor], directions: int = 1) -> int:
        """Return how many examples are taken at once.

        Args:
            inputs: The model's arguments for one such example.
            directions: How many gradients there are of each.
        """
        if not self._can_vectorise or self._is_new(inputs):
            return 1
        gradients = directions * sum(p.numel() for p in self._params.values())
        size = min(int(_BUDGET / max(1.0, gradients + self._held_per_input * _numel(inputs))), _MOST)
        return size if size >= _FEWEST else 1

    def add(self, inputs: dict[str, Tensor], cotangents: Callable[[Tensor], Tensor]) -> None:
        """Add examples.

        Args:
            inputs: The model's arguments, of examples that need no padding.
            cotangents: From logits, (batch, ...), to the vectors that the outputs are differentiated along,
                (directions, batch, ...): the squared gradients of all of them are added up.
        """
        count = len(next(iter(inputs.values())))
        if count == 1:
            logits = self._watched(inputs) if self._is_new(inputs) else self._single(inputs)
            self._add_one(logits, cotangents(logits.detach()))
        else:
            # One at a time in any case: decoders that classify refuse batches where they know no token for padding.
            with torch.no_grad():
                logits = self._vectorised(self._logits, inputs)
                if logits is None:
                    logits = torch.cat([self._single(_rows(inputs, i, 1)) for i in range(count)])
            along = cotangents(logits)
            size = self.together(_rows(inputs, 0, 1), len(along))
            for start in range(0, count, size):
                self._add_rows(_rows(inputs, start, size), along[:, start : start + size])
        self._count += count
        if self._count >= self._STAGE:
            self._earlier, self._recent, self._count = self.sums(), self._zeros(), 0

    def _add_rows(self, inputs: dict[str, Tensor], along: Tensor) -> None:
        grads = self._vectorised(self._gradients, inputs, along.transpose(0, 1))
        if grads is None:
            for i in range(along.shape[1]):
                self._add_one(self._single(_rows(inputs, i, 1)), along[:, i : i + 1])
            return
        for of_direction in grads:
            for name, total in zip(self._names, self._recent.values(), strict=True):
                for grad in of_direction[name].float():
                    total.addcmul_(grad, grad)

    def _is_new(self, inputs: dict[str, Tensor]) -> bool:
        """Tell whether an example is too long to be judged by those before it: what attention holds grows faster."""
        return _numel(inputs) > 2 * self._watched_inputs

    def _single(self, inputs: dict[str, Tensor]) -> Tensor:
        return _of_one(logits_of(self._model, inputs))

    def _watched(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return logits, and note what is held for each number of the inputs until the backward pass."""
        held = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal held
            if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
                held += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = self._single(inputs)
        # The logits come with their softmax, what is drawn from it, and the direction.
        self._watched_inputs = _numel(inputs)
        self._held_per_input = (held + 4 * logits.numel()) / max(1, self._watched_inputs)
        return logits

    def _add_one(self, logits: Tensor, along: Tensor) -> None:
        for i, direction in enumerate(along):
            more = i + 1 < len(along)
            grads = torch.autograd.grad(
                logits, list(self._params.values()), direction.to(logits.dtype), retain_graph=more, allow_unused=True
            )
            for total, grad in zip(self._recent.values(), grads, strict=True):
                if grad is not None:
                    grad = grad.detach().float()
                    total.addcmul_(grad, grad)

    def _logits(self, inputs: dict[str, Tensor], weights: dict[str, Tensor] | None = None) -> Tensor:
        """Return the logits of one example, as a function of weights by the model's own names."""
        one = {name: tensor[None] for name, tensor in inputs.items()}
        return _of_one(logits_in(torch.func.functional_call(self._model, weights or {}, kwargs=one)))[0]

    def _gradients(self, inputs: dict[str, Tensor], along: Tensor) -> list[dict[str, Tensor]]:
        """Return the gradients of one example along each direction."""
        params = {name: p.detach() for name, p in zip(self._names, self._params.values(), strict=True)}
        logits, pull = torch.func.vjp(functools.partial(self._logits, inputs), params)[:2]
        return [pull(direction.to(logits.dtype))[0] for direction in along]

    def _vectorised(self, function: Callable[..., Any], inputs: dict[str, Tensor], *args: Tensor) -> Any:
        """Return what a function gives for all examples, or None if they are to be taken one by one."""
        if not self._can_vectorise or len(next(iter(inputs.values()))) == 1:
            return None
        # Nothing is masked any more. Models ask whether anything is, which vmap cannot answer of what varies.
        varies = {k: 0 if k != "attention_mask" or v.dim() != 2 else None for k, v in inputs.items()}
        inputs = {k: v if varies[k] == 0 else v[0] for k, v in inputs.items()}
        try:
            # Without a graph: parameters that train and are none of these would let it grow with the data.
            with torch.no_grad(), warnings.catch_warnings():
                # Some operations are looped over in C++, which is no news to whoever called this.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return torch.func.vmap(function, in_dims=(varies, *(0 for _ in args)))(inputs, *args)
        except torch.OutOfMemoryError:
            raise
        except Exception as err:  # noqa: BLE001 - an error of the model's own comes again, from a single example
            self._can_vectorise = False
            logger.warning(
                "The gradients of %s are taken one example at a time, as it cannot be vectorised: %s",
                type(self._model).__name__,
                (str(err) or repr(err)).splitlines()[0],
            )
            return None

    def sums(self) -> dict[str, Tensor]:
        """Return the sums so far, by the names of the parameters that were passed."""
        if self._earlier is None:
            return self._recent
        return {name: self._earlier[name] + recent for name, recent in self._recent.items()}

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self._params.items()}


def _rows(inputs: dict[str, Tensor], start: int, count: int) -> dict[str, Tensor]:
    return {name: tensor[start : start + count] for name, tensor in inputs.items()}


def _of_one(logits: Tensor) -> Tensor:
    """Return the logits of one example with an axis for the batch, which some models squeeze away."""
    return logits if logits.dim() and len(logits) == 1 else logits.reshape(1, -1)


def _numel(inputs: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in inputs.values())
