"""Several posteriors as one (Multi-IVON), and several plain checkpoints as a deep ensemble."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_ivon.mean import buffer_keys, posterior_keys, weights_lock, write_back
from hf_ivon.posterior import Posterior
from hf_ivon.renamed import tensors_as_loaded
from hf_ivon.tensor_files import TensorFiles, headers


class Mixture:
    """A mixture of Gaussians over a model's weights; without a posterior, a component is a single point.

    Args:
        means: Mean of each component: weights by tensor name, as in the model's own file.
        posteriors: Posterior around each mean, or None.
        weights: Probability of each component; equal ones by default. They are divided by their sum.

    Raises:
        ValueError: If the numbers of components differ, or a weight is not positive.

    Source:
        arXiv:2402.17641, Section 4.2 (Multi-IVON, five runs).
    """

    def __init__(
        self,
        means: Sequence[Mapping[str, Tensor]],
        posteriors: Sequence[Posterior | None],
        weights: Sequence[float] | None = None,
    ) -> None:
        given = [1.0] * len(means) if weights is None else [float(w) for w in weights]
        if not means or not len(means) == len(posteriors) == len(given):
            raise ValueError(
                f"`means`, `posteriors` and `weights` must be one per component, got {len(means)}, {len(posteriors)} "
                f"and {len(given)}. Pass None for a component without a posterior."
            )
        if not all(0 < w < float("inf") for w in given):
            raise ValueError(f"`weights` must be positive numbers, got {given}. Leave out what has no weight.")
        self.means, self.posteriors = list(means), list(posteriors)
        self.weights = [w / sum(given) for w in given]

    @classmethod
    def from_pretrained(
        cls, directories: Sequence[str | PathLike[str]], weights: Sequence[float] | None = None
    ) -> Mixture:
        """Open checkpoints, each with its posterior if it has one; tensors are read when they are used.

        Files in which a model of Transformers has other names than in memory, such as ViT's and Mixtral's, are read
        through the class of the model, once, and kept.

        Args:
            directories: Checkpoint directories of one kind of model, or of adapters of one base.
            weights: Probability of each; equal ones by default.

        Returns:
            The mixture.

        Raises:
            ValueError: If a checkpoint cannot be read.
        """
        from hf_ivon.checkpoint import load_posterior, posterior_files

        means, posteriors = [], []
        for directory in map(Path, directories):
            stem = "adapter_model" if (directory / "adapter_config.json").is_file() else "model"
            problems: list[str] = []
            means.append(TensorFiles(directory, stem, problems))
            if problems:
                raise ValueError(f"The checkpoint {str(directory)!r} cannot be used: {'; '.join(problems)}. Mend it.")
            posteriors.append(load_posterior(directory) if posterior_files(directory) else None)
        return cls(means, posteriors, weights)

    def allocation(self, num_samples: int) -> list[int]:
        """Return which component each of several samples is of, as evenly as the weights allow.

        Args:
            num_samples: Number of samples.

        Returns:
            Component numbers, those of the largest weights first.

        Examples:
            >>> Mixture([{}, {}], [None, None], [3.0, 1.0]).allocation(4)
            [0, 0, 1, 0]
        """
        counts = [0] * len(self.weights)
        order: list[int] = []
        for _ in range(num_samples):  # each sample goes where it is missed most
            missing = [w * (len(order) + 1) - count for w, count in zip(self.weights, counts, strict=True)]
            chosen = max(range(len(missing)), key=missing.__getitem__)
            counts[chosen] += 1
            order.append(chosen)
        return order

    @contextmanager
    def sampled(
        self,
        model: nn.Module,
        generator: torch.Generator | None = None,
        ess_scale: float = 1.0,
        component: int | None = None,
    ) -> Generator[nn.Module, None, None]:
        """Put one draw into a model's parameters, in place; on exit they are what they were, bit for bit.

        So are the buffers that a model's file holds, such as the running statistics of batch normalization.
        Threads that do so with one model take turns, as for `Posterior.sampled`.

        Args:
            model: A model of the components' kind; what it holds does not matter.
            generator: Source of the noise, on the CPU; None is torch's global one.
            ess_scale: Factor on the precision of the components.
            component: Which component; None draws one by its weight.

        Yields:
            The model.

        Raises:
            ValueError: If a component lacks one of the model's parameters or buffers, or has it in another shape.
        """
        with weights_lock(model):
            if component is None:
                component = int(torch.multinomial(torch.tensor(self.weights), 1, generator=generator))
            tensors = self._tensors(model, component)
            posterior, mean = self.posteriors[component], self.means[component]
            saved = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
            try:
                with torch.no_grad():
                    for name, tensor in tensors.items():
                        tensor.copy_(mean[name])
                torch.clear_autocast_cache()
                if posterior is None:
                    yield model
                else:
                    with posterior.sampled(model, generator, ess_scale):
                        yield model
            finally:
                write_back(saved)

    def _tensors(self, model: nn.Module, component: int) -> dict[str, Tensor]:
        """Return the model's tensors that are to be a component's, which must have them all."""
        tensors: dict[str, Tensor] = dict(posterior_keys(model))
        mean = self.means[component]
        if isinstance(mean, TensorFiles) and not mean.entries.keys() >= tensors.keys():
            renamed, _ = tensors_as_loaded(mean.files[0].parent, model)
            self.means[component] = mean = renamed or mean
        there = headers(mean)
        # Of buffers of whole numbers, such as positions and counts, older files may know nothing; they do not differ.
        tensors |= {n: b for n, b in buffer_keys(model).items() if n in there or b.is_floating_point()}
        wrong = [n for n, t in tensors.items() if n not in there or tuple(there[n].shape) != tuple(t.shape)]
        if wrong:
            raise ValueError(
                f"Component {component} must have all parameters and buffers of the model in their shapes, but lacks "
                f"{len(wrong)}, such as `{wrong[0]}`. Load the model from one of the components."
            )
        return tensors
