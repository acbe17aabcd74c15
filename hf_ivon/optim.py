"""IVON as a `torch.optim.Optimizer`: weight samples, options, the step and its state.

The mathematics stands in `hf_ivon.functional`; what the gradient hooks see, and how several contexts make one step,
in `hf_ivon.capture`.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_ivon import functional, windows
from hf_ivon.capture import GradientCapture
from hf_ivon.execution import Execution
from hf_ivon.interrupts import interrupts_deferred
from hf_ivon.options import check_group, check_options, ess_of, group_of, is_squared, plain_numbers, run_alike
from hf_ivon.roster import Roster
from hf_ivon.sampling import Draw, Noise, WeightSampler, prediction_noise, training_noise
from hf_ivon.state import complete_state, match_saved_state, own_storage, restore_precision, set_prior_means
from hf_ivon.statistics import posterior_statistics
from hf_ivon.updates import Entry, apply_updates

logger = logging.getLogger(__name__)


class IVON(torch.optim.Optimizer):
    r"""Improved Variational Online Newton: learns a Gaussian over the weights at about AdamW's cost.

    Outside of `sampled_params` the parameters are the posterior mean. A training step samples, runs forward and
    backward, and steps::

        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
        optimizer.step()

    Several contexts before one `step` are averaged if each zeroes the gradients inside (Monte-Carlo samples), and
    summed if the gradients add up (gradient accumulation; the losses carry the weights).

    Args:
        params: Parameters or groups of them, which share `hess_approx`, `low_memory`, `foreach` and `fused`.
        lr: Learning rate, at least 0.
        ess: Effective sample size λ, number of training examples (of label tokens for a language model), > 0.
        hess_init: Start value h0 of the Hessian, loss/param² per example, > 0.
        beta1: Decay of the gradient average, in [0, 1).
        beta2: Decay of the Hessian average, in [0, 1).
        weight_decay: Prior precision per example δ, loss/param², at least 0.
        mc_samples: Weight samples a step, at least 1: what `step(closure)` runs; your own contexts are a multiple.
        clip_radius: Element-wise bound ξ of the Newton step, > 0; inf is off.
        rescale_lr: Without clipping, multiply `lr` by ``hess_init + weight_decay``: first steps have the size of `lr`.
        debias: Divide the gradient average by ``1 - beta1**t``.
        hess_approx: ``"price"``, the reparameterization estimator of Equation 3; ``"gradsq"``, the squared gradient of
            the step's batch (Appendix B.2); or ``"fisher"``, that times `batch_size`, averaged with
            `hess_init` as one estimate (make it small, 1e-6): the one that learns within hundreds of steps.
        batch_size: What the loss of a step is an average of, over all processes: examples, or label tokens; > 0. Only
            ``"fisher"`` uses it.
        prior_mean: ``"zero"``; ``"init"``, the weights at the first use; or one tensor per parameter, in order.
        eval_ess_scale: Factor on `ess` for predictions and what is saved, > 0; below 1 is wider than training used.
        momentum_dtype: ``"float32"``, or ``"bfloat16"`` to halve the gradient average; small tensors keep fp32.
        low_memory: As little memory as AdamW: the noise of large fp32 tensors is drawn again and taken off, which
            moves the mean by a sample's rounding, and the Hessian learns at once. For ``"price"`` and one MC sample.
        seed: Seed of the weight noise, which has a generator of its own, in [0, 2**63).
        foreach: Work on small tensors together; None does so.
        fused: Run each pass over memory as one compiled loop, where there is a compiler; None does so for models of
            more than a million trainable weights.

    Raises:
        ValueError: If an option is out of range.

    Source:
        arXiv:2402.17641, Algorithm 1 and Appendix A.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        clip_radius: float = math.inf,
        rescale_lr: bool = True,
        debias: bool = True,
        hess_approx: str = "price",
        batch_size: float = 1.0,
        prior_mean: str | Iterable[Tensor] = "zero",
        eval_ess_scale: float = 1.0,
        momentum_dtype: str = "float32",
        low_memory: bool = False,
        seed: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        given = None if isinstance(prior_mean, str) else list(prior_mean)
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "mc_samples": mc_samples,
            "clip_radius": clip_radius,
            "rescale_lr": rescale_lr,
            "debias": debias,
            "hess_approx": hess_approx,
            "batch_size": batch_size,
            "prior_mean": prior_mean if given is None else "given",
            "eval_ess_scale": eval_ess_scale,
            "momentum_dtype": momentum_dtype,
            "low_memory": low_memory,
            "seed": seed,
            "foreach": foreach,
            "fused": fused,
            "window": 0,  # closed windows; with the seed, the whole random state
        }
        defaults = plain_numbers(defaults)
        check_options(defaults)
        super().__init__(params, defaults)
        self._start()
        if given is not None:
            set_prior_means([p for _, p in self._parameters()], given, self.state)

    def _start(self) -> None:
        """Make what a checkpoint does not hold: sampler and capture, with their buffers."""
        self._execution = Execution(self.defaults["foreach"], self.defaults["fused"])
        self._roster = Roster(packs=self._execution.packs)
        self._sampler = WeightSampler(self._execution, self.defaults.get("low_memory", False))
        self._capture = GradientCapture(self._sampler, squared=is_squared(self.param_groups))
        self._inside = False
        self._eval_draws = 0
        self._warned_dropped = False

    def __getstate__(self) -> dict[str, Any]:
        if self._inside:
            raise RuntimeError(windows.SAVED_INSIDE)
        kept = super().__getstate__()
        return {**kept, "state": defaultdict(dict, {p: own_storage(state) for p, state in self.state.items()})}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a deep copy; the hooks belong to the original and are made anew."""
        super().__setstate__(state)
        if not hasattr(self, "_capture"):
            self._start()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, also in the middle of training.

        Args:
            param_group: `params`, and any option of this class for them; `prior_mean` may be tensors, in order.

        Raises:
            ValueError: If an option is out of range, or one that is common to all groups differs.
        """
        given = None
        if not isinstance(param_group.get("prior_mean", "zero"), str):
            given = list(param_group["prior_mean"])
            param_group = {**param_group, "prior_mean": "given"}
        param_group.update(plain_numbers(param_group))
        options = {**self.defaults, **param_group}
        check_group(options, self.param_groups, self.defaults)
        if options["prior_mean"] == "given" and given is None and hasattr(self, "_capture"):
            raise ValueError("`prior_mean` must be given for the new group too. Pass tensors, 'init' or 'zero' in it.")
        if self.param_groups:
            param_group.setdefault("window", self.param_groups[0]["window"])
        super().add_param_group(param_group)
        if given is not None:
            set_prior_means(self.param_groups[-1]["params"], given, self.state)

    @property
    def is_sampled(self) -> bool:
        """Whether the parameters hold a weight sample now, that is, inside `sampled_params`."""
        return self._inside

    @contextmanager
    def sampled_params(
        self, train: bool = False, *, weight: float = 1.0, grad_scale: float | Tensor | None = None
    ) -> Generator[None, None, None]:
        """Put a weight sample into the parameters, in place; on exit they are the mean again, bit for bit by default.

        Args:
            train: Take the gradients of this context into the next `step`. Without it (prediction) they are refused.
            weight: Factor on the gradients of this context, > 0: 1/S for S samples of one loss that add up.
            grad_scale: Loss scale of fp16 training that the gradients carry; float or 0-dim tensor.

        Raises:
            RuntimeError: If called inside another sample, or if the window's gradients have no single meaning.
            ValueError: If `weight` is not positive.
        """
        if self._inside:
            raise RuntimeError("`sampled_params` must not be nested. Leave the outer `with` block first.")
        if not weight > 0:
            raise ValueError(f"`weight` must be positive, got {weight!r}. Pass 1/S for S samples that add up.")
        noise = self._open(train, weight, grad_scale)
        failed = True
        try:
            self._inside = True
            self._perturb(train, noise)
            yield
            failed = False
        finally:
            with interrupts_deferred():
                self._leave(train, failed)

    @torch.inference_mode(False)  # what is made in a prediction is trained with later
    def _open(self, train: bool, weight: float, grad_scale: float | Tensor | None) -> Noise:
        """Look up the parameters and begin a context; returns which noise it has."""
        self._roster.refresh(self.param_groups, self.state)
        if not train:
            self._eval_draws += 1
            return prediction_noise(self._eval_draws)
        self._capture.attach(self._roster.trained)
        if self._capture.begin(weight=weight, grad_scale=grad_scale):
            self._advance_window()
        return training_noise(self._capture.entered)

    @torch.inference_mode(False)
    def _perturb(self, train: bool, noise: Noise) -> None:
        """Put the sample with this noise into the parameters."""
        singles = [(index, group, p) for index, group, p in self._roster.singles if p.requires_grad]
        self._complete([(group, p) for _, group, p in singles])
        draws = [Draw(p, group, self.state[p], noise.key(group, p), index) for index, group, p in singles]
        with interrupts_deferred():
            self._sampler.perturb({pack: noise.key(pack.group) for pack in self._roster.packs}, draws, train)

    def _leave(self, train: bool, failed: bool) -> None:
        """Put the means back; whatever is raised meanwhile, the optimizer is outside afterwards."""
        try:
            if train and not failed:
                failed = True
                self._capture.take_products()
                failed = False
        finally:
            try:
                self._sampler.restore()
            finally:
                self._inside = False
                if train:
                    self._capture.end(failed)

    def _advance_window(self) -> None:
        self._eval_draws = 0
        for group in self.param_groups:
            group["window"] += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; inside a training context this marks its window as averaged.

        Args:
            set_to_none: Release the gradients instead of writing zeros.

        Raises:
            RuntimeError: If the context has gradients already, on top of those of earlier contexts.
        """
        if self._capture.zero_grad(set_to_none, self._mc_samples()):
            self._advance_window()
            if not self._inside and not self._warned_dropped:
                self._warned_dropped = True
                logger.warning(windows.DROPPED)
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update mean and Hessian from the gradients of this window's contexts.

        Args:
            closure: Zeroes the gradients, runs forward and backward, and returns the loss. It is run at `mc_samples`
                weight samples; without it the contexts are yours.

        Returns:
            The closure's loss, averaged over the samples; None without closure.

        Raises:
            RuntimeError: If gradients were taken at the mean or in contexts that do not fit together, or if called
                inside a sample.
        """
        if self._inside:
            raise RuntimeError("`step()` must not be called inside `sampled_params`. Leave the `with` block first.")
        loss = None if closure is None else self._run_closure(closure)
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params:
            return loss
        if not self._capture.captured and all(float(group["lr"]) == 0.0 for group in self.param_groups):
            # torch.distributed.checkpoint steps once with lr=0 and zero gradients to have the state allocated.
            self._complete([(group, p) for group, p in self._parameters() if p.grad is not None])
            return loss
        self._capture.check(params, self.param_groups, self._mc_samples())
        self._capture.reduce([p for _, p in self._parameters() if p.requires_grad])
        self._roster.refresh(self.param_groups, self.state)
        singles = [(group, p) for _, group, p in self._roster.singles if p.grad is not None]
        self._complete(singles, again=True)
        entries = [Entry(p, group, self.state[p]) for group, p in singles]
        apply_updates(self._roster.packs, entries, self._capture, self._sampler, self._execution)
        self._capture.finish(params)
        self._advance_window()
        return loss

    def _run_closure(self, closure: Callable[[], Any]) -> Any:
        losses = []
        for _ in range(self._mc_samples()):
            with torch.enable_grad(), self.sampled_params(train=True):
                losses.append(closure())
        return windows.average_loss(losses, self._capture.averaged)

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield group, p

    def _mc_samples(self) -> int:
        return max(group["mc_samples"] for group in self.param_groups)

    def _state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        self._complete([(group, p)])
        return self.state[p]

    def _complete(self, params: Sequence[tuple[Mapping[str, Any], Tensor]], again: bool = False) -> None:
        """Complete the state of parameters, with their means as `WeightSampler.follow` has them."""
        for group, p in params:
            complete_state(p, group, self.state[p])
        self._sampler.follow({p: self.state[p] for _, p in params}, again)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a bit-exact continuation needs, beside the parameters themselves.

        Raises:
            RuntimeError: If called inside `sampled_params`: the parameters to save with it would be a sample. Copies
                and pickles of the optimizer are refused there too.
        """
        if self._inside:
            raise RuntimeError(windows.SAVED_INSIDE)
        saved = super().state_dict()
        return {**saved, "state": {i: own_storage(state) for i, state in saved["state"].items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; tensors keep full precision, whatever the parameters' dtype.

        As with every torch optimizer the options become those of the state, but for how passes are run.

        Args:
            state_dict: A state of this class, for parameters of the same number, order and shapes.

        Raises:
            RuntimeError: If called inside `sampled_params`.
            ValueError: If the state is another optimizer's, or does not fit this one; nothing is changed then.
        """
        if self._inside:
            raise RuntimeError("`load_state_dict()` must not be called inside `sampled_params`. Leave the block.")
        saved = match_saved_state((p for _, p in self._parameters()), state_dict)
        super().load_state_dict({**state_dict, "param_groups": run_alike(state_dict["param_groups"], self.defaults)})
        restore_precision(self.state, saved)
        self._capture.clear()
        self._capture.squared = is_squared(self.param_groups)
        self._sampler.written.clear()
        self._eval_draws = 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def posterior_mean(self, p: Tensor) -> Tensor:
        """Return the posterior mean of one parameter, shape of `p`, fp32 (fp64 for fp64 parameters)."""
        if self._sampler.holds_sample(p):
            return self._sampler.mean(p)
        return self._state(p, group_of(p, self.param_groups)).get("mean", p.detach()).clone()

    @torch.inference_mode(False)
    @torch.no_grad()
    def posterior_variance(self, p: Tensor) -> Tensor:
        """Return the posterior variance of one parameter, shape of `p`, fp32 (fp64 for fp64 parameters), param²."""
        group = group_of(p, self.param_groups)
        hess = self._state(p, group)["hess"]
        return functional.posterior_variance(hess, ess=ess_of(group, train=False), weight_decay=group["weight_decay"])

    @torch.inference_mode(False)
    def statistics(self, max_elements: int = 1_000_000) -> dict[str, float]:
        """Return a summary of the posterior for logging, from an even subset of at most about `max_elements` weights.

        Args:
            max_elements: Most weights to look at; the cost does not grow with the model beyond it.

        Returns:
            Quantiles (1%, 50%, 99%) of the standard deviation in training (param) and of `hess` over `hess_init`,
            `snr_share` (share of weights with |mean| > sigma) and `clipped_share` (share cut in the last step).

        Raises:
            RuntimeError: If called inside `sampled_params`.
        """
        if self._inside:
            raise RuntimeError("`statistics()` must not be called inside `sampled_params`. Leave the block first.")
        entries = [(group, p, self._state(p, group)) for group, p in self._parameters() if p.requires_grad]
        return posterior_statistics(entries, max_elements)
