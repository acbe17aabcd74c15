"""The width of a posterior, fitted on held-out or training examples: against a grid, and where nothing can be."""

import json
import math

import pytest
import torch
from torch import nn

from hf_ivon import (
    Mixture,
    Posterior,
    PosteriorConfig,
    fit_ess_scale,
    load_posterior,
    metrics,
    posterior_perplexity,
    posterior_predict,
)
from hf_ivon.calibration import first_sight_loss
from hf_ivon.data import load_batches, load_checkpoint
from hf_ivon.draws import weight_samples
from tests import tiny
from tests.classifiers import classifiers, invoke
from tests.test_predict import posterior_of

__all__ = ["classifiers"]


class Coin(nn.Module):
    """Two classes, whose log-odds are one weight whatever the input is."""

    def __init__(self, log_odds):
        super().__init__()
        self.log_odds = nn.Parameter(torch.tensor([log_odds]))

    def forward(self, x):
        return torch.cat([torch.zeros(len(x), 1), self.log_odds.expand(len(x), 1)], dim=1)


def coin(log_odds, std, share):
    """Return an estimate of a coin, its posterior, and throws of which that share is of the second class."""
    model = Coin(log_odds)
    config = PosteriorConfig(1.0, 0.0, 1.0, None, None, 1, (0.9, 0.99), "ivon-price", "")
    labels = (torch.arange(20) < 20 * share).long()
    return model, Posterior({"log_odds": torch.tensor([std**2])}, config), [{"x": torch.ones(20, 1), "labels": labels}]


def loss_of_samples(model, posterior, data, **sampling):
    """Return the loss of weight samples one by one, averaged."""
    losses = []
    for sample in weight_samples(model, posterior, **sampling):
        with sample:
            losses.append(float(nn.functional.cross_entropy(model(data[0]["x"]), data[0]["labels"])))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("log_odds", "std", "share"), [(6.0, 0.5, 0.8), (3.0, 20.0, 0.8), (3.0, 1.0, 0.95)])
def test_the_fit_is_the_best_of_a_grid(log_odds, std, share):
    """A model that is too sure needs a wider posterior, one with too wide a posterior a narrower one."""
    model, posterior, data = coin(log_odds, std, share)
    mean = model.log_odds.detach().clone()

    def loss(scale):
        found = posterior_predict(model, posterior, data, num_samples=64, seed=3, ess_scale=scale)
        return metrics.negative_log_likelihood(found.probabilities, found.labels)

    grid = [2.0 ** (i / 2) for i in range(-24, 25)]
    found = fit_ess_scale(model, posterior, data, num_samples=64, seed=3)
    assert found == pytest.approx(min(grid, key=loss))
    assert loss(found) <= loss(1.0)
    assert torch.equal(model.log_odds, mean)
    assert fit_ess_scale(model, Mixture([{"log_odds": mean}], [posterior]), data, num_samples=64, seed=3) == found


def test_nothing_is_searched_for_ever():
    """Where the mean is right, narrower is better for ever by less and less; a search to the end would take hours."""
    model, posterior, data = coin(math.log(4.0), 0.1, 0.8)
    tried = []
    model.register_forward_hook(lambda *_: tried.append(1))
    assert fit_ess_scale(model, posterior, data, num_samples=4) >= 1
    assert len(tried) <= 4 * 10


@pytest.mark.parametrize("limit", [0.25, 0.6])
def test_the_fit_on_training_rows_is_the_widest_within_a_loss(limit):
    """Wider by another eighth of a doubling the samples' loss must be above the limit, and at the fit it must not."""
    model, posterior, data = coin(6.0, 1.0, 1.0)

    def loss(scale):
        return loss_of_samples(model, posterior, data, num_samples=8, seed=5, ess_scale=scale)

    found = fit_ess_scale(model, posterior, data, loss=limit, num_samples=8, seed=5)
    assert loss(found) <= limit < loss(found / 2**0.125)
    assert found < 1


def test_where_the_mean_has_a_higher_loss_nothing_is_wide_enough(caplog):
    """A model that has not fitted its rows needs no wider posterior: the mean it is, and the reason is said."""
    model, posterior, data = coin(math.log(4.0), 0.5, 0.8)
    scale = fit_ess_scale(model, posterior, data, loss=0.1, num_samples=4)
    found = posterior_predict(model, posterior, data, num_samples=4, ess_scale=scale)
    at_mean = posterior_predict(model, None, data, num_samples=0)
    torch.testing.assert_close(found.probabilities, at_mean.probabilities, rtol=1e-3, atol=0)
    assert "The model's loss at its mean, 0.5004, is above `loss`, 0.1000" in caplog.text


class Deep(nn.Module):
    """A product of weights, all 1 at the mean, that decides between three classes by the sign of its inputs."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(6, 3))

    def forward(self, x):
        return 5.0 * x * self.weights.prod(dim=0)


def far_too_wide():
    model, labels = Deep(), torch.arange(30) % 3
    config = PosteriorConfig(1.0, 0.0, 1.0, None, None, 1, (0.9, 0.99), "ivon-price", "")
    posterior = Posterior({"weights": torch.full((6, 3), 1e4)}, config)
    return model, posterior, [{"x": nn.functional.one_hot(labels, 3).float(), "labels": labels}]


def test_a_posterior_that_is_far_too_wide_is_narrowed():
    """Its samples are useless, some a little less so: a search that stops there would predict by chance."""
    model, posterior, data = far_too_wide()
    at_mean = metrics.negative_log_likelihood(torch.softmax(model(data[0]["x"]), 1).detach(), data[0]["labels"])
    for scale in (1.0, 1e-3, 100.0):
        found = fit_ess_scale(model, posterior.scaled(scale), data, num_samples=4)
        averaged = posterior_predict(model, posterior.scaled(scale), data, num_samples=4, ess_scale=found)
        assert metrics.negative_log_likelihood(averaged.probabilities, averaged.labels) < at_mean + 0.01
        widest = fit_ess_scale(model, posterior.scaled(scale), data, loss=0.3, num_samples=4)
        assert loss_of_samples(model, posterior.scaled(scale * widest), data, num_samples=4, seed=0) < 0.301
    with pytest.raises(ValueError, match="`loss` must be below that of the widest posterior, got 1000000.0"):
        fit_ess_scale(*coin(6.0, 1e-3, 1.0), loss=1e6, num_samples=2)


def test_widths_that_break_the_model_are_no_error_and_a_broken_model_is():
    """A wide posterior overflows to NaN: that width is bad, and not the model, as the message said."""
    model, posterior, data = far_too_wide()
    wide = Posterior({"weights": torch.full((6, 3), 1e20)}, posterior.config)
    assert posterior_predict(model, wide, data, num_samples=1).probabilities.isnan().any()
    assert fit_ess_scale(model, wide, data, num_samples=2) > 1
    with torch.no_grad():
        model.weights.fill_(float("nan"))
    with pytest.raises(ValueError, match="`model` must give finite predictions, but at its mean some are NaN or inf"):
        fit_ess_scale(model, posterior, data, num_samples=1)


def test_all_components_of_a_mixture_count():
    """A single sample of a mixture is always of the same component: the others would never have been looked at."""
    model, posterior, data = coin(6.0, 1.0, 1.0)
    means = [{"log_odds": torch.tensor([value])} for value in (6.0, 0.5)]
    fits = [
        fit_ess_scale(model, Mixture(order, [posterior, posterior]), data, loss=0.4, num_samples=64)
        for order in (means, means[::-1])
    ]
    assert fits[0] == pytest.approx(fits[1], rel=0.7)  # of 32 draws each, whose losses have long tails
    assert fits[0] > 1.5 * fit_ess_scale(model, posterior, data, loss=0.4, num_samples=64)


def test_language_models_and_what_cannot_be_fitted():
    """Tokens have a likelihood; of numbers it hangs on their noise, which the model does not know."""
    model = tiny.gpt2()
    rows = torch.stack([r["input_ids"] for r in tiny.text(4)])
    data, posterior = [{"input_ids": rows, "labels": rows}], posterior_of(model)
    scale = fit_ess_scale(model, posterior, data, num_samples=2)
    nll = [posterior_perplexity(model, posterior, data, num_samples=2, ess_scale=s)["nll"] for s in (scale, 1.0)]
    assert nll[0] <= nll[1]
    limit = 1.01 * posterior_perplexity(model, posterior, data, num_samples=0)["nll"]
    wide = fit_ess_scale(model, posterior, data, loss=limit, num_samples=1)
    assert posterior_perplexity(model, posterior, data, num_samples=1, ess_scale=wide)["nll"] <= limit
    number = tiny.bert(num_labels=1)
    with pytest.raises(ValueError, match="must predict classes or tokens, got a regression"):
        fit_ess_scale(number, posterior_of(number), [{"input_ids": rows, "labels": torch.ones(4)}], num_samples=1)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        fit_ess_scale(model, posterior, data, num_samples=0)
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`loss` must be positive and finite"):
            fit_ess_scale(model, posterior, data, loss=limit)
    with pytest.raises(ValueError, match="column `label`"):
        fit_ess_scale(tiny.bert(), posterior_of(tiny.bert()), [{"input_ids": rows}], num_samples=1)


def test_the_loss_of_first_sight_is_that_of_half_an_epoch(tmp_path):
    """What was logged later is of rows that were trained on, what was logged first is of a model that knew nothing."""
    with pytest.raises(ValueError, match=r"trainer_state.json is missing in .*. Give the loss itself"):
        first_sight_loss(tmp_path)
    logged = [(0.25, 0.7), (0.5, 0.65), (0.75, 0.6), (1.0, 0.5), (1.25, 0.1)]
    history = [{"epoch": epoch, "loss": loss} for epoch, loss in logged] + [{"epoch": 1.0, "eval_loss": 9.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert first_sight_loss(tmp_path) == pytest.approx(0.55)
    # The average of a whole epoch begins too early, and some entries have no numbers.
    history = [{"epoch": None, "loss": 0.1}, {"epoch": 0.7, "loss": None}, {"epoch": 1.0, "loss": 0.6}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    with pytest.raises(ValueError, match=r"trainer_state.json has no loss of steps in the second half of the first"):
        first_sight_loss(tmp_path)


def test_the_command_fits_on_rows_of_their_own(classifiers):
    """The width must be chosen on the rows that are for it, and used for the others; a number beside it is refused."""
    start = ["evaluate", classifiers / "films", "--data", classifiers / "films.jsonl", "--num-samples", 3]
    result = invoke(*start, "--ess-scale-data", classifiers / "books.jsonl", "--output", classifiers / "fit.json")
    assert result.exit_code == 0, result.output
    scale = json.loads((classifiers / "fit.json").read_text())["ess_scale"]
    model, tokenizer = load_checkpoint(classifiers / "films")
    books = load_batches(classifiers / "books.jsonl", model, tokenizer)
    assert scale == fit_ess_scale(model, load_posterior(classifiers / "films", model), books, num_samples=3)
    assert f"ess_scale {scale:.4g}, fitted to {classifiers / 'books.jsonl'}\n" in result.stdout
    again = invoke(*start, "--ess-scale", scale)
    assert again.stdout.endswith(result.stdout.partition("books.jsonl\n")[2])
    fitted = fit_ess_scale(model, load_posterior(classifiers / "films", model), books, loss=1.0, num_samples=3)
    limit = ("--ess-scale-loss", 1.0)
    result = invoke(*start, *limit, "--ess-scale-data", classifiers / "books.jsonl")
    assert f"ess_scale {fitted:.4g}, fitted to" in result.stdout
    history = [{"epoch": 0.5, "loss": 9.0}, {"epoch": 1.0, "loss": 2.0}]
    (classifiers / "films" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    auto = invoke(*start, "--ess-scale-loss", "auto", "--ess-scale-data", classifiers / "books.jsonl")
    assert f"ess_scale {fitted:.4g}, fitted to" in auto.stdout
    wrong = invoke(*start, "--ess-scale-loss", "half", "--ess-scale-data", classifiers / "books.jsonl")
    assert "`ess_scale_loss` must be a number or auto, got 'half'" in wrong.output
    assert "`ess_scale_loss` must come with `ess_scale_data`" in invoke(*start, *limit).output
    result = invoke(*start, "--ess-scale-data", classifiers / "books.jsonl", "--ess-scale", 0.5)
    assert result.exit_code == 2
    assert "`ess_scale` must be left out where it is fitted to `ess_scale_data`" in result.output
