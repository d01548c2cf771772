"""A backbone that is not DiT's is one file and one config: everything works with it, and no other file is touched.

The first test copies the repository, adds the two files and runs the others there, which are skipped elsewhere.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests import started
from tests.conftest import ROOT, assert_same_run, numbers
from tests.made_runs import made_settings
from tests.test_kinds import any_size, drawn, nearly_equal, write_latents

NETWORK = '''"""Gated pooling over tokens, and cross-attention to a text: no mixer of tokens but their gated mean."""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from conditions import Condition, Text
from contracts import Network
from routing_blocks import block_tokens, resolve_routes
from routing_module import Route, Routing, run_blocks


class Pooling(Network):
    """input_size: h, w, or one number; a token is a patch of 2 x 2. text_width: of the texts' states."""

    def __init__(
        self,
        input_size: int | Sequence[int],
        in_channels: int,
        text_width: int,
        width: int = 32,
        depth: int = 4,
        routes: Sequence[Route | Mapping] = (),
    ):
        super().__init__()
        h, w = (input_size, input_size) if isinstance(input_size, int) else input_size
        if h % 2 or w % 2:
            raise ValueError(f"input_size {h} x {w}; needed: even numbers")
        self.latent_shape, self.name = (in_channels, h, w), f"P{depth}"
        self.num_tokens, grid = h * w // 4, (h // 2, w // 2)
        self.routes = resolve_routes(routes, depth, grid)
        self.null_condition = Text(torch.zeros(1, 1, text_width), torch.zeros(1, 1, dtype=torch.bool))
        self.read = nn.Linear(4 * in_channels, width)
        self.places = nn.Parameter(torch.randn(1, self.num_tokens, width))
        self.clock = nn.Linear(1, width)
        self.nothing = nn.Parameter(torch.randn(1, 1, text_width))  # what a text's reader sees where there is none
        self.stages = nn.ModuleList([Stage(width, text_width) for _ in range(depth)])
        self.write = nn.Linear(width, 4 * in_channels)
        self.all_blocks = tuple(self.stages)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, condition: Condition, *, routing: Routing | None = None,
        hidden: Collection[int] = (),
    ):  # fmt: skip
        tokens = self.read(F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)) + self.places  # (B, N, D)
        c = self.clock(t.float()[:, None]).sin()  # (B, D)
        words = torch.cat([self.nothing.expand(len(x), -1, -1), condition.states.float()], dim=1)  # (B, 1 + T, D_text)
        there = F.pad(condition.mask, (1, 0), value=True)[:, None]  # (B, 1, 1 + T)
        blocks, places = enumerate(self.stages), (self.places,)
        tokens, found = run_blocks(blocks, tokens, (c, words, there), places, self.routes, routing, hidden)
        h, w = (side // 2 for side in self.latent_shape[1:])
        out = F.pixel_shuffle(self.write(tokens).transpose(1, 2).unflatten(2, (h, w)), 2)
        return (out, found) if found else out

    def macs(self, routing: Routing | None = None) -> int:
        tokens = block_tokens(self.routes, routing, len(self.stages), self.num_tokens)
        return sum(n * stage.weights for n, stage in zip(tokens, self.stages))


class Stage(nn.Module):
    left_to_adamw = ("words",)

    def __init__(self, width: int, text_width: int):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.ask, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.words = nn.Linear(text_width, 2 * width)
        self.weights = 5 * width**2

    def forward(self, x, c, words, there, places):  # (B, K, D), (B, D), (B, T, D_text), (B, 1, T), (B or 1, K, D)
        gate, value, open_ = self.mix(self.norm(x) + c[:, None]).chunk(3, dim=-1)  # (B, K, D)
        gate = gate.sigmoid()
        pooled = (gate * value).sum(dim=1, keepdim=True) / gate.sum(dim=1, keepdim=True)  # (B, 1, D)
        x = x + open_.sigmoid() * pooled
        keys, values = self.words(words).chunk(2, dim=-1)  # (B, T, D)
        scores = (self.ask(self.norm(x) + places) @ keys.mT).masked_fill(~there, -torch.inf)  # (B, K, T)
        return x + self.out(scores.softmax(dim=-1) @ values)
'''
CONFIG = """_target_: pooling.Pooling
input_size: ${data.input_size}
in_channels: ${data.channels}
text_width: ${data.text_width}
width: 32
depth: 4
routes:
  - {selection_ratio: 0.5, start_layer_idx: 1, end_layer_idx: -2}
"""
ADDED = {"pooling.py": NETWORK, "configs/model/pooling.yaml": CONFIG}
IN_THE_COPY = (ROOT / "pooling.py").exists()
inside = pytest.mark.skipif(not IN_THE_COPY, reason="runs in the copy that has the network")


@pytest.mark.skipif(IN_THE_COPY, reason="this is the copy")
def test_one_file_and_one_config_add_a_network(tmp_path):
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in names:
        if not name.startswith(("records/", "docs/")) and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    for name, text in ADDED.items():
        assert not (ROOT / name).exists()
        (tmp_path / name).write_text(text)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_new_network.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    print(done.stdout)
    assert done.returncode == 0 and "1 skipped" in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    """Keys of a run on texts and latents (3, 6, 10): 15 tokens, 3 x 5."""
    folder = write_latents(tmp_path_factory.mktemp("texts") / "set", "text", (3, 6, 10))
    return [
        "model=pooling", "data=folder", f"data.path={folder}", "data.channels=3", "data.input_size=[6,10]",
        "data.condition=text", "data.text_width=8", "data.num_classes=null", "data.num_workers=0",
        "data.codec._target_=autoencoder.PixelCodec", "~data.codec.path", "~data.codec.scale", "~data.codec.bias",
        "train.global_batch_size=8", "train.max_steps=4", "train.warmup_steps=0", "train.decay_steps=0",
        "train.compile=off", "train.precision=fp32", "train.log_every=1", "train.save_every=0", "train.val_every=2",
        "train.val_samples=8", "preview.every=2", "preview.num_images=4", "sampler.num_steps=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory):
    """run(name, *overrides, stop_after=None) -> (exit code, run folder)."""
    import train as training
    from training.stopping import PreemptionHandler

    results = tmp_path_factory.mktemp("runs")

    def run(name, *more, stop_after=None):
        settings = made_settings([*overrides, f"results_dir={results}", f"run_name={name}", *more])
        with pytest.MonkeyPatch.context() as patch:
            if stop_after is not None:
                patch.setattr(PreemptionHandler, "should_stop", lambda self, step: step == stop_after)
            return training.train(settings), results / name

    return run


@pytest.fixture(scope="module")
def golden(run):
    code, folder = run("golden")
    assert code == 0
    return folder


@inside
def test_it_is_nothing_of_dits():
    import pooling

    from conditions import Text
    from contracts import check_members
    from routing_module import Routing, draw_keep_ids

    assert not re.search(r"\bdit\b", NETWORK) and not hasattr(pooling.Pooling, "blocks")
    torch.manual_seed(0)
    net = pooling.Pooling((6, 10), 3, 8, routes=[dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=2)])
    check_members(net)
    assert (net.num_tokens, net.latent_shape) == (15, (3, 6, 10)) and not hasattr(net, "blocks")
    x, t, text = torch.randn(2, 3, 6, 10), torch.rand(2), Text(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    with torch.no_grad():
        dense = net(x, t, text)
        assert torch.equal(net(x, t, text, routing=Routing(0.0)), dense)
        routing = Routing(generators=torch.Generator().manual_seed(1))
        out, found = net(x, t, text, routing=routing, hidden=[0, 2])
    assert not torch.equal(out, dense) and net.macs(Routing()) < net.macs()
    ids = draw_keep_ids(2, 15, 0.5, generators=torch.Generator().manual_seed(1))
    (tokens, all_kept), (some, kept) = found[0], found[2]
    assert tokens.shape == (2, 15, 32) and all_kept is None
    assert some.shape == (2, 8, 32) and torch.equal(kept, ids) and torch.equal(routing.drawn[0], ids)


@inside
def test_a_dry_run_and_its_cost_are_printed(overrides, tmp_path, capsys):
    import cost

    command = [sys.executable, "train.py", *overrides, "train.dry_run=true", f"results_dir={tmp_path / 'none'}"]
    done = started.run(command)
    assert done.returncode == 0, done.stderr
    assert "model      Pooling P4" in done.stdout and "dry run    one step on noise" in done.stdout
    assert not (tmp_path / "none").exists()
    cost.main(overrides)
    out = capsys.readouterr().out
    assert "routed (blocks 1..2 at 0.5)" in out and "GPU-hours" in out and "memory" in out


@inside
def test_it_trains_validates_and_draws_previews(golden):
    lines = numbers(golden)
    assert len({line["train/loss"] for line in lines if "train/loss" in line}) == 4
    assert [line["step"] for line in lines if {"val/loss_dense", "val/loss_routed"} <= line.keys()] == [2, 4]
    assert {path.name for path in golden.glob("samples/*.png")} == {"step_0000002.png", "step_0000004.png"}
    assert len(load_file(golden / "checkpoints/step_0000004/conditions.safetensors")["mask"]) == 20


@inside
def test_resuming_and_checkpointing_change_no_bit(run, golden):
    from training.stopping import EXIT_START_AGAIN

    assert run("cut", stop_after=2)[0] == EXIT_START_AGAIN
    assert run("cut")[0] == 0
    assert_same_run(golden, golden.with_name("cut"))
    assert run("again", "train.gradient_checkpointing=true")[0] == 0
    assert_same_run(golden, golden.with_name("again"))


@inside
def test_muon_takes_its_matrices_but_not_what_the_text_feeds(run):
    assert run("muon", "optimizer=muon", "train.max_steps=2", stop_after=1)[0] != 0
    code, folder = run("muon", "optimizer=muon", "train.max_steps=2")
    saved = load_file(folder / "checkpoints/step_0000002/optimizer.safetensors")
    ours = {name.rpartition("/")[0] for name in saved if name.endswith("momentum_buffer")}
    assert code == 0 and ours == {f"stages.{i}.{part}.weight" for i in range(4) for part in ("mix", "ask", "out")}
    assert run("whole", "optimizer=muon", "train.max_steps=2")[0] == 0
    assert_same_run(folder, folder.with_name("whole"))


@inside
def test_its_blocks_are_compiled(run, golden, monkeypatch):
    """Each token count is a graph of its own in training; evaluation has one or two."""
    from torch._dynamo.utils import counters

    import train as training

    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(training, "decide_compile", lambda wanted, device: (wanted, ""))
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_(self, **how, backend="aot_eager"))
    code, folder = run("compiled", "train.compile=blocks")
    assert code == 0 and 2 <= counters["stats"]["unique_graphs"] <= 6 and not counters["graph_break"]
    torch.compiler.reset()
    for a, b in zip(numbers(golden), numbers(folder), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@inside
def test_it_is_sampled_and_guided(golden, tmp_path):
    plain = drawn(golden, tmp_path / "plain")
    assert len(set(plain)) == 4 and nearly_equal(plain, drawn(golden, tmp_path / "again", "batch_size=1"))
    for name in ("cfg", "sparse", "icg"):
        guided = drawn(golden, tmp_path / name, f"guidance={name}", "scale=4")
        assert len(guided) == 4 and not set(guided) & set(plain)


@inside
def test_it_is_scored(golden, tmp_path, monkeypatch):
    import fid
    import sample

    any_size(monkeypatch)
    sample.main([f"ckpt={golden}", "seeds=0-9", "steps=2", f"out={tmp_path / 'images'}"])
    fid.main(["ref", f"images={tmp_path / 'images' / 'images'}", "extractor=mnist", f"out={tmp_path / 'ref.npz'}"])
    settings = ["extractor=mnist", f"ref={tmp_path / 'ref.npz'}", "metrics=[fd]", "steps=2"]
    fid.main(["calc", f"ckpt={golden}", "seeds=0-9", "labels=balanced", *settings, f"out={tmp_path / 'same'}"])
    fid.main(["calc", f"ckpt={golden}", "seeds=10-19", *settings, f"out={tmp_path / 'other'}"])
    same, other = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("same", "other"))
    (distance,) = (key for key in same if key.startswith("fd"))
    assert abs(same[distance]) < 1e-3 < other[distance]


@inside
def test_it_is_exported_and_comes_back(golden, tmp_path):
    import export
    from checkpoints.load import load_run

    export.main([f"ckpt={golden}", f"out={tmp_path / 'out'}"])
    run, back = load_run(golden, device="cpu"), load_run(tmp_path / "out", device="cpu")
    assert type(back.model) is type(run.model) and back.model.routes == run.model.routes
    for a, b in zip(run.model.state_dict().values(), back.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(run.pool.mask, back.pool.mask) and torch.equal(run.pool.states, back.pool.states)
    assert drawn(golden, tmp_path / "before") == drawn(tmp_path / "out", tmp_path / "after")
