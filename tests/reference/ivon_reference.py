"""IVON written line by line from Algorithm 1 of arXiv:2402.17641, slowly, in fp64, with the noise as an argument."""

import math

import torch


class Reference:
    """One parameter tensor. Line numbers are those of Algorithm 1."""

    def __init__(self, weights, *, lr, ess, hess_init, beta1, beta2, weight_decay, clip_radius, rescale_lr, debias,
                 hess_approx="price", prior_mean=None):  # fmt: skip
        self.m = weights.double().clone()
        self.h = torch.full_like(self.m, hess_init)
        self.g = torch.zeros_like(self.m)
        self.t = 0
        self.ess, self.delta = ess, weight_decay
        self.beta1, self.beta2 = beta1, beta2
        self.xi, self.debias, self.hess_approx = clip_radius, debias, hess_approx
        self.m0 = torch.zeros_like(self.m) if prior_mean is None else prior_mean.double()
        # "Optional" line, omitted when clipping is used (Section 3, trick 5)
        self.lr = lr * (hess_init + weight_decay) if rescale_lr and math.isinf(clip_radius) else lr

    @property
    def sigma2(self):
        return 1 / (self.ess * (self.h + self.delta))  # line 8

    def step(self, grads, noises, average):
        """Take a step from gradients at m + noise: averaged over samples, or summed over weighted micro-batches."""
        divisor = len(grads) if average else 1
        grads = [grad.double() for grad in grads]
        g_hat = sum(grads) / divisor  # line 2
        if self.hess_approx == "price":
            h_hat = sum(g * n.double() / self.sigma2 for g, n in zip(grads, noises, strict=True)) / divisor  # line 3
        elif average:
            h_hat = sum(g**2 for g in grads) / divisor  # Appendix B.2
        else:
            h_hat = g_hat**2
        self.t += 1
        self.g = self.beta1 * self.g + (1 - self.beta1) * g_hat  # line 4
        self.h = (
            self.beta2 * self.h
            + (1 - self.beta2) * h_hat
            + 0.5 * (1 - self.beta2) ** 2 * (self.h - h_hat) ** 2 / (self.h + self.delta)
        )  # line 5
        g_bar = self.g / (1 - self.beta1**self.t) if self.debias else self.g  # line 6
        direction = (g_bar + self.delta * (self.m - self.m0)) / (self.h + self.delta)
        self.m = self.m - self.lr * direction.clamp(-self.xi, self.xi)  # line 7, with the clip of trick 4
