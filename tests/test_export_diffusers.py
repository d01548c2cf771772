"""A DiTPipeline opened on our export is our network, and draws what our samplers draw."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline

import export
from checkpoints.generate import generate_latents, streams
from checkpoints.load import load_run
from guidance import Guidance
from system import UserError
from tests import started
from tests.conftest import ROOT
from tests.made_runs import make_run
from weights.pipeline import pixel_vae

SEEDS, LABELS = [3, 4, 5], torch.tensor([0, 2, 1])


SMALL = [
    "data.path=nowhere", "data.input_size=8", "data.channels=1", "data.num_classes=3", "model.size=DiT-XS/2",
    "model.depth=3", "model.hidden_size=32", "model.num_heads=2",
]  # fmt: skip


def exported(folder, out, *overrides):
    export.main([f"ckpt={folder}", f"out={out}", "format=diffusers", *overrides])
    pipeline = DiTPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    for block in pipeline.transformer.transformer_blocks:  # the card's line
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return pipeline


@pytest.fixture(scope="module", params=[False, True], ids=["", "learned sigma"])
def opened(request, tmp_path_factory):
    """(run, pipeline)"""
    folder = tmp_path_factory.mktemp("ddpm")
    run = make_run(folder / "run", [*SMALL, "objective=ddpm", "model=dit", f"model.learn_sigma={request.param}"])
    return load_run(run, device="cpu"), exported(run, folder / "pipeline"), folder / "pipeline"


def test_the_transformer_is_our_network(opened):
    run, pipeline, _ = opened
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 500, 999])
    with torch.no_grad():
        found = pipeline.transformer(x, timestep=t, class_labels=torch.tensor([0, 1, 2, 1000])).sample
        torch.testing.assert_close(found, run.model(x, t.float(), torch.tensor([0, 1, 2, 3])), rtol=0, atol=1e-5)


class Shrink:
    """Stands in for the VAE: samples of random weights are large, and the pipeline clamps images."""

    config, dtype = SimpleNamespace(scaling_factor=1.0), torch.float32

    def decode(self, latents):
        return SimpleNamespace(sample=latents / 1000)


def drawn(pipeline, labels, **settings):
    """Latents / 1000 of the pipeline."""
    pipeline.register_modules(vae=Shrink())
    return 2 * pipeline(labels, output_type="pt", **settings).images - 1


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_ddim_draws_what_our_ddim_draws(opened, scale, num_steps):
    run, pipeline, _ = opened
    sampler = {"takes": "noise", "solver": "ddim", "spacing": "leading", "num_steps": num_steps}
    expected = generate_latents(run, Guidance(scale=scale), SEEDS, LABELS, sampler) / 1000
    noise = streams(SEEDS, "noise")
    found = drawn(pipeline, LABELS.tolist(), guidance_scale=scale, generator=noise, num_inference_steps=num_steps)
    assert 0.01 < expected.std() and expected.abs().max() < 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_ancestral_steps_draw_what_ours_draw(opened, monkeypatch):
    """DiTPipeline cuts learned variances off: diffusers' fixed ones are our variance=small."""
    run, pipeline, _ = opened
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="linspace")
    streams_of = {"dit.pipeline_dit": streams([3], "noise")[0], "scheduling_ddpm": streams([3], "churn")[0]}
    for module, stream in streams_of.items():
        draw = lambda *args, stream=stream, **kwargs: torch.randn(1, 1, 8, 8, generator=stream)
        package = "pipelines" if "pipeline" in module else "schedulers"
        monkeypatch.setattr(f"diffusers.{package}.{module}.randn_tensor", draw)
    ancestral = DiTPipeline(pipeline.transformer, pipeline.vae, scheduler)
    ancestral.set_progress_bar_config(disable=True)
    found = drawn(ancestral, [2], guidance_scale=1.0, num_inference_steps=25)
    sampler = {"takes": "noise", "num_steps": 25, "variance": "small"}
    expected = generate_latents(run, Guidance(), [3], torch.tensor([2]), sampler) / 1000
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_folder_says_what_it_is(opened):
    run, pipeline, out = opened
    assert pipeline.labels == {"0": 0, "1": 1, "2": 2} and pipeline.get_label_ids(["2"]) == [2]
    card = (out / "README.md").read_text()
    assert "downscale_freq_shift = 0" in card and "ckpt=" not in card
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["beta_end"] == 0.02
    for path in out.rglob("*"):
        assert path.is_dir() or str(run.folder.parent).encode() not in path.read_bytes()  # nobody's machine


@pytest.mark.parametrize("channels", [1, 3])
def test_the_vae_of_pixels_hands_them_on(channels):
    x = torch.rand(2, channels, 28, 28) * 2.6 - 1.3
    torch.testing.assert_close(pixel_vae(channels).decode(x).sample, x.expand(-1, 3, -1, -1), rtol=0, atol=1e-4)


def test_latents_come_with_their_vae_and_its_scale(tmp_path):
    AutoencoderKL(
        latent_channels=4, block_out_channels=(8,), norm_num_groups=1, layers_per_block=1
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    codec = ["data.codec.path=" + str(tmp_path / "vae"), "data=folder", "data.channels=4", "data.codec.scale=0.25"]
    run = make_run(tmp_path / "run", [*SMALL, "objective=ddpm", "model=dit", *codec])
    pipeline = exported(run, tmp_path / "pipeline", "dtype=float16")
    assert pipeline.vae.config.scaling_factor == 0.25 and pipeline.transformer.config.in_channels == 4
    assert pipeline([0], num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("overrides", [["objective=edm", "model=dit"], ["objective=ddpm", "model=lightningdit"]])
def test_other_networks_are_refused(overrides, tmp_path):
    run = make_run(tmp_path / "run", [*SMALL, *overrides])
    with pytest.raises(UserError, match="format=diffusers needs a DiT with objective=ddpm"):
        export.main([f"ckpt={run}", f"out={tmp_path / 'out'}", "format=diffusers"])
    command = [sys.executable, "export.py", f"ckpt={run}", f"out={tmp_path / 'out'}", "format=diffusers"]
    done = started.run(command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_layout_that_diffusers_lacks_is_refused(tmp_path):
    run = make_run(tmp_path / "run", [*SMALL, "objective=ddpm", "model=dit", "+model.mlp_ratio=2.0"])
    with pytest.raises(UserError, match="needs a DiT of mlp_ratio 4"):
        export.main([f"ckpt={run}", f"out={tmp_path / 'out'}", "format=diffusers"])
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """Stands in for the hub: keeps what is committed; the owner `nobody` may not."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"]))
        if self.path.endswith("/create"):
            name = json.loads(body)["name"]
            refused = json.loads(body).get("organization") == "nobody"
            return self.answer(
                {"error": "no rights"} if refused else {"url": f"{self.server.url}/me/{name}"}, 403 if refused else 200
            )
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(
                {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.server.url}/me/digits/commit/0"}
            )
        self.answer({"errors": [], "warnings": []})

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.files, server.url = [], {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_push_uploads_the_folder_with_its_card(hub, tmp_path):
    run = make_run(tmp_path / "run", [*SMALL, "objective=ddpm", "model=dit"])
    offline = ("HF_HUB_OFFLINE", "HF_TOKEN")
    environment = {key: value for key, value in os.environ.items() if key not in offline}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "export.py", f"ckpt={run}", f"out={tmp_path / 'out'}"]

    def push(*overrides, **changes):
        call = [*command, *overrides]
        return subprocess.run(call, cwd=ROOT, env=environment | changes, capture_output=True, text=True, timeout=180)

    refused = push("push=nobody/digits")
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1].startswith("error: push=nobody/digits: ")
    offline = push("push=me/digits", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and offline.stderr.count("error: push=me/digits") == 1
    assert not (tmp_path / "out").exists()  # all of this before the work
    done = push("push=me/digits")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == hub.files.keys()
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in hub.files.items())
    assert all(token == "Bearer secret" for path, token in hub.asked if "validate" not in path)


def test_push_needs_a_name_and_a_folder(tmp_path):
    told = "push=digits; needed: text such as owner/name", "needed: format=safetensors or diffusers"
    for overrides, message in zip((["push=digits"], ["push=me/digits", "format=dit"]), told):
        with pytest.raises(UserError, match=message):
            export.main([f"ckpt={tmp_path}", f"out={tmp_path / 'out'}", *overrides])
