"""Loops with Accelerate: the same result as the Trainer's, whatever wraps the optimizer; fp16 and autocast."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_ivon import IVON, IVONTrainer
from hf_ivon.training.accelerate import sampled_params, unwrap_ivon
from tests import tiny

OPTIONS = {"ess": 1e4, "hess_init": 0.1, "beta2": 0.9, "weight_decay": 1e-3, "clip_radius": 1e-3, "seed": 42}
LR = 0.1


@pytest.fixture
def accelerator():
    made = []

    def make(**settings):
        made.append(Accelerator(cpu=True, **settings))
        return made[-1]

    yield make
    for one in made:
        one.gradient_state._reset_state()


def prepared(accelerator, model=None, batch_size=4, **options):
    model = model or tiny.gpt2()
    groups = [[p for p in model.parameters() if (p.dim() > 1) is decay] for decay in (True, False)]  # the Trainer's
    optimizer = IVON([{"params": group} for group in groups], lr=LR, **{**OPTIONS, **options})
    loader = DataLoader(tiny.text(), batch_size=batch_size)
    return accelerator.prepare(model, optimizer, loader)


def train(accelerator, model, optimizer, batches, samples=1):
    for batch in batches:
        with accelerator.accumulate(model):
            for _ in range(samples):
                with sampled_params(accelerator, optimizer, weight=1 / samples):
                    accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


class InOrder(IVONTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return None


@pytest.mark.parametrize(("accumulation", "samples"), [(1, 1), (2, 1), (3, 2)])
def test_a_loop_equals_the_trainer(tmp_path, accelerator, accumulation, samples):
    """The loop of a custom script would train another model than `IVONTrainer` does with the same options."""
    acc = accelerator(gradient_accumulation_steps=accumulation)
    model, optimizer, loader = prepared(acc, mc_samples=samples)
    train(acc, model, optimizer, loader, samples)
    settings = {
        "gradient_accumulation_steps": accumulation,
        "ivon_mc_samples": samples,
        "lr_scheduler_type": "constant",
    }
    args = tiny.arguments(tmp_path, max_steps=6 // accumulation, learning_rate=LR, **settings)
    trainer = InOrder(model=tiny.gpt2(), args=args, train_dataset=tiny.text())
    if not getattr(trainer, "_loss_shifts_labels", False):
        pytest.skip("this release divides by the number of all labels, also of those that no model predicts")
    trainer.train()
    for p, q in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        ours, theirs = unwrap_ivon(optimizer).state[p], trainer.ivon.state[q]
        torch.testing.assert_close(ours["hess"], theirs["hess"], rtol=1e-5, atol=1e-7)


def test_save_state_continues_bit_for_bit(tmp_path, accelerator):
    """`save_state` and `load_state` are the checkpoints of such loops."""
    acc = accelerator()
    model, optimizer, loader = prepared(acc, model=tiny.gpt2(0.1))
    batches = list(loader)
    train(acc, model, optimizer, batches[:3])
    acc.save_state(tmp_path / "state")
    train(acc, model, optimizer, batches[3:])
    straight = [p.detach().clone() for p in model.parameters()]
    acc = accelerator()
    model, optimizer, _ = prepared(acc, model=tiny.gpt2(0.1, seed=9))
    acc.load_state(tmp_path / "state")
    train(acc, model, optimizer, batches[3:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), straight, strict=True))


def test_another_optimizer_is_refused(accelerator):
    """A script that changes its optimizer by a flag would sample nothing without a word."""
    acc = accelerator()
    adam = acc.prepare(torch.optim.AdamW(tiny.gpt2().parameters()))
    with pytest.raises(TypeError, match="`optimizer` must be IVON, prepared or not, got"), sampled_params(acc, adam):
        pass


def test_prediction_samples_leave_the_window_alone(accelerator):
    """Looking at a sample between two micro-batches would join the step."""
    acc = accelerator()
    model, optimizer, loader = prepared(acc)
    batch = next(iter(loader))
    with sampled_params(acc, optimizer, train=False), torch.no_grad():
        first = model(**batch).loss
    assert unwrap_ivon(optimizer)._capture.contexts == 0
    assert first != model(**batch).loss


def test_one_autocast_region_around_several_micro_batches():
    """Autocast keeps casts of the weights; a second sample would be run with the first one's."""
    model = tiny.gpt2()
    optimizer = IVON(model.parameters(), lr=LR, **{**OPTIONS, "ess": 10.0})
    rows = torch.stack([row["input_ids"] for row in tiny.text(4)])
    inside, apart = [], []
    for losses, regions in ((inside, 1), (apart, 3)):
        optimizer.load_state_dict(IVON(model.parameters(), lr=LR, **{**OPTIONS, "ess": 10.0}).state_dict())
        if regions == 1:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for _ in range(3):
                    with optimizer.sampled_params(train=True):
                        losses.append(model(input_ids=rows, labels=rows).loss)
                losses.append(model(input_ids=rows, labels=rows).loss)
        else:
            for _ in range(3):
                with optimizer.sampled_params(train=True), torch.autocast("cpu", dtype=torch.bfloat16):
                    losses.append(model(input_ids=rows, labels=rows).loss)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses.append(model(input_ids=rows, labels=rows).loss)
        optimizer.zero_grad()
    assert [float(x) for x in inside] == [float(x) for x in apart]
    assert len(set(map(float, inside))) == 4


def statistics(precision, model):
    """Gradient and curvature of one step at the same draws, flat."""
    optimizer = IVON(model.parameters(), lr=0.0, **{**OPTIONS, "beta1": 0.0, "beta2": 0.0})
    rows = torch.stack([row["input_ids"] for row in tiny.text(8)])
    for part in rows.split(4):
        with (
            optimizer.sampled_params(train=True),
            torch.autocast("cpu", dtype=precision, enabled=precision is not None),
        ):
            (model(input_ids=part, labels=part).loss / 2).backward()
    optimizer.step()
    states = [optimizer.state[p] for p in model.parameters()]
    return [torch.cat([s[key].flatten() for s in states]) for key in ("momentum", "hess")]


@pytest.mark.parametrize("kind", ["autocast", "parameters"])
def test_bf16_statistics_are_those_of_fp32(kind):
    """A perturbation other than the one applied, or a stale cast, would bias the Hessian; rounding alone must not.

    Tolerance: bf16 rounds to 1 in 256; through the layers the gradients differ by a few hundredths of their norm.
    """
    expected = statistics(None, tiny.gpt2())
    found = (
        statistics(torch.bfloat16, tiny.gpt2())
        if kind == "autocast"
        else statistics(None, tiny.gpt2().to(torch.bfloat16))
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.06


def scaled(scaler, model, batches, overflow_at=None):
    """Train in a scaler's loop; the loss of one step overflows on purpose."""
    optimizer = IVON(model.parameters(), lr=LR, **OPTIONS)
    draws = []
    for i, rows in enumerate(batches):
        for part in rows.split(2):
            with optimizer.sampled_params(train=True, grad_scale=scaler.get_scale() if scaler else None):
                draws.append(next(model.parameters()).detach().clone())
                loss = model(input_ids=part, labels=part).loss / 2
                loss = loss * math.inf if i == overflow_at else loss
                (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        model.zero_grad()  # as the Trainer does: the optimizer is not told
    return optimizer, draws


BATCHES = torch.stack([row["input_ids"] for row in tiny.text(24)]).split(4)


@pytest.mark.parametrize("approx", ["price", "gradsq"])
def test_a_loss_scale_changes_nothing(approx, monkeypatch):
    """Gradients that the hooks see are scaled in fp16 training; unscaled by a power of two they are the same."""
    monkeypatch.setitem(OPTIONS, "hess_approx", approx)
    plain, with_scale = tiny.gpt2(), tiny.gpt2()
    expected, _ = scaled(None, plain, BATCHES)
    found, _ = scaled(torch.amp.GradScaler("cpu", init_scale=2.0**10), with_scale, BATCHES)
    for p, q in zip(plain.parameters(), with_scale.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(expected.state[p]["hess"], found.state[q]["hess"])


def test_an_overflow_leaves_nothing_behind():
    """A skipped step's infinite gradients would make the next Hessian infinite; its noise must not come again."""
    model, reference = tiny.gpt2(), tiny.gpt2()
    optimizer, draws = scaled(torch.amp.GradScaler("cpu", init_scale=4.0), model, BATCHES, overflow_at=2)
    assert int(optimizer.state[next(model.parameters())]["step"]) == len(BATCHES) - 1
    for p in model.parameters():
        assert torch.isfinite(p).all()
        assert torch.isfinite(optimizer.state[p]["hess"]).all()
        assert (optimizer.state[p]["hess"] > 0).all()
    mean = optimizer.posterior_mean(next(model.parameters()))
    assert len({float((d - mean).norm()) for d in draws}) == len(draws)
    # Up to the overflow the run is the one without it.
    untouched, expected = scaled(torch.amp.GradScaler("cpu", init_scale=4.0), reference, BATCHES[:2])
    assert all(torch.equal(a, b) for a, b in zip(draws[:4], expected, strict=True))
    assert untouched.param_groups[0]["window"] < optimizer.param_groups[0]["window"]


def test_the_trainer_passes_the_scale_on(tmp_path):
    """fp16 through the Trainer: the scale must reach the hooks."""
    args = tiny.arguments(tmp_path, max_grad_norm=0.0, gradient_accumulation_steps=2)
    plain = IVONTrainer(model=tiny.gpt2(), args=args, train_dataset=tiny.text())
    plain.train()
    trainer = IVONTrainer(model=tiny.gpt2(), args=args, train_dataset=tiny.text())
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)  # fp16=True needs an accelerator
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() == 2.0**8
    for p, q in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(plain.ivon.state[p]["hess"], trainer.ivon.state[q]["hess"])


@pytest.mark.parametrize("hess_approx", ["price", "fisher"])
def test_an_overflow_does_not_reach_the_next_step_where_gradients_are_zeroed_inside(hess_approx):
    """The first overflow, which a scaler's start value is for, would make all later averages infinite."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = IVON([p], lr=0.1, ess=100.0, hess_approx=hess_approx, batch_size=1.0, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    draws = []
    for step in range(10):
        with optimizer.sampled_params(train=True, grad_scale=scaler.get_scale()):
            draws.append(float(p[0]))
            optimizer.zero_grad()
            scaler.scale((p * 2).sum() * (float("inf") if step == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert int(optimizer.state[p]["step"]) == 9
    assert scaler.get_scale() == 512.0
    assert torch.isfinite(optimizer.state[p]["hess"]).all()
    assert len(set(draws)) == len(draws), "the noise of the skipped step came again"


def test_an_overflow_in_one_of_several_samples_skips_their_step():
    """Dropped alone, it would leave a step of fewer samples than `mc_samples`, which is an error."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = IVON([p], lr=0.1, ess=100.0, mc_samples=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        for sample in range(2):
            with optimizer.sampled_params(train=True, grad_scale=scaler.get_scale()):
                optimizer.zero_grad()
                scaler.scale((p * 2).sum() * (float("inf") if (step, sample) == (1, 0) else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert int(optimizer.state[p]["step"]) == 3
    assert scaler.get_scale() == 512.0
