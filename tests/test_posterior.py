"""The posterior in memory: names, draws, the way back to the mean, what an optimizer hands over."""

import pytest
import torch
from torch import nn

from hf_ivon.mean import mean_digest, posterior_keys
from hf_ivon.optim import IVON
from hf_ivon.posterior import Posterior
from hf_ivon.posterior_config import PosteriorConfig, config_problems
from tests import tiny


def trained(model, **options):
    """Return an optimizer whose Hessian has moved."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = IVON(params, **{"lr": 0.01, "ess": 100.0, "beta2": 0.9, **options})
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            sum((p.float() ** 2).sum() for p in params).backward()
        optimizer.step()
    return optimizer


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def test_from_optimizer_takes_what_the_optimizer_knows(model):
    """Variances, and all that turns them into a Hessian again, must be those of the optimizer at this moment."""
    optimizer = trained(model, weight_decay=0.3)
    posterior = Posterior.from_optimizer(optimizer, model, num_examples=7, num_tokens=70, base_model="base")
    assert posterior.names() == sorted(name for name, _ in model.named_parameters())
    config = posterior.config
    assert (config.ess, config.weight_decay, config.hess_init) == (100.0, 0.3, 1.0)
    assert (config.num_examples, config.num_tokens, config.steps, config.base_model) == (7, 70, 2, "base")
    assert (config.betas, config.estimator) == ((0.9, 0.9), "ivon-price")
    assert config.mean_digest == mean_digest(dict(model.named_parameters()))
    for name, p in model.named_parameters():
        assert torch.equal(posterior.variance[name], optimizer.posterior_variance(p))
        torch.testing.assert_close(posterior.hess(name), optimizer.state[p]["hess"])
        torch.testing.assert_close(posterior.precision(name) * posterior.std(name) ** 2, torch.ones(p.shape))


def test_groups_that_differ_are_kept_by_name(model):
    """A scalar ess for groups with different ess would give a wrong Hessian back."""
    groups = [{"params": model[0].parameters(), "ess": 10.0}, {"params": model[2].parameters(), "hess_init": 4.0}]
    optimizer = IVON(groups, lr=0.1, ess=20.0)
    posterior = Posterior.from_optimizer(optimizer, model)
    assert posterior.config.ess == {"0.weight": 10.0, "0.bias": 10.0, "2.weight": 20.0, "2.bias": 20.0}
    assert posterior.config.weight_decay == 1e-4
    torch.testing.assert_close(posterior.hess("2.bias"), torch.full((2,), 4.0))


def test_frozen_parameters_have_no_posterior(model):
    """A variance for a weight that was never trained would perturb it at prediction."""
    model[0].requires_grad_(False)
    posterior = Posterior.from_optimizer(trained(model), model)
    assert posterior.names() == ["2.bias", "2.weight"]
    frozen = model[0].weight.detach().clone()
    with posterior.sampled(model, torch.Generator().manual_seed(0)):
        assert torch.equal(model[0].weight, frozen)


def test_taking_it_at_the_wrong_moment_is_refused(model):
    """Inside a sample the mean would be a sample; for another model it would be nobody's."""
    optimizer = trained(model)
    with optimizer.sampled_params(), pytest.raises(RuntimeError, match="inside `sampled_params`"):
        Posterior.from_optimizer(optimizer, model)
    with pytest.raises(ValueError, match="got none"):
        Posterior.from_optimizer(optimizer, nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_sampled_restores_the_mean_bit_for_bit(model, dtype, error):
    """A prediction must not change the model, whatever happens during it."""
    model.to(dtype)
    posterior = Posterior.from_optimizer(trained(model), model)
    before = [p.detach().clone() for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    try:
        with posterior.sampled(model, torch.Generator().manual_seed(0)):
            assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_closing_a_generator_inside_a_sample_restores(model):
    """A prediction loop that is abandoned half-way must not leave a sample in the model."""
    posterior = Posterior.from_optimizer(trained(model), model)
    before = [p.detach().clone() for p in model.parameters()]

    def predictions():
        with posterior.sampled(model):
            yield model(torch.zeros(4))

    loop = predictions()
    next(loop)
    assert not torch.equal(model[0].weight, before[0])
    loop.close()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_two_parameters_on_one_storage_are_restored():
    """Weights tied through their storage are drawn twice; the way back must still end at the mean."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    posterior = Posterior.from_optimizer(IVON(model.parameters(), lr=0.1, ess=10.0), model)
    before = model[0].weight.detach().clone()
    with posterior.sampled(model):
        assert not torch.equal(model[0].weight, before)
    assert torch.equal(model[0].weight, before)


def test_autocast_sees_the_sample(model):
    """Autocast remembers casts of the weights: a sample inside its region would silently predict at the mean."""
    posterior = Posterior.from_optimizer(trained(model), model)
    x = torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        at_mean = model(x)
        with posterior.sampled(model, torch.Generator().manual_seed(0)):
            assert not torch.equal(model(x), at_mean)
        assert torch.equal(model(x), at_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_have_the_posteriors_width(dtype):
    """Draws too narrow or too wide are calibrated wrongly; ess_scale must narrow by its root."""
    n = 50_000
    model = nn.Linear(n, 1, bias=False, dtype=dtype)
    posterior = Posterior.from_optimizer(IVON(model.parameters(), lr=0.1, ess=25.0), model)
    mean = {"weight": model.weight}
    for scale in (1.0, 4.0):
        draw = posterior.sample(mean, torch.Generator().manual_seed(1), ess_scale=scale)["weight"]
        assert draw.dtype == dtype
        variance = (draw.float() - model.weight.float()).var().item()
        expected = posterior.variance["weight"].mean().item() / scale
        assert abs(variance / expected - 1) < 5 * (2 / n) ** 0.5  # 5 standard errors of a variance of n normals
    first, second = (posterior.sample(mean, torch.Generator().manual_seed(1))["weight"] for _ in range(2))
    assert torch.equal(first, second)


def test_a_model_that_does_not_fit_is_refused(model):
    """Variances on the wrong tensors would be silent nonsense; the message names them."""
    posterior = Posterior.from_optimizer(trained(model), model)
    before = [p.detach().clone() for p in model.parameters()]
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
    with (
        pytest.raises(ValueError, match=r"lacks `2.bias`, `2.weight`; `0.bias` has shape \(8,\)"),
        posterior.sampled(other),
    ):
        pass
    with pytest.raises(ValueError, match="`ess_scale` must be positive"):
        posterior.sample(dict(model.named_parameters()), ess_scale=0.0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_wrappers_do_not_change_names():
    """A posterior saved from a compiled or DDP-wrapped model must load into the plain one."""
    model = tiny.gpt2()
    names = list(posterior_keys(model))
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names, "tied weights appear once"
    assert list(posterior_keys(torch.compile(model))) == names
    assert list(posterior_keys(nn.DataParallel(model))) == names
    assert list(posterior_keys(torch.compile(nn.DataParallel(model)))) == names
    model.transformer.h[0] = torch.compile(model.transformer.h[0])
    assert list(posterior_keys(model)) == names


def test_distributed_wrapper_does_not_change_names(model):
    """The Trainer's model is wrapped by DDP when it trains on several devices."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert list(posterior_keys(nn.parallel.DistributedDataParallel(model))) == list(posterior_keys(model))
    finally:
        dist.destroy_process_group()


def test_a_child_called_module_is_no_wrapper():
    """Taking it for one would drop the model's own weights from the posterior and rename the rest."""
    model = nn.Module()
    model.module, model.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    assert set(posterior_keys(model)) == {"scale", "module.weight", "module.bias"}


def test_a_mean_in_double_precision_is_not_rounded():
    """A draw from a narrow posterior around an fp64 mean must not lose the mean's digits."""
    mean = {"a": torch.full((3,), 1 / 3, dtype=torch.float64)}
    config = PosteriorConfig.from_dict(GOOD)
    draw = Posterior({"a": torch.full((3,), 1e-30)}, config).sample(mean)["a"]
    assert 0 < (draw - mean["a"]).abs().max() < 1e-14


def lora(peft, **options):
    """Return a GPT-2 with LoRA on its attention."""
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **options)
    return peft.get_peft_model(tiny.gpt2(), config)


def test_adapter_names_are_those_of_the_adapters_file(tmp_path):
    """Merging and reloading pair variances with `adapter_model.safetensors` by name."""
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    model = lora(peft, modules_to_save=["ln_f"])
    posterior = Posterior.from_optimizer(trained(model), model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(posterior.names()) == set(saved)
    assert all(posterior.variance[name].shape == saved[name].shape for name in saved)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with posterior.sampled(model, torch.Generator().manual_seed(0)):
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_tied_tensors_of_an_adapter_appear_once():
    """Two names of one parameter would draw it twice."""
    peft = pytest.importorskip("peft")
    model = lora(peft, modules_to_save=["wte", "lm_head"], ensure_weight_tying=True)
    keys = posterior_keys(model)
    assert "base_model.model.transformer.wte.weight" in keys
    assert "base_model.model.lm_head.weight" not in keys
    posterior = Posterior.from_optimizer(trained(model), model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with posterior.sampled(model):
        assert not torch.equal(
            keys["base_model.model.transformer.wte.weight"], model.base_model.model.lm_head.weight * 2
        )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_active_adapter_is_the_one_meant():
    """Adapters may have any name; several at once would collide in one file."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(tiny.gpt2(), config, adapter_name="first")
    names = set(posterior_keys(lora(peft)))
    assert set(posterior_keys(model)) == names
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert set(posterior_keys(model)) == names
    assert all(p.requires_grad for p in posterior_keys(model).values())
    model.base_model.set_adapter(["first", "second"])
    with pytest.raises(ValueError, match="must have one active adapter"):
        posterior_keys(model)


def test_names_of_an_adapter_need_no_network(monkeypatch):
    """A look-up on the Hub at every draw would make prediction slow, and fail offline."""
    peft = pytest.importorskip("peft")
    model = lora(peft)
    model.peft_config["default"].base_model_name_or_path = "someone/model"

    def fail(*args, **kwargs):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", fail)
    assert len(posterior_keys(model)) == 4


def test_trained_weights_outside_of_the_adapter_are_reported(caplog):
    """PEFT does not save them, so the posterior cannot hold them; nobody may learn that by accident."""
    peft = pytest.importorskip("peft")
    model = lora(peft)
    Posterior.from_optimizer(trained(model), model)
    assert not caplog.records
    model.base_model.model.transformer.ln_f.weight.requires_grad_(True)
    posterior = Posterior.from_optimizer(trained(model), model)
    assert len(posterior.names()) == 4
    assert "1 trained parameters" in caplog.text
    assert "ln_f.weight" in caplog.text


GOOD = {
    "ess": 10.0,
    "weight_decay": 0.0,
    "hess_init": {"a": 1.0},
    "num_examples": 10,
    "num_tokens": None,
    "steps": 3,
    "betas": [0.9, 0.999],
    "estimator": "ivon-price",
    "mean_digest": "00",
}


def test_config_round_trips():
    """What is read must be what was written."""
    config = PosteriorConfig.from_dict(GOOD)
    assert PosteriorConfig.from_dict(config.to_dict()) == config
    assert config.of("hess_init", "a") == 1.0
    assert config.of("ess", "a") == 10.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ess", 0),
        ("ess", "many"),
        ("ess", True),
        ("weight_decay", -1.0),
        ("hess_init", {"a": -1.0}),
        ("num_examples", 2.5),
        ("steps", None),
        ("betas", [0.9]),
        ("estimator", 3),
        ("mean_digest", None),
        ("base_model", 3),
        ("versions", ["torch"]),
        ("surprise", 1),
    ],
)
def test_bad_config_is_named(key, value):
    """A damaged or foreign configuration must not become a posterior."""
    assert any(f"`{key}`" in problem for problem in config_problems({**GOOD, key: value}))
    with pytest.raises(ValueError, match=f"`{key}`"):
        PosteriorConfig.from_dict({**GOOD, key: value})


def test_config_names_all_problems():
    """Fixing one problem at a time, with a training run in between, is what people hate."""
    problems = config_problems({"ess": -1})
    assert len(problems) == 1 + len(GOOD) - 1  # a bad value, and every other key missing
    assert config_problems({**GOOD, "format_version": 2}) == [
        "`format_version` is 2 and this version of hf_ivon reads 1: upgrade hf_ivon"
    ]
