"""Figures: what they show, that they are files to look at, and that nothing else changes."""

import subprocess
import sys

import matplotlib.figure
import pytest
import torch
from PIL import Image

from hf_ivon.metrics import expected_calibration_error
from hf_ivon.plots import (
    entropy_histograms,
    metric_by_samples,
    posterior_curves,
    reliability_diagram,
    sensitivity_histogram,
    sigma_per_layer,
    trade_offs,
    training_curves,
)
from hf_ivon.posterior import Posterior
from hf_ivon.posterior_config import PosteriorConfig

RUNS = {"AdamW": [(200, 3.5), (100, 4.0)], "IVON": [(100, 4.1), (200, float("nan")), (300, 3.25)]}


@pytest.fixture
def figures(monkeypatch):
    """Every figure that was saved."""
    saved, original = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (saved.append(self), original(self, *a, **k))[1]
    )
    return saved


def posterior_of(**sigmas):
    variance = {name.replace("__", "."): torch.as_tensor(sigma) ** 2 for name, sigma in sigmas.items()}
    return Posterior(variance, PosteriorConfig(1.0, 0.0, 1.0, None, None, 1, (0.9, 0.99), "ivon-price", ""))


def test_curves_show_the_points(tmp_path, figures):
    """Lines would zigzag, lose points or be named wrongly."""
    path = training_curves(RUNS, tmp_path / "new" / "curves.png", ylabel="Perplexity", title="Run")
    (axes,) = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines == {
        "AdamW (last: 3.5)": [[100, 4.0], [200, 3.5]],
        "IVON (last: 3.25)": [[100, 4.1], [300, 3.25]],
    }
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title(loc="left")) == (
        "Optimizer step",
        "Perplexity",
        "Run",
    )
    assert path == tmp_path / "new" / "curves.png"


def test_lines_differ_in_more_than_colour(tmp_path, figures):
    """In a black-and-white print the runs could not be told apart."""
    training_curves({f"run {i}": [(0, i), (1, i)] for i in range(6)}, tmp_path / "curves.png", log_y=True)
    lines = figures[0].axes[0].get_lines()
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 6
    assert len({line.get_color() for line in lines}) == 6


def test_figures_are_opaque_and_white(tmp_path):
    """Dark text on a transparent ground cannot be read on a dark screen."""
    paths = [
        training_curves(RUNS, tmp_path / "curves.png"),
        sigma_per_layer(posterior_of(a__weight=[0.1, 0.2]), tmp_path / "sigma.png"),
    ]
    for path in paths:
        image = Image.open(path).convert("RGBA")
        assert image.getpixel((0, 0)) == (255, 255, 255, 255)
        assert image.getchannel("A").getextrema() == (255, 255)
        assert len(image.getcolors(maxcolors=1_000_000)) > 10


@pytest.mark.parametrize("ending", ["svg", "pdf"])
def test_other_formats(tmp_path, ending):
    """A figure for a paper could not be had as vectors."""
    assert training_curves(RUNS, tmp_path / f"curves.{ending}").stat().st_size > 1000


def test_sigma_is_grouped_by_layer_in_order(tmp_path, figures):
    """Layer 10 would come before layer 2, or a range would mix layers."""
    sigma = torch.linspace(1.0, 2.0, 101)
    posterior = posterior_of(
        model__wte__weight=0.5,
        model__h__10__fc__weight=sigma * 10,
        model__h__2__fc__weight=sigma[:51],
        model__h__2__fc__bias=sigma[51:],
        bias=[0.25],
    )
    sigma_per_layer(posterior, tmp_path / "sigma.png")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["bias", "model.h.2", "model.h.10", "model.wte"]
    (medians,) = axes.get_lines()
    assert medians.get_xdata() == pytest.approx([0.25, 1.5, 15.0, 0.5], rel=1e-6)
    (ranges,) = axes.collections
    ends = [[float(x) for x in segment[:, 0]] for segment in ranges.get_segments()]
    assert ends[1] == pytest.approx([1.01, 1.99], rel=1e-6)
    assert ends[2] == pytest.approx([10.1, 19.9], rel=1e-6)
    assert "σ (unit of the weights)" in axes.get_xlabel()


def test_empty_tensors_have_no_width(tmp_path, figures):
    """A layer that a model leaves empty would end the figure of all others in an error."""
    sigma_per_layer(posterior_of(a__weight=[0.5], b__weight=[]), tmp_path / "sigma.png")
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["a"]


def test_pyplot_is_left_alone(tmp_path):
    """A notebook's own figures or a server without a display would be disturbed."""
    code = (
        "import sys, hf_ivon.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.training_curves({{'a': [(0, 1.0)]}}, {str(tmp_path / 'a.png')!r})\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ({}, "`histories` must hold at least one run, each with a finite value, got no run"),
        ({"a": [(0, 1.0)], "b": [], "c": [(0, float("inf"))]}, "got none for 'b', 'c'"),
    ],
)
def test_nothing_to_draw(tmp_path, histories, message):
    """An empty picture would pass for a result."""
    with pytest.raises(ValueError, match=message):
        training_curves(histories, tmp_path / "curves.png")
    with pytest.raises(ValueError, match="`posterior` must hold at least one weight"):
        sigma_per_layer(posterior_of(), tmp_path / "sigma.png")
    assert list(tmp_path.iterdir()) == []


def test_reliability_is_the_share_of_right_ones(tmp_path, figures):
    """A bin's point must be its average confidence and its share of right predictions; empty bins have none."""
    probabilities = torch.tensor([[0.91, 0.09], [0.93, 0.07], [0.65, 0.35], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 0, 0])
    reliability_diagram({"model": (probabilities, labels)}, tmp_path / "r.png", num_bins=10)
    line = next(line for line in figures[0].axes[0].get_lines() if line.get_label() == "model")
    assert [tuple(round(v, 4) for v in point) for point in line.get_xydata().tolist()] == [
        (0.65, 1.0),
        (0.9467, 0.6667),
    ]
    with pytest.raises(ValueError, match="`predictions` must hold something"):
        reliability_diagram({}, tmp_path / "r.png")


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([[2.0, -1.0]], [0], "Apply `softmax` to logits first"),
        ([[float("nan"), 0.5]], [0], "must be free of NaN"),
        ([[0.5, 0.5]], [-100], r"`labels` must be in \[0, 2\)"),
        ([], [], "at least one example"),
    ],
)
def test_what_is_no_prediction_has_no_reliability(tmp_path, probabilities, labels, message):
    """Logits, or tokens without a label, would be drawn as a model that is sure and wrong."""
    given = torch.tensor(probabilities).reshape(-1, 2), torch.tensor(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        reliability_diagram({"model": given}, tmp_path / "r.png")


def test_the_diagram_has_the_bins_of_the_calibration_error(tmp_path, figures):
    """A confidence between two bins, as 1/2, would be in one of them in the figure and in the other in the number."""
    probabilities = torch.tensor([[0.5, 0.5], [0.4, 0.6], [0.25, 0.75]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    reliability_diagram({"model": (probabilities, labels)}, tmp_path / "r.png", num_bins=2)
    line = next(line for line in figures[0].axes[0].get_lines() if line.get_label() == "model")
    points = line.get_xydata().tolist()
    assert points == [[0.5, 1.0], [pytest.approx(0.675), 0.5]]
    error = sum(n / 3 * abs(share - mean) for n, (mean, share) in zip((1, 2), points, strict=True))
    assert expected_calibration_error(probabilities, labels, num_bins=2) == pytest.approx(error)


def test_entropies_are_shares_of_one_range(tmp_path, figures):
    """Two sets of different sizes must be comparable: shares, over the same bins."""
    sets = {"in": torch.tensor([0.0, 0.1, 0.1, 0.1]), "out": torch.tensor([1.0, 0.9])}
    entropy_histograms(sets, tmp_path / "e.png", num_bins=2)
    shown = [patch.get_data() for patch in figures[0].axes[0].patches if not patch.get_fill()]
    assert [found.values.tolist() for found in shown] == [[1.0, 0.0], [0.0, 1.0]]
    assert shown[0].edges.tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="`entropies` must hold values"):
        entropy_histograms({"in": torch.zeros(0)}, tmp_path / "e.png")


def test_entropies_are_all_counted_or_refused(tmp_path, figures):
    """A sure prediction whose entropy is rounded to just below 0 would be missing, and NaN would name no figure."""
    entropy_histograms({"in": torch.tensor([-2e-16, 1.0], dtype=torch.float64)}, tmp_path / "e.png", num_bins=2)
    entropy_histograms({"in": torch.tensor([-2e-16, 0.0], dtype=torch.float64)}, tmp_path / "e.png", num_bins=2)
    shown = [next(p for p in f.axes[0].patches if not p.get_fill()).get_data().values.tolist() for f in figures]
    assert shown == [[0.5, 0.5], [1.0, 0.0]]
    for wrong in (float("nan"), float("inf"), -0.7):
        with pytest.raises(ValueError, match="`entropies` must be finite and at least 0, got .* for 'in'"):
            entropy_histograms({"in": torch.tensor([0.1, wrong])}, tmp_path / "e.png")


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c"]])
def test_trade_offs_show_every_merge(tmp_path, figures, names):
    """A merge that is not drawn is one that nobody can choose."""
    points = [{name: (i * k) % 5 / 5 for k, name in enumerate(names, 1)} for i in range(4)]
    trade_offs(points, [True, False, True, False], tmp_path / "t.png", title="Merges")
    axes = figures[0].axes[0]
    drawn = sum(len(line.get_xydata()) for line in axes.get_lines())
    drawn += sum(len(dots.get_offsets()) for dots in axes.collections)
    assert drawn == (4 if len(names) == 2 else 12)
    with pytest.raises(ValueError, match="`points` must hold metrics"):
        trade_offs([], [], tmp_path / "t.png")


def test_metrics_are_drawn_at_their_numbers_of_samples_beside_what_takes_none(tmp_path, figures):
    """A curve at the wrong places would say that fewer samples are enough."""
    curves = {"IVON": {16: 0.3, 1: 0.5, 4: 0.4}}
    metric_by_samples(curves, tmp_path / "a.png", ylabel="NLL (nats)", references={"mean": 0.45})
    (axes,) = figures[0].axes
    curve, level = axes.get_lines()
    assert curve.get_xydata().tolist() == [[1, 0.5], [4, 0.4], [16, 0.3]]
    assert set(level.get_ydata()) == {0.45}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4", "16"]
    assert curve.get_linestyle() != level.get_linestyle()
    with pytest.raises(ValueError, match="Predict first"):
        metric_by_samples({"IVON": {}}, tmp_path / "b.png", ylabel="NLL (nats)")
    with pytest.raises(ValueError, match="numbers of samples of at least 1, got 0, which has no place"):
        metric_by_samples({"IVON": {0: 0.5, 4: 0.4}}, tmp_path / "b.png", ylabel="NLL (nats)")


def record(step, loss, low, middle, high):
    bands = {
        f"ivon_{name}_{q}": v
        for name in ("hess_rel", "sigma")
        for q, v in (("q01", low), ("q50", middle), ("q99", high))
    }
    return {"step": step, "loss": loss, **bands}


def test_a_run_is_drawn_with_the_bands_of_its_posterior(tmp_path, figures):
    """A band at the wrong place would say that a Hessian was learnt which was not."""
    history = [
        record(20, 3.0, 0.01, 0.2, 5.0),
        {"step": 20, "eval_loss": 9.0},
        record(10, 4.0, 0.5, 1.0, 2.0),
        {"step": 5, "loss": 7.0},
    ]
    posterior_curves(history, tmp_path / "new" / "run.png", title="Run")
    top, *panels = figures[0].axes
    assert top.get_lines()[0].get_xydata().tolist() == [[10, 4.0], [20, 3.0]]
    assert [axes.get_ylabel() for axes in panels] == ["Hessian h over its start", "σ (unit of the weights)"]
    for axes in panels:
        assert axes.get_lines()[0].get_xydata().tolist() == [[10, 1.0], [20, 0.2]]
        corners = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.tolist()}
        assert {(10, 0.5), (10, 2.0), (20, 0.01), (20, 5.0)} <= corners
        assert axes.get_yscale() == "log"


@pytest.mark.parametrize(
    ("low", "high", "scale"), [(0.99, 1.01, "linear"), (0.0, 3.0, "symlog"), (-1.0, 3.0, "symlog")]
)
def test_bands_have_an_axis_that_shows_them(tmp_path, figures, low, high, scale):
    """A Hessian of zero has no place on a logarithmic axis, and a narrow band no readable ticks on one."""
    posterior_curves([record(1, 3.0, low, 1.0, high)], tmp_path / "run.png")
    assert figures[0].axes[1].get_yscale() == scale


def test_a_run_without_a_posterior_has_no_bands(tmp_path):
    """AdamW's log, or one that was never written to, would make an empty picture."""
    with pytest.raises(
        ValueError, match="`log_history` must hold records with the training loss and IVON's statistics"
    ):
        posterior_curves([{"step": 1, "loss": 2.0}], tmp_path / "run.png")


def test_sensitivities_lie_in_bins_of_equal_ratio(tmp_path, figures):
    """On a linear scale all but a few examples are in one bin; those of no sensitivity belong to the first."""
    scores = torch.tensor([0.0, 1e-5, 0.011, 0.02, 5.0, 10.0])
    sensitivity_histogram({"examples": scores}, tmp_path / "s.png", num_bins=6)
    counts, edges, _ = figures[0].axes[0].patches[0].get_data()
    assert counts.tolist() == [2, 0, 0, 2, 0, 2]
    assert edges == pytest.approx([10.0**k for k in range(-5, 2)], rel=1e-6)
    sensitivity_histogram({"examples": torch.zeros(3)}, tmp_path / "none.png")
    for wrong in ({}, {"a": torch.zeros(0)}, {"a": torch.tensor([-1.0])}, {"a": torch.tensor([float("nan")])}):
        with pytest.raises(ValueError, match="`scores` must"):
            sensitivity_histogram(wrong, tmp_path / "s.png")
