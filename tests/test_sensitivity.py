"""Sensitivity to training examples: independent formulas, models fitted anew without the example, and the command."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from hf_ivon import Posterior, PosteriorConfig, estimate_sensitivity
from hf_ivon.mean import mean_digest
from tests import tiny
from tests.classifiers import classifiers, invoke

__all__ = ["classifiers"]

DELTA = 0.1


def posterior_for(model, variance, ess=50.0, num_examples=50):
    """A posterior of given variances by name."""
    config = PosteriorConfig(
        ess=ess, weight_decay=DELTA, hess_init=1.0, num_examples=num_examples, num_tokens=None, steps=1,
        betas=(0.9, 0.99), estimator="ivon-price", mean_digest=mean_digest(dict(model.named_parameters())),
    )  # fmt: skip
    return Posterior(variance, config)


class Net(nn.Module):
    """Two layers, so that the outputs are not linear in the weights."""

    def __init__(self, outputs=3):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, outputs)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def random_variance(model):
    generator = torch.Generator().manual_seed(1)
    return {n: 0.01 + 0.1 * torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def data(num=6, outputs=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num, 4, generator=generator)
    y = torch.randint(outputs, (num,), generator=generator) if outputs > 1 else torch.randn(num, generator=generator)
    return x, y, [{"x": a, "labels": b} for a, b in zip(x.split(4), y.split(4), strict=True)]


@pytest.mark.parametrize("outputs", [1, 3])
def test_it_is_variance_times_error(outputs):
    """Appendix C.6, with the whole Jacobian: V = J diag(sigma^2) J^T, times the gradient by the outputs."""
    model, (x, y, batches) = Net(outputs), data(outputs=outputs)
    variance = random_variance(model)
    found = estimate_sensitivity(model, posterior_for(model, variance), batches)
    params = {n: p.detach() for n, p in model.named_parameters()}
    scale = torch.cat([variance[n].flatten() for n in params])
    for i in range(len(x)):

        def outputs_of(p, i=i):
            return torch.func.functional_call(model, p, (x[i : i + 1],))[0]

        rows = torch.func.jacrev(outputs_of)(params)
        jacobian = torch.cat([rows[n].flatten(1) for n in params], dim=1)
        matrix = (jacobian * scale) @ jacobian.T
        f = outputs_of(params).clone().requires_grad_()
        loss = nn.functional.cross_entropy(f, y[i]) if outputs > 1 else (f[0] - y[i]).square()
        change = matrix @ torch.autograd.grad(loss, f)[0]
        left_out = f.detach() + change
        expected = nn.functional.cross_entropy(left_out, y[i]) if outputs > 1 else (left_out[0] - y[i]).square()
        near = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(found.outputs[i], f.detach(), **near)
        torch.testing.assert_close(found.change[i], change, **near)
        torch.testing.assert_close(found.variance[i], matrix.diagonal(), **near)
        torch.testing.assert_close(found.score[i], change.abs().sum(), **near)
        torch.testing.assert_close(found.loss[i], loss.detach(), **near)
        torch.testing.assert_close(found.loo_loss[i], expected, **near)


def test_linear_regression_without_an_example():
    """With orthogonal inputs the Hessian is diagonal; the model without an example is known: (X'X + D)^-1 X'y.

    The estimate is its first-order term: with leverage v the true change is that divided by 1 - v.
    """
    n, width = 64, 4
    x = torch.linalg.qr(torch.randn(n, width, generator=torch.Generator().manual_seed(0)))[0] * n**0.5
    y = x @ torch.tensor([1.0, -2.0, 0.5, 3.0]) + torch.randn(n, generator=torch.Generator().manual_seed(1))

    def fit(rows):
        # Of the squared error's average over all n, and the prior's half of delta times the square.
        hess = 2 * x[rows].T @ x[rows] / n + DELTA * torch.eye(width)
        return torch.linalg.solve(hess, 2 * x[rows].T @ y[rows] / n)

    model = nn.Sequential(nn.Linear(width, 1, bias=False))
    everything = torch.arange(n)
    with torch.no_grad():
        model[0].weight.copy_(fit(everything)[None])
    # lambda is not n: the temperature of the posterior must make no difference.
    variance = {"0.weight": torch.full((1, width), 1 / (7.0 * (2.0 + DELTA)))}
    posterior = posterior_for(model, variance, ess=7.0, num_examples=n)
    found = estimate_sensitivity(model, posterior, [{"input": x, "labels": y}])
    for i in range(n):
        true = x[i] @ fit(everything[everything != i]) - x[i] @ fit(everything)
        leverage = float(2 * x[i].square().sum() / (n * (2.0 + DELTA)))
        assert float(found.change[i, 0]) == pytest.approx(float(true) * (1 - leverage), rel=1e-3, abs=1e-5)
    exact = torch.stack([(x[i] @ fit(everything[everything != i]) - y[i]).square() for i in range(n)])
    assert found.summary()["loss"] < found.summary()["loo_loss"] < float(exact.mean())
    assert found.summary()["loo_loss"] == pytest.approx(float(exact.mean()), rel=0.02)


def test_wrong_labels_stand_out():
    """The use of it: of a classifier's training examples those with a wrong label must have high scores."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 4, generator=generator)
    y = (x.sum(1) > 0).long()
    wrong = torch.randperm(200, generator=generator)[:10]
    wrong = wrong[x[wrong].sum(1).abs() > 1.0]  # nobody could tell those near the border
    y[wrong] = 1 - y[wrong]
    model = nn.Sequential(nn.Linear(4, 2))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss = loss + 0.5 * DELTA * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    variance = {n: torch.full(p.shape, 1 / (200 * (0.2 + DELTA))) for n, p in model.named_parameters()}
    found = estimate_sensitivity(model, posterior_for(model, variance, 200.0, 200), [{"input": x, "labels": y}])
    right = torch.ones(200, dtype=torch.bool)
    right[wrong] = False
    assert float((found.score[wrong][:, None] > found.score[right]).double().mean()) > 0.9  # the area under the ROC
    summary = found.summary()
    assert summary["loo_loss"] > summary["loss"]
    assert summary["loo_accuracy"] <= summary["accuracy"]


def test_sequences_are_followed_by_their_loss():
    """A language model's examples are whole texts, whatever pads them; their loss counts tokens with a label.

    A text without one must neither be an error, after hours, nor weigh anything.
    """
    model = tiny.gpt2()
    variance = random_variance(model)
    posterior = posterior_for(model, variance)
    posterior = Posterior(variance, dataclasses.replace(posterior.config, num_tokens=100, ess=25.0))
    ids = torch.randint(3, tiny.VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7])
    labels = torch.where(mask.bool(), ids, -100)
    labels[0, 2] = -100
    labels[2] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = estimate_sensitivity(model, posterior, [batch])
    assert found.num_tokens.tolist() == [5.0, 3.0, 0.0]
    assert [column[2].item() for column in (found.score, found.loss, found.loo_loss)] == [0.0, 0.0, 0.0]
    model.eval()
    for i, length in enumerate((7, 4)):
        model.zero_grad()
        own = {"input_ids": ids[i : i + 1, :length], "labels": labels[i : i + 1, :length]}
        loss = model(**own).loss * found.num_tokens[i]
        loss.backward()
        expected = sum((variance[n] * 25 / 100 * p.grad.square()).sum() for n, p in model.named_parameters())
        assert float(found.loss[i]) == pytest.approx(float(loss), rel=1e-4)
        assert float(found.score[i]) == pytest.approx(float(expected), rel=1e-4)
    total = float(found.loss.sum() + found.score.sum())
    assert found.summary() == {
        "loss": pytest.approx(float(found.loss.sum()) / 8),
        "loo_loss": pytest.approx(total / 8),
    }


def test_the_model_is_left_as_it_was():
    """Frozen parameters would be trained from then on, and gradients or the mode be other ones."""
    model, (_, _, batches) = Net(), data()
    model.first.weight.requires_grad_(False)
    model.train()
    estimate_sensitivity(model, posterior_for(model, random_variance(model)), batches)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_examples": None}, "how many examples it was trained on"),
        ({"labels": None}, "must have `labels`, got none"),
        ({"labels": torch.full((6,), 3)}, "one class of 3 per example, got \\[3\\]"),
        ({"outputs": 2, "labels": torch.full((6,), 2)}, "one class of 2 per example, got \\[2\\]"),
        ({"data": []}, "at least one example with a label"),
        ({"variance": {"other": torch.ones(1)}}, "lacks `other`"),
    ],
)
def test_what_cannot_be_estimated_is_refused(change, message):
    """Each would end in a traceback that does not say what to do, or in a wrong number."""
    model, (x, _, batches) = Net(change.get("outputs", 3)), data()
    posterior = posterior_for(
        model, change.get("variance", random_variance(model)), num_examples=change.get("num_examples", 50)
    )
    if "labels" in change:
        labels = change["labels"]
        batches = [{"x": x} if labels is None else {"x": x, "labels": labels}]
    with pytest.raises(ValueError, match=message):
        estimate_sensitivity(model, posterior, change.get("data", batches))


def test_the_command(classifiers):
    """Rows must be those of the file, though examples are sorted by length and chosen at random."""
    output = classifiers / "numbers" / "films.jsonl"
    start = ["sensitivity", classifiers / "films", "--data", classifiers / "films.jsonl"]
    result = invoke(*start, "--output", output, "--plots", classifiers, "--max-examples", 8, "--top", 3)
    assert result.exit_code == 0, result.output
    written = [json.loads(line) for line in output.read_text().splitlines()]
    rows = [json.loads(line) for line in (classifiers / "films.jsonl").read_text().splitlines()]
    assert len({row["row"] for row in written}) == 8
    for row in written:
        assert (row["text"], row["label"]) == ([rows[row["row"]]["text"]], rows[row["row"]]["label"])
    scores = [row["sensitivity"] for row in written]
    scaled = classifiers / "scaled.jsonl"
    assert invoke(*start, "--output", scaled, "--max-examples", 8, "--ess-scale", 4).exit_code == 0
    quarters = [row["sensitivity"] for row in map(json.loads, scaled.read_text().splitlines())]
    assert quarters == pytest.approx([score / 4 for score in scores], rel=1e-4)
    assert scores == sorted(scores, reverse=True)
    assert f"{written[2]['row']:>8}{scores[2]:>13.4g}" in result.output
    assert f"{written[3]['row']:>8}{scores[3]:>13.4g}" not in result.output
    assert (classifiers / "sensitivity.png").stat().st_size > 1000
    everything = classifiers / "all.jsonl"
    assert invoke(*start, "--output", everything).exit_code == 0
    found = {row["row"]: row["sensitivity"] for row in map(json.loads, everything.read_text().splitlines())}
    assert sorted(found) == list(range(12))
    for row in written:
        assert found[row["row"]] == pytest.approx(row["sensitivity"], rel=1e-4)
    result = invoke("sensitivity", classifiers / "films", "--data", classifiers / "none.jsonl")
    assert result.exit_code == 2
    assert "does not exist" in result.output
