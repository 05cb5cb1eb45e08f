"""`from_pretrained("owner/name")`: huggingface_hub's own code against a server on this machine that speaks its API."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

GOLDEN = Path(__file__).parents[3] / "parity" / "golden" / "hf_mamba_tiny_random" / "hf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    **{name: (GOLDEN / name).read_bytes() for name in ("config.json", "model.safetensors", "generation_config.json")},
    "README.md": b"# tiny", "modeling_tiny.py": b"open('executed', 'w')", "optimizer.pt": b"never",
    "training_args.bin": b"never", "onnx/model.onnx": b"never",
}  # fmt: skip
WANTED = {"config.json", "model.safetensors", "generation_config.json", "README.md"}


class Hub(ThreadingHTTPServer):
    """One repository, someone/tiny; `cut` bytes are missing from the end of its weights."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: Counter[tuple[str, str]] = Counter()
        self.cut = 0


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, body):
        path = unquote(urlsplit(self.path).path)
        self.server.asked[self.command, path] += 1
        api, kind, revision = path.replace("/tree/", "/revision/").partition("/revision/")
        repository, _, rest = path.lstrip("/").partition("/resolve/")
        if "private" in path:
            self._send(403, b"{}", body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif "someone/tiny" not in path:
            self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif api == "/api/models/someone/tiny":
            self._revision(revision if kind else "main", "/tree/" in path, body)
        elif repository == "someone/tiny" and rest.partition("/")[2] in FILES:
            self._file(rest.partition("/")[2], body)
        else:
            self._send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})

    def _revision(self, revision, tree, body):
        if revision not in ("main", "v1", COMMIT):
            self._send(404, b"{}", body, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return
        ids = {name: hashlib.sha1(content).hexdigest() for name, content in FILES.items()}
        if tree:
            answer: Any = [{"type": "file", "path": n, "size": len(FILES[n]), "oid": oid} for n, oid in ids.items()]
        else:
            siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
            answer = {"id": "someone/tiny", "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        self._send(200, json.dumps(answer).encode(), body, {})

    def _file(self, name, body):
        content, etag = FILES[name], hashlib.sha256(FILES[name]).hexdigest()
        cut = self.server.cut if name == "model.safetensors" and body else 0
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
        self._send(200, content[: len(content) - cut], body, headers)
        if cut:
            self.close_connection = True

    def _send(self, status, content, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


CHILD = """
import json, sys
from compat_torch.checkpoint.hub import fetch
from compat_torch.errors import CheckpointError

answers = []
for repository, revision in json.loads(sys.argv[1]):
    try:
        answers.append(["folder", str(fetch(repository, revision))])
    except CheckpointError as err:
        answers.append(["error", str(err)])
if len(sys.argv) > 2:
    from compat_torch import from_pretrained
    answers.append(["model", type(from_pretrained(sys.argv[2])).__name__])
print(json.dumps(answers))
"""


def child(hub, cache, *questions, load=None, **env):
    """What `fetch` answers, in a process of its own whose hub is the server."""
    host, port = hub.server_address
    settings = {
        "HF_ENDPOINT": f"http://{host}:{port}", "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "JAX_PLATFORMS": "cpu", "NO_PROXY": "*",
    }  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    command = [sys.executable, "-c", CHILD, json.dumps(questions), *([load] if load else [])]
    done = subprocess.run(
        command, env={**kept, **settings, **env}, cwd=cache, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def downloads(hub):
    return {path.rpartition("/")[2]: count for (method, path), count in hub.asked.items() if method == "GET"}


def test_download_then_cache_then_offline(hub, tmp_path):
    answers = child(hub, tmp_path, ["someone/tiny", None], ["someone/tiny", "v1"], load="someone/tiny")
    assert [kind for kind, _ in answers] == ["folder", "folder", "model"]
    folder = Path(answers[0][1])
    assert answers[1][1] == str(folder)
    assert answers[2][1] == "MambaLMHeadModel"
    assert folder.name == COMMIT
    assert {path.name for path in folder.iterdir()} == WANTED
    for name in WANTED:
        assert (folder / name).read_bytes() == FILES[name]
    assert {name: downloads(hub).get(name, 0) for name in FILES} == {name: int(name in WANTED) for name in FILES}
    assert not (tmp_path / "executed").exists()

    hub.asked.clear()
    answers = child(
        hub, tmp_path, ["someone/tiny", None], ["someone/absent", None], load="someone/tiny", HF_HUB_OFFLINE="1"
    )
    assert answers[0] == ["folder", str(folder)]
    assert answers[1][0] == "error"
    assert "'someone/absent' cannot be fetched" in answers[1][1]
    assert answers[2] == ["model", "MambaLMHeadModel"]
    assert not hub.asked


def test_what_cannot_be_had(hub, tmp_path):
    questions = [["someone/absent", None], ["someone/tiny", "v9"], ["someone/private", None]]
    answers = child(hub, tmp_path, *questions)
    for (repository, revision), (kind, message) in zip(questions, answers, strict=True):
        assert kind == "error"
        assert repository in message
        assert "\n" not in message
        assert revision is None or revision in message
        assert len(message) < 500
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_download_that_breaks_off(hub, tmp_path):
    hub.cut = 100
    ((kind, message),) = child(hub, tmp_path, ["someone/tiny", None])
    assert (kind, "cannot be fetched" in message) == ("error", True)
    assert not [path for path in tmp_path.rglob("model.safetensors") if path.stat().st_size]
    hub.cut = 0
    ((kind, folder),) = child(hub, tmp_path, ["someone/tiny", None])
    assert kind == "folder"
    assert (Path(folder) / "model.safetensors").read_bytes() == FILES["model.safetensors"]
