"""A Hub on a port of this machine: repositories, uploads in the LFS protocol, commits, trees, downloads, faults."""

import base64
import hashlib
import http.server
import json
import os
import threading
import time
import types
import urllib.parse

import huggingface_hub
import pytest
from huggingface_hub import constants

OWNER = "me"


class Repository:
    """Files by commit; `main` and pull requests are names of commits."""

    def __init__(self):
        self.commits, self.branches, self.messages = {}, {}, []
        self.commit("main", {}, "initial commit")

    def commit(self, branch, files, message):
        """Keep the files as a new commit of a branch; return its id."""
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = dict(files), oid
        self.messages.append(message)
        return oid

    def at(self, revision):
        """Return a revision's commit id and its files; None if there is none."""
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None

    @property
    def files(self):
        """The newest files of the main branch."""
        return self.at("main")[1]


class Handler(http.server.BaseHTTPRequestHandler):
    """The parts of the Hub that uploads and downloads ask for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.read_chunks()
        path = urllib.parse.unquote(self.path.partition("?")[0])
        hub = self.server.hub
        time.sleep(hub.delay)
        with hub.lock:
            hub.asked.append(f"{self.command} {path}")
            fault = next((f for f in hub.faults if f["match"] in hub.asked[-1] and f["times"] > 0), None)
            if fault is not None:
                fault["times"] -= 1
                if fault["status"] is None:  # the connection breaks
                    self.close_connection = True
                    self.connection.close()
                    return
                return self.send(fault["status"], b"fault", fault["headers"])
            self.answer(path, body)

    def read_chunks(self):
        """Read a body of unknown length."""
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def answer(self, path, body):
        parts = [urllib.parse.unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if parts[0] == "lfs":
            return self.lfs(parts, body)
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        api = parts[0] == "api"
        name = "/".join(parts[2:4] if api else parts[:2]).removesuffix(".git")
        repository = self.server.hub.repositories.get(name)
        if repository is None:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        action, rest = ([*parts[4:], ""][0], parts[5:]) if api else ([*parts[2:], ""][0], parts[3:])
        if path.endswith("info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if action == "preupload":
            files = json.loads(body)["files"]
            return self.json({
                "files": [{**f, "uploadMode": self.mode(f["path"]), "shouldIgnore": False} for f in files]
            })
        if action == "commit":
            return self.commit(name, repository, rest[0], body)
        found = repository.at((rest or ["main"])[0])
        if found is None:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Revision not found"})
        oid, files = found
        if action == "tree":
            return self.json([self.described(f, data) for f, data in files.items()])
        if action == "resolve":
            return self.resolve(oid, files, "/".join(rest[1:]))
        siblings = [{"rfilename": f} for f in files]
        return self.json({"id": name, "modelId": name, "sha": oid, "private": False, "siblings": siblings})

    def create(self, asked):
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        exists = name in self.server.hub.repositories
        self.server.hub.created.append(asked)
        self.server.hub.create(name)
        url = f"{self.server.hub.endpoint}/{name}"
        self.json({"url": url, "name": name, "id": name}, 409 if exists else 200)

    def batch(self, asked):
        hub = self.server.hub
        objects = []
        for wanted in asked["objects"]:
            href = f"{hub.endpoint}/lfs/{wanted['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append({**wanted, **({} if wanted["oid"] in hub.blobs else {"actions": actions})})
        self.json({"transfer": "basic", "objects": objects})

    def lfs(self, parts, body):
        if parts[-1] == "verify":
            return self.json({}, 200 if json.loads(body)["oid"] in self.server.hub.blobs else 404)
        assert hashlib.sha256(body).hexdigest() == parts[1], "the upload is not what was announced"
        self.server.hub.blobs[parts[1]] = body
        self.send(200, b"")

    def commit(self, name, repository, revision, body):
        files, message = dict(repository.at(revision)[1]), ""
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.hub.blobs[value["oid"]]
            else:
                del files[value["path"]]
        pr = "create_pr=1" in self.path
        oid = repository.commit("refs/pr/1" if pr else revision, files, message)
        url = f"{self.server.hub.endpoint}/{name}/commit/{oid}"
        more = {"pullRequestUrl": f"{self.server.hub.endpoint}/{name}/discussions/1"} if pr else {}
        self.json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": "", **more})

    def resolve(self, oid, files, file):
        if file not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": oid}
            return self.send(404, b"", headers)
        data = files[file]
        self.send(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": oid})

    @staticmethod
    def mode(path):
        return "lfs" if path.endswith((".safetensors", ".bin", ".pt", ".pth", ".png")) else "regular"

    def described(self, file, data):
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": file, "size": len(data), "oid": oid} | (
            {"lfs": lfs} if self.mode(file) == "lfs" else {}
        )

    def json(self, value, status=200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""


class Hub:
    """A running Hub.

    Attributes:
        repositories: `Repository` by name.
        asked: Every request, "METHOD PATH".
        blobs: What was uploaded to the store of large files, by digest.
        created: What was asked for when a repository was to be made.
        delay: Seconds before every answer.
        waits: Seconds that the client would have waited before it tried again.
    """

    def __init__(self, server):
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        self.repositories, self.asked, self.blobs, self.waits, self.created = {}, [], {}, [], []
        self.faults, self.delay, self.lock = [], 0.0, threading.RLock()
        server.hub = self

    def create(self, name):
        """Return a repository, an empty one if there is none."""
        return self.repositories.setdefault(name, Repository())

    def fail(self, match, *, times=1000, status=500, headers=None):
        """Answer requests whose "METHOD PATH" holds `match` with a status; None breaks the connection."""
        self.faults.append({"match": match, "times": times, "status": status, "headers": headers})

    def environment(self, home):
        """Return the environment of a fresh process that knows this Hub only."""
        own = {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**os.environ, **own}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on a port of this machine that the Hub's client talks to; nothing waits between retries."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Hub(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": found.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": url,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", found.endpoint)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        clock = types.SimpleNamespace(**{**vars(time), "sleep": found.waits.append})
        monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
        yield found
        server.shutdown()
