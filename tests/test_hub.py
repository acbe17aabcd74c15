"""The Hub: what was saved here is, downloaded elsewhere, the same to the last bit, also after uploads that failed."""

import json
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from hf_ivon import Posterior, PosteriorFormatError, load_posterior, save_posterior
from hf_ivon.checkpoint import posterior_files
from hf_ivon.hub import push
from tests import tiny
from tests.classifiers import invoke
from tests.hub_server import hub
from tests.test_merge import posterior_of

__all__ = ["hub"]
NAME = "me/model"


def make(directory, seed=0, shards="5GB"):
    """Save a classifier with its posterior, as training leaves it; return both."""
    model = tiny.bert(seed=seed)
    posterior, _ = posterior_of(model, 100, torch.Generator().manual_seed(seed))
    model.save_pretrained(directory, max_shard_size=shards)
    save_posterior(posterior, directory, max_shard_size=shards)
    return model, posterior


def assert_same(name, model, posterior, **options):
    """Download mean and posterior, and compare them with what was saved."""
    found = BertForSequenceClassification.from_pretrained(name, **options)
    for (key, p), (_, q) in zip(model.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(p, q), key
    loaded = Posterior.from_pretrained(name, found, **options)
    assert loaded.config == posterior.config
    assert loaded.names() == posterior.names()
    assert all(torch.equal(loaded.variance[n], posterior.variance[n]) for n in posterior.names())


@pytest.mark.parametrize("shards", ["5GB", "4KB"])
def test_what_was_pushed_comes_back(tmp_path, hub, shards):
    """A download would differ from what was trained, or bring an optimizer that nobody else needs."""
    model, posterior = make(tmp_path / "saved", shards=shards)
    for name in (
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "training_args.bin",
        "checkpoint-5/model.safetensors",
    ):
        (tmp_path / "saved" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "saved" / name).write_bytes(b"for resuming")
    done = push(tmp_path / "saved", NAME, license="mit", commit_message="first")
    assert hub.repositories[NAME].messages == ["initial commit", "first"]
    assert done.oid == hub.repositories[NAME].branches["main"]
    assert_same(NAME, model, posterior)
    names = {f.name for f in (tmp_path / "saved").iterdir() if f.is_file()}
    assert hub.repositories[NAME].files.keys() == {
        n for n in names if not n.startswith(("optimizer", "rng", "scheduler", "training_args"))
    }


@pytest.mark.parametrize(("first", "second"), [("4KB", "5GB"), ("5GB", "4KB")])
def test_a_second_push_replaces_the_first(tmp_path, hub, first, second):
    """A single file or shards of the first push that stay would be read instead of, or beside, the second's."""
    push(make(tmp_path / "a", 1, first) and tmp_path / "a", NAME)
    hub.repositories[NAME].commit("main", {**hub.repositories[NAME].files, "notes.txt": b"mine"}, "by hand")
    model, posterior = make(tmp_path / "b", 2, second)
    push(tmp_path / "b", NAME)
    assert_same(NAME, model, posterior)
    assert hub.repositories[NAME].files["notes.txt"] == b"mine"
    weights = {f for f in hub.repositories[NAME].files if f.endswith((".safetensors", ".index.json"))}
    assert weights == {f.name for f in (tmp_path / "b").iterdir() if f.name.endswith((".safetensors", ".index.json"))}
    push(tmp_path / "b", NAME)  # nothing has changed: nothing may go away
    assert_same(NAME, model, posterior)


FAULTS = {
    "the repository cannot be made": ("POST /api/repos/create", 500),
    "files are refused": ("/preupload/", 403),
    "the store is full": ("POST /me/model.git/info/lfs", 507),
    "an upload breaks off": ("PUT /lfs/", None),
    "an upload is refused": ("PUT /lfs/", 403),
    "the store has lost it": ("/verify", 404),
    "the commit fails": ("/commit/", 500),
    "too many requests": ("/commit/", 429),
}


@pytest.mark.parametrize("what", FAULTS)
def test_nothing_is_lost_when_a_push_fails(tmp_path, hub, what):
    """Half a model would stand on the Hub in place of a good one, or the directory could not be pushed again."""
    first, earlier = make(tmp_path / "a", 1)
    push(tmp_path / "a", NAME)
    model, posterior = make(tmp_path / "b", 2)
    match, status = FAULTS[what]
    hub.fail(match, status=status)
    result = invoke("push", tmp_path / "b", NAME)
    assert result.exit_code == 2, result.output
    assert "No file on the Hub was changed" in result.output
    assert "Traceback" not in result.output
    assert hub.repositories[NAME].messages == ["initial commit", "Upload model and posterior"]
    assert_same(NAME, first, earlier, cache_dir=tmp_path / "cache-1")
    load_posterior(tmp_path / "b", model)
    hub.faults.clear()
    assert invoke("push", tmp_path / "b", NAME).exit_code == 0
    assert_same(NAME, model, posterior, cache_dir=tmp_path / "cache-2")


def test_a_push_that_is_killed_can_be_made_again(tmp_path, hub):
    """A laptop that is closed in the middle of an upload would leave half a model, on the Hub or on the disk."""
    first, earlier = make(tmp_path / "a", 1)
    push(tmp_path / "a", NAME)
    model, posterior = make(tmp_path / "b", 2, "4KB")
    hub.asked.clear()
    hub.delay = 0.2
    command = [sys.executable, "-m", "hf_ivon", "push", str(tmp_path / "b"), NAME]
    with subprocess.Popen(command, env=hub.environment(tmp_path / "home"), stderr=subprocess.PIPE) as process:
        while process.poll() is None and sum("PUT /lfs/" in asked for asked in hub.asked) < 3:
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
        process.kill()
    hub.delay = 0.0
    assert_same(NAME, first, earlier, cache_dir=tmp_path / "cache-1")
    hub.asked.clear()
    push(tmp_path / "b", NAME)
    assert sum("PUT /lfs/" in asked for asked in hub.asked) <= 6, "what had arrived of eight files was sent again"
    assert_same(NAME, model, posterior, cache_dir=tmp_path / "cache-2")


@pytest.mark.parametrize(("match", "status"), [("PUT /lfs/", None), ("/preupload/", 503), ("/lfs/objects/batch", 429)])
def test_a_passing_fault_is_survived(tmp_path, hub, match, status):
    """A push over a bad line, or one that is asked to slow down, would have to be started again by hand."""
    model, posterior = make(tmp_path / "a")
    headers = {"ratelimit": '"api";r=0;t=55'} if status == 429 else None
    hub.fail(match, times=2, status=status, headers=headers)
    push(tmp_path / "a", NAME)
    assert len(hub.waits) == 2
    assert status != 429 or min(hub.waits) >= 55, "the Hub said how long to wait"
    assert_same(NAME, model, posterior)


def test_a_posterior_of_other_weights_is_not_pushed(tmp_path, hub):
    """The weights were trained further after the posterior was saved: the pair would mislead who downloads it."""
    make(tmp_path, 1)
    tiny.bert(seed=2).save_pretrained(tmp_path)
    result = invoke("push", tmp_path, NAME)
    assert result.exit_code == 2
    assert "the mean beside it is not the one it belongs to" in result.output
    assert "push again" not in result.output
    assert not hub.asked
    for file in posterior_files(tmp_path):
        file.unlink()
    assert "posterior.safetensors is missing" in invoke("push", tmp_path, NAME).output


def test_the_command_says_where_it_went(tmp_path, hub):
    """Options of the command would not reach the Hub."""
    model, posterior = make(tmp_path)
    result = invoke("push", tmp_path, "model", "--license", "mit", "--commit-message", "hello", "--private")
    assert result.exit_code == 0, result.output
    assert f"Pushed: {hub.endpoint}/me/model/commit/" in result.output
    assert hub.repositories[NAME].messages[-1] == "hello"
    assert b"license: mit" in hub.repositories[NAME].files["README.md"]
    assert hub.created[-1]["visibility"] == "private" or hub.created[-1]["private"] is True
    model, posterior = make(tmp_path, 2)
    result = invoke("push", tmp_path, NAME, "--create-pr")
    assert f"Pushed: {hub.endpoint}/me/model/discussions/1" in result.output
    assert hub.repositories[NAME].messages[-2:] == ["hello", "Upload model and posterior"]
    assert_same(NAME, model, posterior, revision="refs/pr/1")


def test_a_posterior_alone_does_not_take_the_mean_away(tmp_path, hub):
    """A posterior that was converted into a directory of its own would delete the model that is on the Hub."""
    model, posterior = make(tmp_path / "saved")
    push(tmp_path / "saved", NAME)
    before = dict(hub.repositories[NAME].files)
    save_posterior(posterior, tmp_path / "only")
    hub.asked.clear()
    result = invoke("push", tmp_path / "only", NAME)
    assert result.exit_code == 2, result.output
    assert "must hold the mean" in result.output
    assert f"push_to_hub('{NAME}')" in result.output
    assert not hub.asked
    assert hub.repositories[NAME].files == before
    load_posterior(tmp_path / "only").push_to_hub(NAME)  # as the message says
    assert_same(NAME, model, posterior)


def test_the_mean_loads_without_this_package(tmp_path, hub):
    """Whoever has Transformers only must get the mean, from a repository that also holds a posterior and a card."""
    model, _ = make(tmp_path / "saved")
    push(tmp_path / "saved", NAME)
    code = (
        "import sys; sys.modules['hf_ivon'] = None\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "from safetensors.torch import save_file\n"
        f"model = AutoModelForSequenceClassification.from_pretrained({NAME!r})\n"
        "save_file({k: p.detach().clone() for k, p in model.named_parameters()}, sys.argv[1])\n"
    )
    environment = hub.environment(tmp_path / "home")
    command = [sys.executable, "-c", code, str(tmp_path / "mean.safetensors")]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    mean = load_file(tmp_path / "mean.safetensors")
    assert all(torch.equal(mean[k], p) for k, p in model.named_parameters())


@pytest.mark.parametrize("subfolder", ["", "last"])
def test_only_the_posteriors_files_are_downloaded(tmp_path, hub, subfolder):
    """Whoever wants the variances of a large model must not download its weights twice; also from a folder."""
    model, posterior = make(tmp_path / "saved", shards="4KB")
    push(tmp_path / "saved", NAME)
    prefix = f"{subfolder}/" if subfolder else ""
    files = {prefix + name: data for name, data in hub.repositories[NAME].files.items()}
    commit = hub.repositories[NAME].commit("main", files, "moved")
    hub.asked.clear()
    options = {"subfolder": subfolder, "cache_dir": tmp_path / "cache"}
    found = Posterior.from_pretrained(NAME, model, revision="main", **options)
    assert all(torch.equal(found.variance[n], posterior.variance[n]) for n in posterior.names())
    fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert fetched == {f.name for f in posterior_files(tmp_path / "saved")}
    hub.asked.clear()
    again = Posterior.from_pretrained(NAME, model, revision=commit, local_files_only=True, **options)
    assert again.names() == posterior.names()
    assert not hub.asked


def test_a_repository_without_a_posterior_says_so(hub):
    """A plain model's repository must not look like a broken download."""
    tiny_repository = {"config.json": b"{}"}
    hub.create(NAME).commit("main", tiny_repository, "a model")
    with pytest.raises(
        PosteriorFormatError, match="posterior_config.json is missing; posterior.safetensors is missing"
    ):
        Posterior.from_pretrained(NAME)


@pytest.mark.parametrize("shards", ["5GB", 4000])
def test_a_posterior_goes_beside_the_model_that_is_there(tmp_path, hub, shards):
    """Its upload would lose the card that is there, or leave an earlier posterior's files, or touch the weights."""
    model, _ = make(tmp_path / "a", 1, "4KB")
    push(tmp_path / "a", NAME)
    repository = hub.repositories[NAME]
    card = repository.files["README.md"].replace(b"# model\n", b"# model\n\nWritten by me.\n")
    repository.commit("main", {**repository.files, "README.md": card}, "by hand")
    earlier = dict(repository.files)
    posterior, _ = posterior_of(model, 200, torch.Generator().manual_seed(5))
    done = posterior.push_to_hub(NAME, max_shard_size=shards)
    assert done.oid == repository.branches["main"]
    assert_same(NAME, model, posterior)
    card = repository.files["README.md"].decode()
    assert "Written by me." in card
    assert "| training examples (`num_examples`) | 200 |" in card
    assert "BertForSequenceClassification.from_pretrained" in card
    for name, data in repository.files.items():
        assert name.startswith(("posterior", "README")) or data == earlier[name]


def test_a_posterior_may_come_first(tmp_path, hub):
    """A posterior pushed into a new repository would fail for want of a model and a card."""
    model, posterior = make(tmp_path)
    posterior.push_to_hub(NAME, private=True, create_pr=False)
    found = Posterior.from_pretrained(NAME, model)
    assert found.config == posterior.config
    assert hub.repositories[NAME].files.keys() == {"README.md", "posterior.safetensors", "posterior_config.json"}
    hub.fail("/commit/", status=403)
    with pytest.raises(HfHubHTTPError):
        posterior_of(model, 5, torch.Generator().manual_seed(1))[0].push_to_hub(NAME)
    assert json.loads(hub.repositories[NAME].files["posterior_config.json"])["num_examples"] == 100


def test_a_posterior_may_be_proposed(tmp_path, hub):
    """Who may not write to a repository opens a pull request; written to `main`, it would be published unseen."""
    model, posterior = make(tmp_path)
    posterior.push_to_hub(NAME)
    before = dict(hub.repositories[NAME].files)
    proposed, _ = posterior_of(model, 5, torch.Generator().manual_seed(1))
    done = proposed.push_to_hub(NAME, create_pr=True, commit_message="Another posterior")
    assert done.pr_revision == "refs/pr/1"
    assert hub.repositories[NAME].messages[-1] == "Another posterior"
    assert hub.repositories[NAME].files == before
    assert Posterior.from_pretrained(NAME, model, revision="refs/pr/1").config == proposed.config
