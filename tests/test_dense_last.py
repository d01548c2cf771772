"""train.dense_last: the last share of a run's steps has no routes, and nothing else changes."""

import sys
from functools import partialmethod

import pytest
import torch
from torch._dynamo.utils import counters

from checkpoints.config import Train
from cost import cost_table, gpu_hours, mean_macs
from dit import DiT
from lightningdit import LightningDiT
from maskdit import MaskDiT
from routing_module import Routing
from sprint import Sprint
from system import UserError
from system.compiling import compile_blocks
from tests import started
from tests.conftest import assert_same_run, numbers
from tests.made_runs import made_settings
from training.stopping import EXIT_START_AGAIN

ROUTE = dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=4)
TREAD = ["model=tread", "optimizer=muon", "model.fp32_after_route=true"]
LAST = ["train.max_steps=6", "train.dense_last=0.34", "train.val_every=6", "train.decay_steps=3"]  # steps 5 and 6


@pytest.mark.parametrize(
    "network, method, stop_after", [(DiT, TREAD, 4), (Sprint, ["model=sprint"], 5), (MaskDiT, ["model=maskdit"], 3)]
)
def test_the_switch_is_after_its_step_and_resumes_to_the_bit(network, method, stop_after, run, monkeypatch):
    settings, seen, forward = [*method, *LAST], [], network.forward

    def watched(self, *args, routing=None, **more):
        if self.x_embedder.proj.weight.requires_grad:  # not the EMA's
            seen.append(routing is not None)
        return forward(self, *args, routing=routing, **more)

    with monkeypatch.context() as patch:
        patch.setattr(network, "forward", watched)
        code, golden = run("golden", *settings)
    assert code == 0 and seen == [True] * 4 + [False] * 2
    assert run("cut", *settings, stop_after=stop_after)[0] == EXIT_START_AGAIN
    code, cut = run("cut", *settings)
    assert code == 0
    assert_same_run(golden, cut)
    without, ours = numbers(run("without", *settings, "train.dense_last=0")[1]), numbers(golden)
    assert [a == b for a, b in zip(ours, without)] == [True] * 4 + [False] * 3
    assert [line.get("train/lr") for line in ours] == [line.get("train/lr") for line in without]
    assert {*ours[-1]} >= {"val/loss_dense", "val/loss_routed"}


@pytest.mark.parametrize("network", [DiT, LightningDiT])
def test_at_most_one_more_graph(network, monkeypatch):
    torch.compiler.reset()
    counters.clear()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    net = network(8, 2, 1, 32, 6, 2, num_classes=3, routes=[ROUTE], fp32_after_route=True)
    compile_blocks(net.all_blocks, "blocks")
    batch, graphs = (torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 3])), []
    for routing in (Routing(), None, None):
        net(*batch, routing=routing).sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] <= graphs[1] <= graphs[0] + 1 and graphs[2] == graphs[1] and not counters["graph_break"]
    torch.compiler.reset()


def test_two_processes_train_the_run_of_one(run, tiny_overrides, tmp_path):
    """MaskDiT: its mask token has no part in a dense pass, and DDP would wait for the token's gradient."""
    settings = ["model=maskdit", *LAST, "train.check_replicas_every=1"]
    run("one", *settings)
    command = [sys.executable, "train.py", *tiny_overrides, *settings, f"results_dir={tmp_path}", "run_name=two"]
    done = started.run(command, processes=2)
    assert done.returncode == 0, done.stderr
    assert "run        6 steps (the last 2 without routes) x 16 images" in done.stdout
    for a, b in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3), a["step"]


def test_what_a_share_is():
    assert [Train(max_steps=1800, dense_last=share).routed_steps for share in (0, 0.1, 0.5, 1)] == [1800, 1620, 900, 0]
    assert Train(max_steps=7, dense_last=0.1).routed_steps == 6
    net = DiT(8, 2, 1, 32, 6, 2, num_classes=3, routes=[ROUTE])
    settings = made_settings(["train.max_steps=1000", "train.dense_last=0.25"])
    hours = 0.75 * gpu_hours(net.macs(Routing()), settings) + 0.25 * gpu_hours(net.macs(), settings)
    assert f"1000 steps (the last 250 without routes) x 64 images: {hours:.3g} GPU-hours" in cost_table(net, settings)
    assert "without routes" not in cost_table(net, made_settings([]))
    macs = [mean_macs(net, settings.train, after, after + 100) for after in (600, 700, 800)]
    dense, routed = net.macs(), net.macs(Routing())
    assert macs == [routed, (dense + routed) / 2, dense]


def test_what_cannot_be_is_refused(run):
    for share in ("1.1", "-0.1", "half"):
        with pytest.raises(UserError, match="train.dense_last=.*; needed: a number of at least 0 and of at most 1"):
            made_settings([f"train.dense_last={share}"])
    with pytest.raises(UserError, match="train.dense_last=0.5: no step of this network has routes; needed: 0"):
        run("dense", "model=dit", "train.dense_last=0.5")
    with pytest.raises(UserError, match="train.dense_last=0.04 of 6 steps is less than half of one; needed: 0.167"):
        run("none", "train.max_steps=6", "train.dense_last=0.04")


def test_a_run_with_an_end_is_not_made_longer(run):
    run("short", *LAST, "train.decay_steps=0")
    with pytest.raises(UserError, match="train.max_steps was 6, is 9"):
        run("short", *LAST, "train.decay_steps=0", "train.max_steps=9")
