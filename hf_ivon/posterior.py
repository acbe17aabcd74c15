"""The posterior over a model's weights: variances by tensor, and what they were learnt with.

The mean is not kept here: it is the model's own weights, in the model's own file. `PosteriorConfig` says which ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_ivon import distributed, functional
from hf_ivon.mean import match_problems, mean_digest, posterior_keys, weights_lock, write_back
from hf_ivon.options import ess_of
from hf_ivon.parts import Draw, config_of_part, converted, names_below, scaled_config
from hf_ivon.posterior_config import PosteriorConfig, library_versions, one_or_all
from hf_ivon.tensor_files import TensorFiles, headers

if TYPE_CHECKING:
    from os import PathLike

    from hf_ivon.optim import IVON

logger = logging.getLogger(__name__)

_LOG_2PI = math.log(2.0 * math.pi)


class Posterior:
    """A diagonal Gaussian over a model's weights, apart from its mean, which is the model.

    Args:
        variance: Variance σ² by tensor name, in its shape, fp32, param². The names are those of the mean's own
            file: parameter names, or for an adapter the names in `adapter_model.safetensors`.
            Tensors in files, as `load_posterior` finds them, are read when they are used, and not kept.
        config: What the variances were learnt with.

    Attributes:
        is_part: Whether `config.mean_digest` is over more tensors than there are here, after `restrict`.
    """

    def __init__(self, variance: Mapping[str, Tensor], config: PosteriorConfig) -> None:
        self.variance = variance if isinstance(variance, TensorFiles) else dict(variance)
        self.config = config
        self.is_part = False

    def names(self) -> list[str]:
        """Return the tensors' names, sorted."""
        return sorted(self.variance)

    def std(self, name: str) -> Tensor:
        """Return the standard deviation of one tensor, in its shape, param."""
        return self._variance(name).sqrt()

    def precision(self, name: str) -> Tensor:
        """Return the inverse variance of one tensor, in its shape, 1/param²."""
        return self._variance(name).reciprocal()

    def hess(self, name: str) -> Tensor:
        """Return the Hessian estimate of one tensor, in its shape, loss/param² per example."""
        ess, weight_decay = self.config.of("ess", name), self.config.of("weight_decay", name)
        return functional.posterior_hess(self._variance(name), ess=ess, weight_decay=weight_decay)

    def _variance(self, name: str) -> Tensor:
        """Return the variance of one tensor in the precision that it is computed with: fp32, or fp64 if it is that."""
        variance = self.variance[name]
        return variance.to(torch.promote_types(variance.dtype, torch.float32))

    def to(self, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> Posterior:
        """Return the posterior with its variances on another device or in another dtype; draws stay where the mean is.

        Variances in files are all read. Whatever dtype they are kept in, they are computed with in fp32 or fp64, and
        saved in fp32.

        Args:
            device: Where to; None is where they are.
            dtype: A floating-point dtype; None is the one they have. fp16 is too narrow for most posteriors.

        Returns:
            A new posterior.

        Raises:
            ValueError: If `dtype` is not floating-point, or a variance is outside of its normal numbers: it would
                become 0 or inf, or lose most of its digits.
        """
        variance = {
            name: (v if dtype is None else converted(name, v, dtype)).to(device) for name, v in self.variance.items()
        }
        moved = Posterior(variance, self.config)
        moved.is_part = self.is_part
        return moved

    def scaled(self, ess_scale: float) -> Posterior:
        """Return the posterior that predictions with this `ess_scale` are averaged over; variances in files are read.

        Args:
            ess_scale: Factor on λ and so on the precision, > 0; below 1 the result is wider.

        Returns:
            A new posterior with the same Hessian.

        Raises:
            ValueError: If `ess_scale` is not positive and finite.
        """
        if not 0 < ess_scale < math.inf:
            raise ValueError(f"`ess_scale` must be positive and finite, got {ess_scale!r}. 1 changes nothing.")
        scaled = Posterior(
            {name: self._variance(name) / ess_scale for name in self.variance}, scaled_config(self.config, ess_scale)
        )
        scaled.is_part = self.is_part
        return scaled

    def restrict(self, parts: str | Iterable[str], model: nn.Module | None = None) -> Posterior:
        """Return the posterior of a part of the model; its draws leave all other weights at their mean.

        Args:
            parts: Names of tensors, or of modules, which stand for all tensors below them, as in ``"classifier"`` or
                ``["transformer.h.11", "lm_head"]``.
            model: The model that holds the mean, needed only if the part shall be saved: the part then has a digest
                of its own.

        Returns:
            A new posterior on the same tensors or files; nothing is read.

        Raises:
            ValueError: If a name is not there, or `model` does not hold the mean.
        """
        names, digest = names_below(parts, self.names()), self.config.mean_digest
        if model is not None:
            mean = posterior_keys(model)
            problems = match_problems(headers(self.variance), mean)
            if not problems and mean_digest(mean, self.names()) != digest:
                problems.append("its digest is not that of the posterior's mean")
            if problems:
                raise ValueError(
                    f"`model` must hold the mean, but {'; '.join(problems)}. Load it from the posterior's own "
                    f"directory, and restrict the whole posterior, not a part."
                )
            digest = mean_digest(mean, names)
        variance = self.variance
        kept = variance.part(names) if isinstance(variance, TensorFiles) else {n: variance[n] for n in names}
        part = Posterior(kept, config_of_part(self.config, names, digest))
        part.is_part = model is None and (self.is_part or len(names) < len(variance))
        return part

    def sample(
        self, mean: Mapping[str, Tensor], generator: torch.Generator | None = None, ess_scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Draw weights.

        Args:
            mean: Mean by tensor name; every tensor of the posterior must be there, in its shape.
            generator: Source of the noise, on the CPU; None is torch's global one.
            ess_scale: Factor on the precision: above 1 the posterior is narrower than it was saved.

        Returns:
            One draw by tensor name, in the dtype and on the device of the mean.

        Raises:
            ValueError: If a tensor is missing or has another shape, or `ess_scale` is not positive.
        """
        return dict(self.sampled_tensors(mean, generator, ess_scale))

    def sampled_tensors(
        self, mean: Mapping[str, Tensor], generator: torch.Generator | None = None, ess_scale: float = 1.0
    ) -> Iterator[tuple[str, Tensor]]:
        """Draw weights one tensor at a time: the draws of `sample`, without a second copy of the model in memory.

        Args:
            mean: Mean by tensor name, as for `sample`; of a mapping that reads files, such as `TensorFiles`, too, one
                tensor is read at a time.
            generator: Source of the noise, on the CPU; None is torch's global one.
            ess_scale: Factor on the precision: above 1 the posterior is narrower than it was saved.

        Returns:
            Pairs of name and draw, in the order of names.

        Raises:
            ValueError: If a tensor is missing or has another shape, or `ess_scale` is not positive; before any draw.
        """
        self.check_mean(mean, ess_scale)
        return self._draw(mean, generator, ess_scale)

    @contextmanager
    def sampled(
        self, model: nn.Module, generator: torch.Generator | None = None, ess_scale: float = 1.0
    ) -> Generator[nn.Module, None, None]:
        """Put one draw into a model's parameters, in place; on exit they are the mean again, bit for bit.

        Threads that do so with one model take turns. In one thread the contexts may stand inside each other.

        Args:
            model: The model that holds the mean; also wrapped by DDP or `torch.compile`, or a PEFT model.
            generator: Source of the noise, on the CPU; None is torch's global one.
            ess_scale: Factor on the precision: above 1 the posterior is narrower than it was saved.

        Yields:
            The model.

        Raises:
            ValueError: If the model lacks a tensor of the posterior or has it in another shape, or `ess_scale` is not
                positive.
        """
        with weights_lock(model):
            params = posterior_keys(model)
            self.check_mean(params, ess_scale)
            saved: list[tuple[Tensor, Tensor]] = []
            try:
                with torch.no_grad():
                    for name, theta in self._draw(params, generator, ess_scale):
                        p = params[name]
                        saved.append((p, p.detach().clone()))
                        p.copy_(theta)
                torch.clear_autocast_cache()
                yield model
            finally:
                write_back(saved)

    def log_prob(self, weights: Mapping[str, Tensor], mean: Mapping[str, Tensor], ess_scale: float = 1.0) -> float:
        """Return the logarithm of the posterior's density at some weights.

        Args:
            weights: Weights by tensor name, such as `sample` draws them; every tensor of the posterior, in its shape.
            mean: Mean by tensor name, alike.
            ess_scale: Factor on the precision: above 1 the posterior is narrower than it was saved.

        Returns:
            The density's natural logarithm, summed over all weights in fp64.

        Raises:
            ValueError: If a tensor is missing or has another shape, or `ess_scale` is not positive.
        """
        self.check_mean(mean, ess_scale)
        self.check_mean(weights, ess_scale)
        total = 0.0
        with torch.no_grad():
            for name in self.names():
                variance = self._variance(name).double() / ess_scale
                distance = weights[name].to(variance.device).double() - mean[name].to(variance.device).double()
                total += float((distance.square() / variance + variance.log()).sum()) + variance.numel() * _LOG_2PI
        return -0.5 * total

    def check_mean(self, mean: Mapping[str, Tensor], ess_scale: float = 1.0) -> None:
        """Make sure that the posterior belongs to a mean, by names and shapes.

        Args:
            mean: Tensors by name; more than the posterior has is fine.
            ess_scale: Factor on the precision, which must be positive.

        Raises:
            ValueError: If a tensor is missing, sharded or of another shape, or `ess_scale` is not positive.
        """
        if not ess_scale > 0:
            raise ValueError(f"`ess_scale` must be positive, got {ess_scale!r}. 1 is the posterior as it was saved.")
        present = headers(mean)
        if any(distributed.is_sharded(present[name]) for name in present):
            raise ValueError(
                "The model must be whole to be sampled here, got sharded parameters. Use `sampled_params()` of the "
                "optimizer that trains it, or load the saved model in one process."
            )
        problems = match_problems(headers(self.variance), present)
        if problems:
            raise ValueError(
                f"The posterior must belong to the model, but {'; '.join(problems)}. Load the model from the "
                f"posterior's own directory."
            )

    def _draw(
        self, mean: Mapping[str, Tensor], generator: torch.Generator | None, ess_scale: float
    ) -> Iterator[tuple[str, Tensor]]:
        """Draw tensor by tensor in the order of names."""
        draw = Draw([header.shape for header in headers(self.variance).values()], generator)
        for index, name in enumerate(self.names()):
            yield name, draw.tensor(index, mean[name], self._variance(name), ess_scale)

    @classmethod
    def from_optimizer(
        cls,
        optimizer: IVON,
        model: nn.Module,
        *,
        num_examples: int | None = None,
        num_tokens: int | None = None,
        base_model: str | None = None,
        base_revision: str | None = None,
    ) -> Posterior:
        """Take the posterior that an optimizer holds at this moment; if sharded, in all processes at once.

        Args:
            optimizer: The optimizer, outside of `sampled_params`.
            model: The model that it trains.
            num_examples: Number of training examples N.
            num_tokens: Number of label tokens, where the loss averages over tokens.
            base_model: Name or path of the model that training started from.
            base_revision: Its revision.

        Returns:
            The posterior over the model's trainable parameters that the optimizer holds; tensors on the CPU.

        Raises:
            RuntimeError: If called inside `sampled_params`.
            ValueError: If the optimizer holds none of the model's trainable parameters.
        """
        if optimizer.is_sampled:
            raise RuntimeError(
                "The posterior must not be taken inside `sampled_params`. Leave the `with` block first."
            )
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        params = {k: p for k, p in posterior_keys(model).items() if p.requires_grad and p in groups}
        kept = set(params.values())
        if left_out := [k for k, p in model.named_parameters() if p.requires_grad and p in groups and p not in kept]:
            logger.warning(
                "No posterior is kept for %d trained parameters that are not part of the adapter, such as `%s`. Name "
                "their modules in `modules_to_save`.",
                len(left_out),
                left_out[0],
            )
        if not params:
            raise ValueError(
                "The optimizer must hold parameters of the model, got none of them. Pass the trained model."
            )
        variance = {k: distributed.full(optimizer.posterior_variance(p)).float().cpu() for k, p in params.items()}
        by_name: dict[str, dict[str, float]] = {
            o: {k: groups[p][o] for k, p in params.items()} for o in ("weight_decay", "hess_init")
        }
        by_name["ess"] = {k: ess_of(groups[p], train=False) for k, p in params.items()}
        first = optimizer.param_groups[0]
        config = PosteriorConfig(
            ess=one_or_all(by_name["ess"]),
            weight_decay=one_or_all(by_name["weight_decay"]),
            hess_init=one_or_all(by_name["hess_init"]),
            num_examples=num_examples,
            num_tokens=num_tokens,
            steps=int(max((float(optimizer.state[p].get("step", 0)) for p in params.values()), default=0)),
            betas=(first["beta1"], first["beta2"]),
            estimator=f"ivon-{first['hess_approx']}",
            mean_digest=mean_digest(params),
            base_model=base_model,
            base_revision=base_revision,
            versions=library_versions(),
        )
        return cls(variance, config)

    def save_pretrained(self, directory: str | PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write the posterior's files into a directory; see `hf_ivon.checkpoint.save_posterior`."""
        from hf_ivon.checkpoint import save_posterior

        save_posterior(self, directory, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        model: nn.Module | None = None,
        *,
        check_values: bool = False,
        **options: Any,
    ) -> Posterior:
        """Open a posterior, in a directory or from the Hub, where only its own files are downloaded.

        Configuration, names and shapes are checked at once; a tensor is read when it is used, checked when that is for
        the first time, and not kept.

        Args:
            name: A directory, or a repository's id.
            model: The model that holds the mean, to check the posterior against; see `load_posterior`.
            check_values: Read all files once, to check all values and the mean in the directory now; see
                `load_posterior`.
            options: Those of `hf_ivon.hub.download`, such as `revision`, `subfolder` and `token`.

        Returns:
            The posterior, tensors on the CPU.

        Raises:
            PosteriorFormatError: If anything is wrong with the files.
            OSError: If the repository cannot be reached, or is not there.
        """
        from hf_ivon.checkpoint import load_posterior
        from hf_ivon.hub import download

        return load_posterior(download(name, **options), model, check_values=check_values)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload the posterior's files into a repository on the Hub, beside the mean that is there.

        Args:
            repo_id: The repository; made if it does not exist.
            options: Those of `hf_ivon.hub.upload`, such as `private`, `token` and `revision`.

        Returns:
            The Hub client's `CommitInfo`.
        """
        from hf_ivon.hub import upload

        return upload(self, repo_id, **options)
