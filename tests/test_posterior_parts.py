"""A posterior without a second copy of the model: read when used, drawn tensor by tensor, restricted, moved."""

import pickle
import shutil
import weakref
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_ivon import execution
from hf_ivon.checkpoint import PosteriorFormatError, Variances, load_posterior, save_posterior
from hf_ivon.mean import posterior_keys
from hf_ivon.mixture import Mixture
from hf_ivon.native import Native
from hf_ivon.optim import IVON
from hf_ivon.parts import layer_of
from hf_ivon.plots import sigma_per_layer
from hf_ivon.posterior import Posterior
from hf_ivon.tensor_files import TensorFiles


def make(seed=0, **options):
    """Return a small model and its posterior, with variances that differ."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    groups = [{"params": model[0].parameters(), "ess": 50.0}, {"params": model[2].parameters()}]
    optimizer = IVON(groups, **{"lr": 0.1, "ess": 100.0, "beta2": 0.9, **options})
    with optimizer.sampled_params(train=True):
        model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    return model, Posterior.from_optimizer(optimizer, model, num_examples=5)


@pytest.fixture
def saved(tmp_path):
    """A directory with mean and posterior."""
    model, posterior = make()
    save_posterior(posterior, tmp_path, max_shard_size=100)
    save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "model.safetensors")
    return tmp_path, model, posterior


@pytest.fixture
def reads(monkeypatch):
    """The tensors that were read of files, in order."""
    names, read = [], TensorFiles.__getitem__

    def recorded(self, name):
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(TensorFiles, "__getitem__", recorded)
    return names


def test_a_scaled_posterior_is_what_predictions_are_averaged_over(saved, tmp_path):
    """A width that was fitted is to be saved: the draws must be those of `ess_scale`, of the same curvature."""
    directory, model, posterior = saved
    mean = posterior_keys(model)
    for given in (posterior, Posterior.from_pretrained(directory)):
        wider = given.scaled(0.25)
        drawn = wider.sample(mean, generator=torch.Generator().manual_seed(1))
        expected = given.sample(mean, generator=torch.Generator().manual_seed(1), ess_scale=0.25)
        for name in posterior.names():
            torch.testing.assert_close(drawn[name], expected[name], rtol=1e-6, atol=0)
            torch.testing.assert_close(wider.hess(name), given.hess(name), rtol=1e-4, atol=1e-6)
            assert wider.config.of("ess", name) == 0.25 * given.config.of("ess", name)
    save_posterior(wider, tmp_path / "wider")
    again = Posterior.from_pretrained(tmp_path / "wider", model)
    assert all(torch.equal(again.variance[name], wider.variance[name]) for name in wider.names())
    assert posterior.restrict("0").scaled(2.0).is_part
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`ess_scale` must be positive and finite"):
            posterior.scaled(scale)


def test_another_process_can_be_given_a_posterior_that_is_read_when_used(saved):
    """A pool of processes that predict would end in a PicklingError."""
    directory, _, posterior = saved
    given = pickle.loads(pickle.dumps(Posterior.from_pretrained(directory)))
    assert given.names() == posterior.names()
    for name in given.names():
        assert torch.equal(given.std(name), posterior.std(name))


class OneAtATime(Mapping):
    """Hands out fresh copies of tensors, and counts how many of them are alive at once."""

    def __init__(self, tensors):
        self.tensors, self.given, self.most = tensors, [], 0

    def __getitem__(self, name):
        tensor = self.tensors[name].detach().clone()
        self.given.append(weakref.ref(tensor))
        self.most = max(self.most, self.alive())
        return tensor

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def alive(self):
        return sum(ref() is not None for ref in self.given)


def generator():
    return torch.Generator().manual_seed(3)


def test_opening_reads_no_tensor(saved, reads):
    """A posterior of many gigabytes would be read, or held, before anything of it is used."""
    directory, model, posterior = saved
    opened = Posterior.from_pretrained(directory)
    assert opened.names() == posterior.names()
    assert "0.bias" in opened.variance
    assert "0" not in opened.variance
    Posterior.from_pretrained(directory, model).restrict("0")
    assert reads == []
    with opened.restrict("2").sampled(model):
        pass
    assert reads == ["2.bias", "2.weight"]


def test_loading_checks_all_values_and_keeps_none(saved, reads, monkeypatch):
    """The check of all values would bring the whole posterior into memory after all."""
    directory, _, posterior = saved
    counted = OneAtATime(dict(posterior.variance))
    read = TensorFiles.__getitem__

    def copied(self, name):
        return counted[name] if isinstance(self, Variances) else read(self, name)

    monkeypatch.setattr(TensorFiles, "__getitem__", copied)
    loaded = load_posterior(directory)
    assert len(counted.given) == len(posterior.names())
    assert sorted(reads) == posterior.names(), "the mean was read once, for its digest"
    for _ in loaded.sampled_tensors(TensorFiles(directory, "model", []), generator()):
        pass
    assert (counted.most, counted.alive()) == (1, 0)


def test_what_was_not_checked_on_opening_is_checked_on_use(saved):
    """NaN, or a mean that is another model's, would go unnoticed because nobody read them at first."""
    directory, model, posterior = saved
    shard = TensorFiles(directory, "posterior", []).entries["2.bias"].path
    tensors = load_file(shard)
    tensors["2.bias"][0] = torch.nan
    save_file(tensors, shard, metadata={"mean_digest": posterior.config.mean_digest})
    opened = Posterior.from_pretrained(directory, model)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        with pytest.raises(PosteriorFormatError, match="cannot be used: `2.bias` holds NaN"), opened.sampled(model):
            pass
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for check in (lambda: load_posterior(directory), lambda: Posterior.from_pretrained(directory, check_values=True)):
        with pytest.raises(PosteriorFormatError, match="cannot be used: `2.bias` holds NaN"):
            check()
    with pytest.raises(PosteriorFormatError, match="the mean beside it is not the one"):
        Posterior.from_pretrained(directory, make(seed=1)[0])
    with pytest.raises(PosteriorFormatError, match="the model lacks"):
        Posterior.from_pretrained(directory, model[0])


def test_files_that_change_under_an_open_posterior_are_refused(saved):
    """Half of the tensors would come from one save and half from the next, around the mean of neither."""
    directory, model, posterior = saved
    opened = load_posterior(directory)
    kept = opened.to("cpu")
    save_posterior(make(seed=1)[1], directory, max_shard_size=100)
    with pytest.raises(PosteriorFormatError, match="must stay as it was opened.*Load it again"):
        opened.sample(posterior_keys(model))
    shutil.rmtree(directory)
    with pytest.raises(PosteriorFormatError, match="cannot be read"):
        opened.sample(posterior_keys(model))
    assert all(torch.equal(kept.variance[name], posterior.variance[name]) for name in posterior.names())


def test_tensor_by_tensor_the_draws_are_the_same(saved):
    """A large model would get other draws than a small one, or a posterior in files others than one in memory."""
    directory, model, posterior = saved
    expected = posterior.sample(posterior_keys(model), generator(), ess_scale=2.0)
    for source in (posterior, load_posterior(directory)):
        for mean in (posterior_keys(model), TensorFiles(directory, "model", [])):
            drawn = list(source.sampled_tensors(mean, generator(), ess_scale=2.0))
            assert [name for name, _ in drawn] == posterior.names()
            assert all(torch.equal(draw, expected[name]) for name, draw in drawn)
    with load_posterior(directory).sampled(model, generator(), ess_scale=2.0):
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="`ess_scale` must be positive"):
        posterior.sampled_tensors(posterior_keys(model), ess_scale=0.0)  # at the call, not at the first draw


def test_tensor_by_tensor_one_tensor_is_in_memory(saved):
    """Sampling a 7B-parameter model would need the memory of two or three."""
    directory, model, posterior = saved
    mean = OneAtATime(dict(posterior_keys(model)))
    draws = []
    for name, draw in load_posterior(directory).sampled_tensors(mean, generator()):
        assert mean.alive() == 0, f"the mean is still held after the draw of {name}"
        draws.append(weakref.ref(draw))
        del draw
        assert draws[-1]() is None, f"the draw of {name} is held by the iterator"
    assert (mean.most, len(draws)) == (1, len(posterior.names()))


def test_a_mixture_reads_what_it_draws(saved, reads):
    """A mixture of five large posteriors would hold all of them."""
    directory, model, _ = saved
    mixture = Mixture.from_pretrained([directory, directory])
    reads.clear()
    with mixture.sampled(model, component=1):
        pass
    assert len(reads) == 2 * len(list(model.parameters()))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("2", ["2.bias", "2.weight"]),
        (["2.bias"], ["2.bias"]),
        ({"0", "2.weight"}, ["0.bias", "0.weight", "2.weight"]),
        (("0", "2"), ["0.bias", "0.weight", "2.bias", "2.weight"]),
    ],
)
@pytest.mark.parametrize("in_files", [False, True])
def test_a_part_leaves_the_rest_at_its_mean(saved, parts, expected, in_files):
    """Weights outside of the part would be perturbed, or those inside with other variances."""
    directory, model, posterior = saved
    part = (load_posterior(directory) if in_files else posterior).restrict(parts)
    assert part.names() == expected
    assert posterior.names() == ["0.bias", "0.weight", "2.bias", "2.weight"], "the whole is as it was"
    alone = Posterior({name: posterior.variance[name] for name in expected}, posterior.config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    draw = alone.sample(before, generator())
    with part.sampled(model, generator()):
        for name, p in model.named_parameters():
            assert torch.equal(p, draw.get(name, before[name])), name
    assert all(torch.equal(part.hess(name), posterior.hess(name)) for name in expected)
    assert set(part.config.ess) == set(expected), "settings by name are those of the part"
    assert part.restrict(expected[0]).names() == expected[:1]


def test_a_part_that_is_not_there_is_refused():
    """A misspelt module would give the posterior of something else, or of nothing."""
    names = [f"transformer.h.{i}.ln.weight" for i in range(12)] + ["transformer.wte.weight", "head.weight"]
    posterior = Posterior(dict.fromkeys(names, torch.ones(1)), make()[1].config)
    with pytest.raises(ValueError, match=r"got 'hed', which it lacks. It has `head`, `transformer`. Name"):
        posterior.restrict(["head", "hed"])
    with pytest.raises(ValueError, match=r"It has `transformer.h`, `transformer.wte`."):
        posterior.restrict("transformer.x.1")
    with pytest.raises(ValueError, match=r"got 'transformer.h.12'.*`transformer.h.0`, .* and 4 more"):
        posterior.restrict("transformer.h.12")
    with pytest.raises(ValueError, match="got none. There are `head`, `transformer`"):
        posterior.restrict([])
    assert posterior.restrict("transformer.h.1").names() == ["transformer.h.1.ln.weight"], "not h.10 and h.11"


def test_a_part_is_saved_only_with_its_mean(saved, tmp_path):
    """A part with the digest of the whole would never load again."""
    directory, model, posterior = saved
    with pytest.raises(ValueError, match="it is a part made without a mean. Save the whole"):
        posterior.restrict("2").to("cpu").save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    with pytest.raises(ValueError, match="`model` must hold the mean, but its digest is not"):
        posterior.restrict("2", make(seed=1)[0])
    with pytest.raises(ValueError, match=r"`model` must hold the mean, but the model lacks `2.bias`"):
        posterior.restrict("0", model[:1])
    load_posterior(directory).restrict("2", model).save_pretrained(tmp_path / "part")
    again = load_posterior(tmp_path / "part", model)
    assert again.names() == ["2.bias", "2.weight"]
    assert all(torch.equal(again.variance[name], posterior.variance[name]) for name in again.names())
    with torch.no_grad():
        model[2].bias += 1
    with pytest.raises(PosteriorFormatError, match="the mean beside it is not the one"):
        load_posterior(tmp_path / "part", model)


def test_a_saved_whole_may_be_saved_over_itself(saved):
    """Variances read while their files are replaced would be lost, with the only copy there is."""
    directory, model, posterior = saved
    load_posterior(directory).save_pretrained(directory)
    again = load_posterior(directory, model)
    assert all(torch.equal(again.variance[name], posterior.variance[name]) for name in posterior.names())


def test_bfloat16_variances_are_computed_with_in_fp32(saved, tmp_path):
    """Noise of 8 bits would be coarse; all that half the memory may cost is the variances' own rounding."""
    directory, model, posterior = saved
    half = load_posterior(directory).to(dtype=torch.bfloat16)
    assert {v.dtype for v in half.variance.values()} == {torch.bfloat16}
    assert half.config == posterior.config
    rounded = Posterior({n: v.bfloat16().float() for n, v in posterior.variance.items()}, posterior.config)
    mean = posterior_keys(model)
    first, second = (p.sample(mean, generator()) for p in (half, rounded))
    for name in posterior.names():
        assert torch.equal(first[name], second[name])
        for function in ("std", "precision", "hess"):
            assert torch.equal(getattr(half, function)(name), getattr(rounded, function)(name))
    half.save_pretrained(tmp_path / "half")
    assert {v.dtype for v in load_posterior(tmp_path / "half", model).variance.values()} == {torch.float32}
    pytest.importorskip("matplotlib")
    sigma_per_layer(half, tmp_path / "sigma.png")


@pytest.mark.parametrize(
    ("dtype", "value", "refused"),
    [
        (torch.float16, 1e-9, True),  # 0 in fp16
        (torch.float16, 1e-6, True),  # a denormal number: 4 bits are left
        (torch.float16, 1e5, True),  # inf
        (torch.float16, 1e-3, False),
        (torch.bfloat16, 1e-30, False),
        (torch.float64, 1e-30, False),
        (torch.float32, 1e-40, False),  # what it was before
    ],
)
def test_variances_do_not_underflow(dtype, value, refused):
    """A variance that became 0 is a weight that is certain, and a Hessian of inf; nothing else would say so."""
    posterior = Posterior({"a": torch.tensor([0.5, value]), "empty": torch.ones(0)}, make()[1].config)
    if refused:
        with pytest.raises(ValueError, match=r"`dtype` must hold the variances, but `a` has some.*Use torch.bfloat16"):
            posterior.to(dtype=dtype)
    else:
        moved = posterior.to("cpu", dtype).variance["a"]
        assert moved.dtype == dtype
        torch.testing.assert_close(moved.float(), posterior.variance["a"], rtol=2**-8, atol=0)


def test_integer_variances_are_refused():
    """All variances below 1 would be 0."""
    with pytest.raises(ValueError, match="`dtype` must be floating-point, got torch.int8"):
        make()[1].to(dtype=torch.int8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_posterior_on_the_gpu_draws_what_it_draws_on_the_cpu():
    """Draws would depend on where the variances are."""
    model, posterior = make()
    expected = posterior.sample(posterior_keys(model), generator())
    moved = posterior.to("cuda")
    assert moved.variance["0.bias"].is_cuda
    for device in ("cpu", "cuda"):
        draw = moved.sample(posterior_keys(model.to(device)), generator())
        for name in expected:  # up to the last bits of a logarithm
            torch.testing.assert_close(draw[name].cpu(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_large_posteriors_are_drawn_by_a_fused_pass_and_alike(dtype, transposed, monkeypatch):
    """A machine with a compiler must predict what one without does, whatever the mean is like; and leave it alone."""
    mean = {"a": torch.randn(33, 65).to(dtype), "b": torch.randn(7).to(dtype), "c": torch.randn(()).to(dtype)}
    mean["a"] = mean["a"].t() if transposed else mean["a"]
    before = {name: tensor.clone() for name, tensor in mean.items()}
    posterior = Posterior({name: torch.rand(tensor.shape) + 0.1 for name, tensor in mean.items()}, make()[1].config)
    posterior.variance["a"][0, 0] = 1e-30
    execution.quick_passes("cpu")  # its check takes the pass too
    draws, taken, sample = [], [], Native.sample
    monkeypatch.setattr(Native, "sample", lambda *args, **options: taken.append(1) or sample(*args, **options))
    for smallest in (1, 2**40):
        monkeypatch.setattr(execution, "_MIN_MODEL", smallest)
        draws.append(posterior.sample(mean, generator(), ess_scale=4.0))
    assert bool(taken) == (dtype != torch.float64)  # which has no such pass
    for name, tensor in before.items():
        assert torch.equal(mean[name], tensor)
        assert draws[0][name].dtype == dtype
        assert draws[0][name].shape == tensor.shape
        tolerance = {"rtol": 2**-7, "atol": 1e-3} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(draws[0][name], draws[1][name], **tolerance)
    torch.testing.assert_close(draws[0]["a"][0, 0], before["a"][0, 0])


def test_draws_follow_the_generator():
    """Two draws of one generator differ, and the global one is moved on, so that `manual_seed` repeats a script."""
    model, posterior = make()
    mean, source = {name: p.detach() for name, p in model.named_parameters()}, generator()
    first, second = posterior.sample(mean, source), posterior.sample(mean, source)
    assert not any(torch.equal(first[name], second[name]) for name in first)
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        ends.append([posterior.sample(mean) for _ in range(2)])
    assert all(torch.equal(a[name], b[name]) for a, b in zip(*ends, strict=True) for name in a)
    assert not torch.equal(ends[0][0]["0.weight"], ends[0][1]["0.weight"])


@pytest.mark.parametrize("ess_scale", [1.0, 4.0])
def test_log_prob_is_the_gaussian_density(ess_scale):
    """Whoever compares posteriors, or reweights draws, needs the density itself; torch's is the reference."""
    model, posterior = make()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    weights = posterior.sample(mean, torch.Generator().manual_seed(0))
    expected = sum(
        torch.distributions
        .Normal(mean[n].double(), (posterior.variance[n].double() / ess_scale).sqrt())
        .log_prob(weights[n].double())
        .sum()
        for n in posterior.names()
    )
    assert posterior.log_prob(weights, mean, ess_scale) == pytest.approx(float(expected), rel=1e-12)


def test_log_prob_of_other_weights_is_refused():
    """A shape that broadcasts would give a number that means nothing."""
    model, posterior = make()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="has shape"):
        posterior.log_prob({**mean, "0.bias": torch.zeros(1)}, mean)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.encoder.layers.10.fc1.weight", "model.encoder.layers.10"),
        ("model.decoder.layers.10.fc1.weight", "model.decoder.layers.10"),
        ("h.2.experts.7.weight", "h.2"),
        ("0.weight", "0"),
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings"),
        ("blocks.3", "blocks"),
        ("conv2.weight", "conv2"),
        ("scale", "scale"),
    ],
)
def test_a_layer_is_the_name_up_to_its_first_number(name, layer):
    """Tables and figures would mix layers, as the tenth of an encoder and of its decoder, or split one."""
    assert layer_of(name) == layer
