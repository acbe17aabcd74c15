"""The Hub: a posterior downloaded from a server on this machine, and what an upload holds."""

import hashlib
import http.server
import json
import threading

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from hf_ivon import Posterior, PosteriorFormatError, hub, save_posterior
from tests import tiny
from tests.test_merge import posterior_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """The parts of the Hub that a download asks for."""

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body):
        files = self.server.files
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        if "/tree/" in path:
            listed = [{"type": "file", "path": f, "size": len(b), "oid": "0" * 40} for f, b in files.items()]
            body, headers = json.dumps(listed).encode(), {"Content-Type": "application/json"}
        elif path.startswith("/api/models/me/model"):
            body = json.dumps({
                "id": "me/model",
                "sha": COMMIT,
                "siblings": [{"rfilename": f} for f in files],
            }).encode()
            headers = {"Content-Type": "application/json"}
        elif path.rpartition("resolve/")[2].partition("/")[2] in files:
            body = files[path.rpartition("resolve/")[2].partition("/")[2]]
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        else:
            self.send_response(404)
            self.end_headers()
            return
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def server(monkeypatch):
    """A Hub with one repository, on a port of this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.files, found.asked = {}, []
        threading.Thread(target=found.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{found.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
        yield found
        found.shutdown()


def make(directory, **options):
    model = tiny.bert()
    posterior, _ = posterior_of(model, 100, torch.Generator().manual_seed(0))
    save_posterior(posterior, directory, **options)
    return model, posterior


@pytest.mark.parametrize("subfolder", ["", "last"])
def test_only_the_posteriors_files_are_downloaded(tmp_path, server, subfolder):
    """Whoever wants the variances of a large model must not download its weights twice; also from a folder."""
    model, posterior = make(tmp_path / "files", max_shard_size=4000)
    prefix = f"{subfolder}/" if subfolder else ""
    server.files.update({prefix + f.name: f.read_bytes() for f in (tmp_path / "files").iterdir()})
    server.files["model.safetensors"] = b"many gigabytes"
    options = {"subfolder": subfolder, "cache_dir": tmp_path / "cache"}
    found = Posterior.from_pretrained("me/model", model, revision="main", **options)
    assert all(torch.equal(found.variance[n], posterior.variance[n]) for n in posterior.names())
    assert not any("model.safetensors" in path for path in server.asked)
    server.asked.clear()
    again = Posterior.from_pretrained("me/model", model, revision=COMMIT, local_files_only=True, **options)
    assert again.names() == posterior.names()
    assert not server.asked


def test_a_repository_without_a_posterior_says_so(tmp_path, server):
    """A plain model's repository must not look like a broken download."""
    server.files["config.json"] = b"{}"
    with pytest.raises(
        PosteriorFormatError, match="posterior_config.json is missing; posterior.safetensors is missing"
    ):
        Posterior.from_pretrained("me/model", cache_dir=tmp_path)


def test_an_upload_replaces_the_earlier_posterior(tmp_path, monkeypatch):
    """Shards of an earlier upload that stay would make the new one unreadable."""
    calls = {}

    class Api:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["repo"] = (repo_id, options)

        def upload_folder(self, folder_path, **options):
            calls["options"] = options
            calls["loaded"] = Posterior.from_pretrained(folder_path)
            return "info"

    monkeypatch.setattr(hub, "HfApi", Api)
    _, posterior = make(tmp_path)
    assert posterior.push_to_hub("me/model", private=True, token="t", create_pr=True, max_shard_size=4000) == "info"
    assert calls["token"] == "t"
    assert calls["repo"] == ("me/model", {"private": True, "exist_ok": True})
    assert calls["options"]["create_pr"] is True
    assert {"posterior*.safetensors", "posterior_config.json"} <= set(calls["options"]["delete_patterns"])
    assert calls["loaded"].names() == posterior.names()
