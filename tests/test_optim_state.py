"""A saved state and the options that come with it."""

import copy
import io

import numpy as np
import pytest
import torch

from hf_ivon.optim import IVON
from tests.test_optim_memory import SIZES, assert_same, make, train


@SIZES
@pytest.mark.parametrize("saved", ["price", "gradsq", "fisher"])
@pytest.mark.parametrize("built", ["price", "gradsq", "fisher"])
@pytest.mark.parametrize("unfinished", [False, True])
def test_a_state_brings_its_estimator(rows, saved, built, unfinished):
    """A run resumed with another `hess_approx` must go on as it was; products taken for squares spoil the Hessian."""
    settings = {"hess_init": 0.1, "batch_size": 3.0}
    model, optimizer = make(rows, hess_approx=saved, **settings)
    train(model, optimizer)
    other, resumed = make(rows, hess_approx=built, **settings)
    if unfinished:  # a window of the other estimator, which loading drops
        with resumed.sampled_params(train=True):
            other(torch.ones(1, 4)).sum().backward()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch takes tensors as they are
    assert resumed.param_groups[0]["hess_approx"] == saved
    for some, opt in ((model, optimizer), (other, resumed)):
        train(some, opt, steps=3)
    assert_same(other, resumed, model, optimizer)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("where", ["optimizer", "group", "added"])
def test_numbers_of_numpy_are_taken_and_saved_as_plain_ones(number, where):
    """`ess=np.float32(...)` is a number; in a checkpoint it would be a pickle that resuming refuses to read."""
    options = {"ess": number(64.0), "weight_decay": number(0.25), "mc_samples": np.int64(2), "seed": np.int32(7)}
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    if where == "optimizer":
        optimizer = IVON([p], lr=number(0.5), **options)
    elif where == "group":
        optimizer = IVON([{"params": [p], **options}], lr=0.5, ess=1.0)
    else:
        optimizer = IVON([q], lr=0.5, ess=1.0)
        optimizer.add_param_group({"params": [p], **options})
    group = optimizer.param_groups[-1]
    assert {name: (type(group[name]), group[name]) for name in options} == {
        "ess": (float, 64.0),
        "weight_decay": (float, 0.25),
        "mc_samples": (int, 2),
        "seed": (int, 7),
    }
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("ess", [np.float32("nan"), np.float32(0), np.bool_(True), torch.tensor(5.0), "5"])
def test_what_is_no_number_is_refused(ess):
    """A value that means something else must not be turned into a number on the way."""
    with pytest.raises(ValueError, match="`ess` must be a positive number"):
        IVON([torch.nn.Parameter(torch.ones(3))], lr=0.1, ess=ess)
