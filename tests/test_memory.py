"""The memory that cost.py predicts, against a counted step; what it prints; and what an out-of-memory error says."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import bench

import cost
import train as training
from data import BatchPlan
from dit import Attention
from edm import EDM
from system import UserError, cli
from system.instantiate import instantiate
from training.guard import FiniteGuard
from training.optimizer import make_optimizer
from training.prepare import TrainState

IMAGENET = ["data=imagenet256", "train.precision=bf16"]


class Latents:
    @staticmethod
    def to_model_input(raw, rows):
        return raw.float()


def counted_peak(cfg, dense, monkeypatch):
    """Bytes at most within the second step of train.py, with everything that lives on from the first."""
    monkeypatch.setattr(Attention, "attend", bench.PlainAttention.attend)  # as on GPUs
    monkeypatch.setattr(training, "seeded_generator", lambda *key, device: None)
    monkeypatch.setattr(BatchPlan, "slice", lambda self, generator, micro: None)
    n, shape = cfg.train.global_batch_size, (cfg.data.channels, cfg.data.input_size, cfg.data.input_size)
    with FakeTensorMode():
        model, ema = instantiate(cfg.model), instantiate(cfg.model).requires_grad_(False)
        model.routes = () if dense else model.routes
        model.gradient_checkpointing = cfg.train.gradient_checkpointing
        optimizer = make_optimizer(model, cfg.optimizer, 1e-4)
        state = TrainState(model, model, ema, optimizer, FiniteGuard(optimizer, torch.device("cpu"), "stop"))
        batch = torch.empty(n, *shape), torch.zeros(n, dtype=torch.int64)

        def step(number):
            training.train_step(state, EDM(), Latents, iter([batch]), number, BatchPlan(n, n, 1, 0, 1), cfg)
            training.update_ema(ema, model, 0.9)

        step(1)
        tracker = MemTracker()
        tracker.track_external(model, ema, optimizer)
        with tracker:
            step(2)
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return snapshot["Total"]


SETTINGS = [
    ["model.size=DiT-S/2", "train.global_batch_size=64"],
    ["model.size=DiT-S/2", "train.global_batch_size=64", "train.gradient_checkpointing=true"],
    *(
        pytest.param([f"model.size=DiT-{size}/2", f"data.input_size={side}", f"train.global_batch_size={n}", *more],
                     marks=pytest.mark.slow)
        for size in ("S", "B", "L", "XL") for side, n in ((32, 64), (64, 16))
        for more in ([], ["train.gradient_checkpointing=true"])
    ),
]  # fmt: skip


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(settings))
def test_the_peak_is_within_five_percent_of_a_counted_one(settings, dense, monkeypatch):
    cfg = cli.load_config("config", [*IMAGENET, *settings])
    predicted = cost.step_memory(cfg, device="cuda", dense=dense).peak(cfg.train.global_batch_size)
    assert predicted == pytest.approx(counted_peak(cfg, dense, monkeypatch), rel=0.05)


@pytest.mark.parametrize("model", ["sprint", "maskdit", "lightningdit_tread"])
def test_all_networks_are_predicted_and_more_images_take_more(model):
    cfg = cli.load_config("config", [*IMAGENET, f"model={model}", "model.size=DiT-XS/4"])
    memory = cost.step_memory(cfg, device="cuda")
    assert memory.state < memory.peak(1) <= memory.peak(64) < memory.peak(128)
    assert memory.peak(64) < cost.step_memory(cfg, device="cuda", dense=True).peak(64)


def test_state_is_what_the_optimizer_and_the_averages_hold():
    sizes = {}
    for keys in ((), ("ema=power",), ("optimizer=muon",)):
        cfg = cli.load_config("config", [*keys, "model.size=DiT-XS/4"])
        sizes[keys] = cost.step_memory(cfg, device="cuda").state
    parameters = sizes[()] // 16
    assert sizes["ema=power",] == sizes[()] + 8 * parameters  # two averages
    matrices = 12 * 12 * 128**2  # in attention and MLP
    assert sizes["optimizer=muon",] == sizes[()] - 4 * matrices
    cfg = cli.load_config("config", [])
    alone, several = (cost.step_memory(cfg, device="cuda", processes=n).peak(64) for n in (1, 2))
    assert alone < several <= alone + 4 * parameters + 1  # the buckets


def test_the_largest_micro_batch_is_the_last_that_fits(capsys):
    cost.main([*IMAGENET, "model.size=DiT-B/2", "hardware.memory_gb=24", "train.micro_batch_size=32"])
    out = capsys.readouterr().out
    assert "at micro-batch 32: state 2.08, gradients 0.52" in out
    (line,) = [line for line in out.splitlines() if line.startswith("fits")]
    largest = int(line.split("micro-batch of ")[1].split()[0])
    peak = cost.step_memory(cli.load_config("config", [*IMAGENET, "model.size=DiT-B/2"]), device="cuda").peak
    assert peak(largest) <= 24e9 < peak(largest + 1)
    with pytest.raises(UserError, match="hardware.memory_gb=-1; needed: a number"):
        cost.main(["hardware.memory_gb=-1"])


@pytest.mark.parametrize(
    "limit, needed",
    [
        (
            24e9,
            "predicted, the device has 24.00; needed: train.micro_batch_size=128 or train.gradient_checkpointing=true$",
        ),
        (4e9, "needed: train.micro_batch_size=16$"),
        (1e9, "needed: a smaller model$"),
    ],
)
def test_out_of_memory_names_the_nearest_setting_that_fits(limit, needed):
    cfg = cli.load_config("config", [*IMAGENET, "model.size=DiT-B/2", "train.global_batch_size=256"])
    said = cost.out_of_memory(cfg, 256, 256, int(limit), 1)
    assert "\n" not in said and said.startswith("out of memory at micro-batch 256")
    assert re.search(needed, said), said


def test_a_run_that_runs_out_of_memory_ends_in_one_line(run, monkeypatch):
    def fails(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training, "train_step", fails)
    device = type("Device", (), {"total_memory": 10**6})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device_of_run: device)
    with pytest.raises(UserError, match="out of memory at micro-batch 16: .* has 0.00; needed: a smaller model"):
        run("full")
