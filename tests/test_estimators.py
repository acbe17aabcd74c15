"""The Fisher estimator: the average that it makes, what it takes for a batch, and what it converges to."""

import pytest
import torch
from torch import nn

from hf_ivon import IVONTrainer, functional
from hf_ivon.optim import IVON
from hf_ivon.options import check_options
from tests import tiny


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.98])
def test_the_average_is_debiased_and_counts_the_start_once(beta2):
    """A start value that lingers is what the posterior of a short run would consist of."""
    estimates = torch.rand(40, 3, dtype=torch.float64)
    hess = estimates[0]
    for t in range(1, 40):
        hess = functional.average_hess(hess, estimates[t], decay=functional.debiased_decay(beta2, step=t))
        weights = torch.tensor([beta2 ** (t - i) for i in range(t + 1)], dtype=torch.float64)
        expected = (weights[:, None] * estimates[: t + 1]).sum(0) / weights.sum()
        torch.testing.assert_close(hess, expected)


@pytest.mark.parametrize("contexts", [1, 3])
def test_the_step_squares_the_gradient_of_the_whole_batch(contexts):
    """Micro-batches whose squares were summed, or a missing batch size, would make the Hessian too small by a factor.

    The reference takes `p.grad` after every step's backward passes, and no code of the package.
    """
    p = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))
    beta2, batch_size, h0 = 0.9, 12.0, 0.5
    optimizer = IVON([p], lr=0.1, ess=50.0, hess_init=h0, beta2=beta2, hess_approx="fisher", batch_size=batch_size)
    estimates = [torch.full((3,), h0)]
    for t in range(6):
        for _ in range(contexts):
            with optimizer.sampled_params(train=True):
                ((t + 1.0) * p.square().sum() / contexts).backward()
        estimates.append(batch_size * p.grad.square())
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.tensor([beta2 ** (6 - i) for i in range(7)])
    expected = (weights[:, None] * torch.stack(estimates)).sum(0) / weights.sum()
    torch.testing.assert_close(optimizer.state[p]["hess"], expected)


def test_it_converges_to_the_fisher_diagonal():
    """The point of the batch size: without it the Hessian is too small by that factor, and lambda means nothing.

    The relative variance of one estimate is 2 + (kurtosis - 3) / batch_size; a gradient is a product of two normals,
    of kurtosis 9, so that the average of 4,000 estimates is off by sqrt(2.75 / 4,000) = 2.6%; 5 deviations are 13%.
    """
    n, batch_size, steps = 200, 8, 4000
    x = torch.randn(n, 4, dtype=torch.float64) * torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    y = x.sum(1) + torch.randn(n, dtype=torch.float64)
    p = nn.Parameter(torch.linalg.lstsq(x, y).solution)  # where the average gradient is zero
    gradients = (x @ p.detach() - y)[:, None] * x
    optimizer = IVON([p], lr=0.0, ess=1e12, beta2=0.9999999, hess_approx="fisher", batch_size=batch_size)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        chosen = torch.randint(n, (batch_size,), generator=generator)
        with optimizer.sampled_params(train=True):
            (0.5 * (x[chosen] @ p - y[chosen]).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    exact = gradients.square().mean(0)
    assert ((optimizer.state[p]["hess"] / exact - 1).abs() < 0.13).all()


@pytest.mark.parametrize(
    ("model", "data", "settings", "expected"),
    [
        pytest.param(tiny.bert, tiny.sentences, {}, 4.0, id="examples"),
        pytest.param(tiny.bert, tiny.sentences, {"gradient_accumulation_steps": 3}, 12.0, id="accumulation"),
        pytest.param(tiny.bert, tiny.sentences, {"per_device_train_batch_size": 64}, 24.0, id="whole set"),
        pytest.param(tiny.gpt2, tiny.text, {}, 4.0 * (tiny.LENGTH - 1), id="tokens"),
        pytest.param(tiny.bert, tiny.sentences, {"ivon_batch_size": "7"}, 7.0, id="given"),
    ],
)
def test_the_trainer_knows_its_batch_size(tmp_path, model, data, settings, expected):
    """A wrong batch size scales the whole Hessian, silently."""
    args = tiny.arguments(tmp_path, ivon_hess_approx="fisher", **settings)
    trainer = IVONTrainer(model=model(), args=args, train_dataset=data())
    trainer.create_optimizer()
    assert trainer.ivon.param_groups[0]["batch_size"] == expected


def test_a_set_without_length_needs_the_number(tmp_path):
    """It would end in a division by nothing, or in a guess."""

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tiny.sentences())

    args = tiny.arguments(tmp_path, ivon_hess_approx="fisher")
    trainer = IVONTrainer(model=tiny.bert(), args=args, train_dataset=Endless())
    with pytest.raises(ValueError, match=r"`ivon_batch_size` must be a number .*--ivon_batch_size"):
        trainer.create_optimizer()


def test_the_trained_posterior_is_not_the_start(tmp_path):
    """The reason for all this: after a few steps every weight that had a gradient knows something."""
    args = tiny.arguments(tmp_path, ivon_hess_approx="fisher")
    trainer = IVONTrainer(model=tiny.bert(), args=args, train_dataset=tiny.sentences())
    trainer.train()
    hess = torch.cat([trainer.ivon.state[p]["hess"].flatten() for p in trainer.model.parameters()])
    assert ((hess / 0.1 - 1).abs() > 0.1).float().mean() > 0.9
    assert trainer.posterior().config.estimator == "ivon-fisher"


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), True, "many"])
def test_a_batch_size_out_of_range_is_named(value):
    """It would make the Hessian zero, negative or infinite."""
    with pytest.raises(ValueError, match="`batch_size` must be a positive number"):
        check_options({"batch_size": value})
