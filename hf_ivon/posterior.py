"""The posterior over a model's weights: variances by tensor, and what they were learnt with.

The mean is not kept here: it is the model's own weights, in the model's own file. `PosteriorConfig` says which ones.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_ivon import distributed, functional
from hf_ivon.mean import match_problems, mean_digest, posterior_keys
from hf_ivon.posterior_config import PosteriorConfig, library_versions

if TYPE_CHECKING:
    from os import PathLike

    from hf_ivon.optim import IVON

logger = logging.getLogger(__name__)


class Posterior:
    """A diagonal Gaussian over a model's weights, apart from its mean, which is the model.

    Args:
        variance: Variance σ² by tensor name, in its shape, fp32, param². The names are those of the mean's own
            file: parameter names, or for an adapter the names in `adapter_model.safetensors`.
        config: What the variances were learnt with.
    """

    def __init__(self, variance: Mapping[str, Tensor], config: PosteriorConfig) -> None:
        self.variance = dict(variance)
        self.config = config

    def names(self) -> list[str]:
        """Return the tensors' names, sorted."""
        return sorted(self.variance)

    def std(self, name: str) -> Tensor:
        """Return the standard deviation of one tensor, in its shape, param."""
        return self.variance[name].sqrt()

    def precision(self, name: str) -> Tensor:
        """Return the inverse variance of one tensor, in its shape, 1/param²."""
        return self.variance[name].reciprocal()

    def hess(self, name: str) -> Tensor:
        """Return the Hessian estimate of one tensor, in its shape, loss/param² per example."""
        ess, weight_decay = self.config.of("ess", name), self.config.of("weight_decay", name)
        return functional.posterior_hess(self.variance[name], ess=ess, weight_decay=weight_decay)

    def sample(
        self, mean: Mapping[str, Tensor], generator: torch.Generator | None = None, ess_scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Draw weights.

        Args:
            mean: Mean by tensor name; every tensor of the posterior must be there, in its shape.
            generator: Source of the noise, on the CPU; None is torch's global one.
            ess_scale: Factor on the precision: above 1 the posterior is narrower than it was learnt.

        Returns:
            One draw by tensor name, in the dtype and on the device of the mean.

        Raises:
            ValueError: If a tensor is missing or has another shape, or `ess_scale` is not positive.
        """
        self._check(mean, ess_scale)
        return {name: theta for name, theta in self._draw(mean, generator, ess_scale)}

    @contextmanager
    def sampled(
        self, model: nn.Module, generator: torch.Generator | None = None, ess_scale: float = 1.0
    ) -> Generator[nn.Module, None, None]:
        """Put one draw into a model's parameters, in place; on exit they are the mean again, bit for bit.

        Args:
            model: The model that holds the mean; also wrapped by DDP or `torch.compile`, or a PEFT model.
            generator: Source of the noise, on the CPU; None is torch's global one.
            ess_scale: Factor on the precision: above 1 the posterior is narrower than it was learnt.

        Yields:
            The model.

        Raises:
            ValueError: If the model lacks a tensor of the posterior or has it in another shape, or `ess_scale` is not
                positive.
        """
        params = posterior_keys(model)
        self._check(params, ess_scale)
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

    def _check(self, mean: Mapping[str, Tensor], ess_scale: float) -> None:
        if not ess_scale > 0:
            raise ValueError(f"`ess_scale` must be positive, got {ess_scale!r}. 1 is the posterior as it was learnt.")
        if any(distributed.is_sharded(m) for m in mean.values()):
            raise ValueError(
                "The model must be whole to be sampled here, got sharded parameters. Use `sampled_params()` of the "
                "optimizer that trains it, or load the saved model in one process."
            )
        problems = match_problems(self.variance, mean)
        if problems:
            raise ValueError(
                f"The posterior must belong to the model, but {'; '.join(problems)}. Load the model from the "
                f"posterior's own directory."
            )

    def _draw(
        self, mean: Mapping[str, Tensor], generator: torch.Generator | None, ess_scale: float
    ) -> Iterator[tuple[str, Tensor]]:
        """Draw tensor by tensor in the order of names, so that a draw does not depend on the model's device."""
        for name in self.names():
            m = mean[name].detach()
            std = (self.variance[name] / ess_scale).sqrt_()
            noise = torch.randn(std.shape, generator=generator, dtype=std.dtype)
            dtype = torch.promote_types(m.dtype, std.dtype)  # neither a bf16 nor an fp64 mean is rounded by the sum
            yield name, (m.to(dtype) + noise.mul_(std).to(m.device)).to(m.dtype)

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
            o: {k: groups[p][o] for k, p in params.items()} for o in ("ess", "weight_decay", "hess_init")
        }
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
        **options: Any,
    ) -> Posterior:
        """Read and check a posterior, from a directory or from the Hub, where only its own files are downloaded.

        Args:
            name: A directory, or a repository's id.
            model: The model that holds the mean, to check the posterior against; see `load_posterior`.
            options: Those of `hf_ivon.hub.download`, such as `revision`, `subfolder` and `token`.

        Returns:
            The posterior, tensors on the CPU.

        Raises:
            PosteriorFormatError: If anything is wrong with the files.
            OSError: If the repository cannot be reached, or is not there.
        """
        from hf_ivon.checkpoint import load_posterior
        from hf_ivon.hub import download

        return load_posterior(download(name, **options), model)

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


def one_or_all(values: dict[str, float]) -> float | dict[str, float]:
    """Return the value that all names have, or, where they differ, all of them."""
    return next(iter(values.values())) if len(set(values.values())) == 1 else values


def write_back(saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write saved values into parameters; an interrupt in between is raised after all of them are in place."""
    try:
        _write(saved)
    except BaseException:  # writing twice is harmless, half is not
        _write(saved)
        raise
    torch.clear_autocast_cache()


def _write(saved: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for p, mean in reversed(saved):  # of two parameters on one storage, the first was saved before any write
            p.copy_(mean)
