"""hf:owner/name: a stand-in for the hub on loopback, then the cache without it."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import export
from checkpoints.run_folder import split_family
from data.shards import open_latents
from system import UserError, hub
from tests.conftest import ROOT
from tests.made_runs import make_run

REVISION = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Serves folders as repositories: the model me/net, the data set me/latents."""

    def do_GET(self, content=True):
        path = self.path.partition("?")[0]
        for prefix, folder in self.server.folders.items():
            kind, _, name = prefix.partition("/")
            api = f"/api/{kind}/{name}"
            files = f"/{name}/resolve/" if kind == "models" else f"/{kind}/{name}/resolve/"
            if path in (api, f"{api}/revision/main"):
                names = [{"rfilename": str(p.relative_to(folder))} for p in folder.rglob("*") if p.is_file()]
                return self.answer(json.dumps({"id": name, "sha": REVISION, "siblings": names}).encode(), content)
            if path.startswith(f"{api}/tree/"):
                names = [
                    {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": "1" * 40}
                    for p in folder.rglob("*") if p.is_file()
                ]  # fmt: skip
                return self.answer(json.dumps(names).encode(), content)
            if path.startswith(files):
                file = folder / path.removeprefix(files).partition("/")[2]
                if file.is_file():
                    return self.answer(file.read_bytes(), content)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self.do_GET(content=False)

    def answer(self, body, content):
        self.server.sent += content
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if content:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, few_latents):
    run = make_run(tmp_path / "run", [
        f"data.path={few_latents}", "data.input_size=8", "data.channels=1", "data.num_classes=3", "model.size=DiT-XS/2",
        "model=dit", "model.depth=3", "model.hidden_size=32", "model.num_heads=2",
    ])  # fmt: skip
    export.main([f"ckpt={run}", f"out={tmp_path / 'net'}"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    open_latents(few_latents, split="train")  # uploaded with its index and lock, which a download must not follow
    server.folders, server.sent = {"models/me/net": tmp_path / "net", "datasets/me/latents": few_latents}, 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_name_on_the_hub_is_downloaded_once_and_then_cached(server, tmp_path, tiny_overrides):
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf")}
    offline = environment | {"HF_HUB_OFFLINE": "1"}

    def run(environment, *command):
        call = [sys.executable, *command]
        return subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)

    sample = ("sample.py", "ckpt=hf:me/net", "seeds=0-1", "steps=2")
    done = run(environment, *sample, f"out={tmp_path / 'online'}")
    assert done.returncode == 0, done.stderr
    sent = server.sent
    done = run(offline, *sample, f"out={tmp_path / 'offline'}")
    assert done.returncode == 0 and server.sent == sent > 0, done.stderr
    pictures = [(tmp_path / where / "grid.png").read_bytes() for where in ("online", "offline")]
    assert pictures[0] == pictures[1]

    own = [o for o in tiny_overrides if not o.startswith(("data.path=", "train.max_steps"))]
    done = run(
        environment, "train.py", "data.path=hf:me/latents", *own, "train.max_steps=1", "run_name=of-hub",
        f"results_dir={tmp_path}", "init_from=hf:me/net", "model=dit", "model.depth=3", "train.warmup_steps=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(offline, "sample.py", "ckpt=hf:me/other")
    assert done.returncode == 2 and done.stderr.startswith("error: hf:me/other is not cached")
    assert done.stderr.count("\n") == 1


def test_names_and_prefixes(monkeypatch, tmp_path):
    assert hub.local("runs/x") == hub.local(hub.local("runs/x"))
    for name, message in (("hf:name", "needed: hf:owner/name"), ("hf:me/net/no.pt", "not cached")):  # tests are offline
        with pytest.raises(UserError, match=message):
            hub.local(name)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, repo_type: str(tmp_path / "/".join(args)))
    assert split_family("dit:hf:me/net/a/b.pt") == ("dit", tmp_path / "me/net/a/b.pt")
    assert hub.local("hf:me/net/b.pt") == tmp_path / "me/net/b.pt"
