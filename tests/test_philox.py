"""The noise: known answers, what normal draws look like, and that any part of it can be made alone."""

import math

import pytest
import torch
from torch import nn

from hf_ivon import philox
from hf_ivon.execution import Execution
from hf_ivon.optim import IVON
from hf_ivon.packs import Pack
from hf_ivon.state import complete_state


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (7, (2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, (2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            10,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(rounds, counter, key, expected):
    """The generator must be the one that was tested for randomness, not something like it (Random123's vectors)."""
    counter, key = (tuple(torch.tensor([word]) for word in words) for words in (counter, key))
    assert tuple(int(word) for word in philox.philox4x32(counter, key, rounds)) == expected


def test_box_muller_is_the_textbook_formula():
    """The polynomials for sine and cosine must be as good as fp32 allows, over the whole circle."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(2**32, (2, 100_000), generator=generator)
    uniform = ((first >> 8).float() + 0.5).double() / 2**24  # fp32 has no halves above 2**23
    radius = (-2.0 * uniform.log()).sqrt()
    angle = 2.0 * math.pi * ((second >> 8).double() + 0.5 - 2**23) / 2**24
    draws = philox.box_muller(first, second)
    for draw, expected in zip(draws, (radius * angle.cos(), radius * angle.sin()), strict=True):
        torch.testing.assert_close(draw.double(), expected, rtol=0.0, atol=3e-6)


def test_noise_is_standard_normal_and_independent_between_lanes_tensors_and_keys():
    """A wrong width of the noise would be a wrong posterior; equal noise in two places a wrong Hessian."""
    n = 400_000
    draws = [
        philox.normal_range(0, n, n, philox.noise_words(key, index))
        for key, index in (((1, 0), 0), ((1, 0), 1), ((1, 1), 0), ((2, 0), 0))
    ]
    lanes = draws[0].view(4, -1)
    for x in [*draws, *lanes]:
        error = 5.0 / len(x) ** 0.5  # five standard errors of a mean of unit variance
        assert abs(x.mean()) < error
        assert abs(x.var() - 1.0) < error * 2**0.5
        assert abs(x.pow(4).mean() - 3.0) < error * 96**0.5
    for group in (torch.stack(draws), lanes):
        correlation = torch.corrcoef(group) - torch.eye(4)
        assert correlation.abs().max() < 5.0 / group.shape[1] ** 0.5


@pytest.mark.parametrize("total", [1, 2, 5, 8, 1003])
def test_noise_does_not_depend_on_how_a_tensor_is_cut(total):
    """Shards would get another sample than one process."""
    words = philox.noise_words((1, 2), 3)
    whole = philox.normal_range(0, total, total, words)
    assert whole.shape == (total,)
    for start in {0, total // 4, total // 2, total - 1}:
        for stop in {start, start + 1, total}:
            assert torch.equal(philox.normal_range(start, stop, total, words), whole[start:stop])


def drawn(params, indices, key):
    """The noise of a pack: with mean 0 and variance 1, what is drawn is the noise."""
    group = {"hess_init": 1.0, "prior_mean": "zero"}
    states = [{} for _ in params]
    for p, state in zip(params, states, strict=True):
        complete_state(p, group, state)
    pack = Pack(group, params, indices, states)
    pack.read("mean").zero_()
    Execution(foreach=True, fused=False).sample_pack(pack, philox.noise_words(key, 0), ess=1.0, weight_decay=0.0)
    return pack.flat("theta")


def test_a_pack_gives_each_tensor_the_noise_that_it_has_alone():
    """What a weight's sample is must not depend on which other tensors are small."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((3,), (), (4, 4), (1003,), (2, 1))]
    indices = [4, 0, 7, 9, 2]
    noise = drawn(params, indices, (5, 6))
    for part, p, index in zip(noise.split([p.numel() for p in params]), params, indices, strict=True):
        words = philox.noise_words((5, 6), index)
        torch.testing.assert_close(part, philox.normal_range(0, p.numel(), p.numel(), words), rtol=0.0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("fused", [False, True])
def test_words_go_to_an_accelerator_without_waiting_for_it(fused):
    """A wait for every tensor would stall the device a hundred times a step."""
    small = [nn.Parameter(torch.zeros(100, device="cuda")) for _ in range(3)]
    params = [*small, nn.Parameter(torch.zeros(2**18, device="cuda"))]
    optimizer = IVON(params, lr=0.1, ess=10.0, fused=fused)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with optimizer.sampled_params():
                pass
        finally:
            torch.cuda.set_sync_debug_mode("default")
