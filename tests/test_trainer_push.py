"""Pushes of the Trainer: each holds mean, posterior and card of one step, also when others failed."""

import logging
import re

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_ivon import IVONTrainer, Posterior, load_posterior
from hf_ivon.checkpoint import posterior_files
from hf_ivon.hub import push
from tests import tiny
from tests.hub_server import hub
from tests.test_trainer_saving import lora

__all__ = ["hub"]
NAME = "me/model"


class Keep(TrainerCallback):
    """Keeps mean and posterior of every save."""

    def __init__(self):
        self.saved = []

    def on_save(self, args, state, control, **kwargs):
        mean = {name: p.detach().clone() for name, p in self.trainer.model.named_parameters()}
        self.saved.append((mean, self.trainer.posterior()))


def make(directory, model=None, **settings):
    """Return a Trainer of 4 steps that saves after each 2 and pushes every time, and what it will have saved."""
    keep = Keep()
    defaults = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 2, "hub_model_id": NAME}
    args = tiny.arguments(directory / "model", **{**defaults, "hub_always_push": True, **settings})
    keep.trainer = IVONTrainer(model=model or tiny.gpt2(), args=args, train_dataset=tiny.text(), callbacks=[keep])
    return keep.trainer, keep.saved


def assert_commit(repository, oid, saved, tmp_path, subfolder=""):
    """Download one commit and compare it with what was saved, to the last bit; return its card."""
    mean, posterior = saved
    directory = tmp_path / "downloads" / oid
    snapshot_download(NAME, revision=oid, local_dir=directory)
    model = AutoModelForCausalLM.from_pretrained(directory / subfolder)
    for name, p in model.named_parameters():
        assert torch.equal(p, mean[name]), name
    found = load_posterior(directory / subfolder, model)
    assert found.config == posterior.config
    assert all(torch.equal(found.variance[n], posterior.variance[n]) for n in posterior.names())
    return ModelCard.load(directory / "README.md")


# By strategy, the message of each commit and the number of the save that it holds.
STRATEGIES = {
    "end": [("End of training", 1)],
    "every_save": [("step 2", 0), ("step 4", 1), ("End of training", 1)],
    "checkpoint": [("step 2", 0), ("last", 0), ("step 4", 1), ("last", 1), ("End of training", 1)],
    "all_checkpoints": [("step 2", 0), ("-2", 0), ("step 4", 1), ("-4", 1), ("End of training", 1)],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_commit_of_every_strategy_is_whole(tmp_path, hub, strategy):
    """A commit in the middle of training would hold a mean without its posterior or card, or those of another step."""
    trainer, saved = make(tmp_path, hub_strategy=strategy)
    trainer.train()
    trainer.push_to_hub()
    repository = hub.repositories[NAME]
    commits = list(zip(list(repository.commits)[1:], repository.messages[1:], strict=True))
    assert len(commits) == len(STRATEGIES[strategy])
    for (oid, message), (part, index) in zip(commits, STRATEGIES[strategy], strict=True):
        is_checkpoint = not part.startswith(("step", "End"))
        assert ("checkpoint" in message) if is_checkpoint else (part in message)
        folder = {"last": "last-checkpoint"}.get(part, f"checkpoint{part}") if is_checkpoint else ""
        card = assert_commit(repository, oid, saved[index], tmp_path, folder)
        assert {"ivon", "posterior"} <= set(card.data.tags)
        assert f"| optimizer steps (`steps`) | {2 * (index + 1)} |" in card.text
        assert "| effective sample size (`ess`) | 10000 |" in card.text
        assert "| training examples (`num_examples`) | 24 |" in card.text
        assert card.data.ivon["learning_rate"] == 0.1
    assert "### Training hyperparameters" in card.text, "the Trainer's own card is kept"
    exec(compile(re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1), "card", "exec"), {})


def test_an_adapter_is_pushed_with_its_posterior(tmp_path, hub):
    """An adapter's files have other names than a model's, and PEFT writes a card of its own."""
    trainer, saved = make(tmp_path, model=lora(), hub_strategy="every_save")
    trainer.train()
    trainer.push_to_hub()
    for oid in list(hub.repositories[NAME].commits)[1:]:
        names = hub.repositories[NAME].commits[oid].keys()
        assert {"adapter_model.safetensors", "posterior.safetensors", "README.md"} <= names
    found, (_, last) = Posterior.from_pretrained(NAME), saved[-1]
    assert found.config == last.config
    assert all(torch.equal(found.variance[n], last.variance[n]) for n in last.names())
    assert ModelCard(hub.repositories[NAME].files["README.md"].decode()).data.library_name == "peft"


def test_a_failed_push_in_the_background_is_reported_and_made_good(tmp_path, hub, caplog):
    """The Trainer throws away the errors of its pushes: an empty repository would be found out weeks later."""
    hub.fail("/commit/", status=403, times=1)
    trainer, saved = make(tmp_path, hub_strategy="every_save")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = [r.getMessage() for r in caplog.records if "push in the background failed" in r.getMessage()]
    assert len(found) == 1
    assert "403" in found[0]
    assert str(tmp_path / "model") in found[0]
    (oid,) = list(hub.repositories[NAME].commits)[1:]
    assert_commit(hub.repositories[NAME], oid, saved[1], tmp_path)


@pytest.mark.parametrize("match", ["PUT /lfs/", "/commit/"])
def test_nothing_is_lost_when_the_last_push_fails(tmp_path, hub, match):
    """Days of training would be gone if the line breaks at the end; after that, one command has to do."""
    trainer, saved = make(tmp_path, hub_strategy="end")
    trainer.train()
    hub.fail(match, status=403)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        trainer.push_to_hub()
    assert hub.repositories[NAME].files == {}
    hub.faults.clear()
    mean, posterior = saved[-1]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert all(torch.equal(p, mean[name]) for name, p in model.named_parameters())
    push(tmp_path / "model", NAME)
    assert_commit(hub.repositories[NAME], hub.repositories[NAME].branches["main"], saved[-1], tmp_path)


def test_a_push_is_not_changed_under_way(tmp_path, hub):
    """With `hub_always_push`, files that are being uploaded would be written over by the next save."""
    hub.delay = 0.03
    trainer, saved = make(tmp_path, hub_strategy="every_save", save_steps=1)
    trainer.train()
    commits = list(hub.repositories[NAME].commits)[1:]
    assert len(commits) == len(saved) == 4
    for oid, pair in zip(commits, saved, strict=True):
        assert_commit(hub.repositories[NAME], oid, pair, tmp_path)


def test_no_push_leaves_the_output_directory_alone(tmp_path, hub):
    """Without a push the directory would get a posterior that belongs to none of its means."""
    trainer, _ = make(tmp_path, hub_strategy="end")
    trainer.train()
    assert not posterior_files(tmp_path / "model")
    assert posterior_files(tmp_path / "model" / "checkpoint-4")


def test_a_readme_that_cannot_be_read_does_not_stop_training(tmp_path, hub, caplog):
    """A slip in a README's metadata would cost the run."""
    trainer, _ = make(tmp_path, hub_strategy="every_save")
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "README.md").write_text("---\ntags: [\n---\n")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4
    assert "The model card is written without the posterior: The metadata of" in caplog.text
