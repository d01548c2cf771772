"""The memory that cost.py counts, against that of real steps; what it prints; and what an out-of-memory error says."""

import re
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import conditions
import cost
import train as training
from checkpoints.config import Settings
from conditions import Text
from contracts import Network
from system import UserError, cli
from system.kernels import as_on_gpus
from system.processes import start_processes
from system.settings import parse
from training import prepare
from training.ema import update_averages

IMAGENET = ["data=imagenet256", "train.precision=bf16"]
DIGITS = ["train.precision=fp32", "train.global_batch_size=16"]


def settings_of(overrides):
    return parse(Settings, cli.load_config("config", overrides))


def measured(settings, dense):
    """Bytes at most within the second step of train.py on this CPU, beyond those between two steps."""
    state = prepare.build_state(settings, start_processes(), new=True)
    plan = training.batch_plan(settings, start_processes())
    loaded = SimpleNamespace(train=SimpleNamespace(to_model_input=lambda raw, rows: raw), plan=plan)
    if dense:
        state.model.training_routing = lambda *arguments: None

    def step():
        state.step += 1
        batch = torch.randn(plan.micro_batch_size, *state.model.latent_shape)
        condition = conditions.repeat(state.model.null_condition, len(batch), "cpu")
        training.train_step(settings, loaded, state, iter([(batch, condition)] * plan.accumulation))
        update_averages(state.averages, state.model, state.step, 0.9, False)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = most = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def assert_counted(settings, dense=False, device="cpu"):
    memory, micro_batch = cost.step_memory(settings, device=device), settings.train.micro_batch_size
    with as_on_gpus(device == "cuda"):
        found = measured(settings, dense)
    counted = memory.peak(micro_batch or settings.train.global_batch_size, dense=dense) - memory.state
    assert counted == pytest.approx(found, rel=0.03)


FAST = ["", "train.gradient_checkpointing=true", "train.precision=bf16", "objective=ddpm train.micro_batch_size=4"]
FAST += [
    "model=sprint train.global_batch_size=4",
    "model=maskdit",
    "model=lightningdit_tread",
    "model=ssd",
    "model=rwkv",
]
FAST += [
    "optimizer=muon ema=power",
    "optimizer=muon train.global_batch_size=2",
    "model=maskdit train.precision=bf16 objective=rf",
]
SIZES = [
    f"data=imagenet256 model={model} model.size=DiT-{size}/2 train.global_batch_size={n}"
    for model in ("tread", "sprint", "maskdit", "lightningdit_tread")
    for size, n in (("S", 16), ("B", 8))
]
SLOW = [
    f"{keys} train.precision={precision} train.gradient_checkpointing={on}"
    for keys in SIZES
    for precision in ("fp32", "bf16")
    for on in (False, True)
]


@pytest.mark.parametrize("keys", FAST + [pytest.param(keys, marks=pytest.mark.slow) for keys in SLOW])
def test_the_peak_is_within_three_percent_of_the_measured_one(keys):
    settings = settings_of([*DIGITS, *keys.split()])
    assert_counted(settings)
    if keys in SLOW:
        assert_counted(settings, dense=True)


@pytest.mark.parametrize("keys", ["", "train.precision=bf16"])
def test_attention_as_on_gpus_is_counted_too(keys):
    settings = settings_of([*DIGITS, *keys.split()])
    assert_counted(settings, dense=True, device="cuda")
    on_gpu, on_cpu = (cost.step_memory(settings, device=device).peak(16) for device in ("cuda", "cpu"))
    assert on_gpu < on_cpu  # which keeps the scores


class Plain(Network):
    """Nothing of DiT's: one layer over all pixels, told of texts, on latents of 3 x 5."""

    num_tokens, latent_shape, name = 15, (4, 3, 5), "plain"
    null_condition = Text(torch.zeros(1, 1, 7), torch.zeros(1, 1, dtype=torch.bool))

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(60, 2048), nn.GELU(), nn.Linear(2048, 60))
        self.text = nn.Linear(7, 60)

    @property
    def all_blocks(self):
        return (self.inner,)

    def forward(self, x, t, condition, *, routing=None, hidden=()):
        return (self.inner(x.flatten(1)) + self.text(condition.states).mean(1) + t[:, None]).view(x.shape)

    def macs(self, routing=None):
        return sum(p.numel() for p in self.parameters() if p.ndim == 2)


@pytest.mark.parametrize("optimizer, matrices", [("adamw", 0), ("muon", 2 * 60 * 2048)])
def test_a_network_that_is_not_dits_is_counted(optimizer, matrices, monkeypatch):
    for module in (cost, prepare):
        monkeypatch.setattr(module, "build_network", lambda settings: Plain())
    settings = settings_of([*DIGITS, f"optimizer={optimizer}", "train.global_batch_size=512"])
    assert_counted(settings)
    parameters = sum(p.numel() for p in Plain().parameters())
    assert cost.step_memory(settings, device="cpu").state == pytest.approx(16 * parameters - 4 * matrices, rel=0.01)


@pytest.mark.filterwarnings("error:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("model", ["dit", "tread", "lightningdit"])
def test_no_address_of_a_weight_that_is_counted_is_read(model):
    """What is counted has none: a copy of such weights had written over other memory, and the process crashed."""
    keys = [f"model={model}", "model.size=DiT-XS/4", "model.middle_head=2", "ema=power", *DIGITS]
    torch.set_warn_always(True)
    try:
        cost.step_memory(settings_of(keys), device="cpu").peak(4)
    finally:
        torch.set_warn_always(False)


def test_state_is_what_the_optimizer_and_the_averages_hold():
    sizes = {}
    for key in ("train.lr=1", "ema=power", "optimizer=muon"):
        memory = cost.step_memory(settings_of([key, "model.size=DiT-XS/4"]), device="cuda")
        sizes[key], parameters = memory.state, memory.gradients // 4
    assert sizes["train.lr=1"] == pytest.approx(16 * parameters, rel=0.01)
    assert sizes["ema=power"] == sizes["train.lr=1"] + 8 * parameters  # two averages
    matrices = 12 * 12 * 128**2  # in attention and MLP
    assert sizes["optimizer=muon"] == pytest.approx(sizes["train.lr=1"] - 4 * matrices, abs=4 * 131)


def test_gradients_that_are_kept_take_four_bytes_a_parameter():
    settings = settings_of(["train.global_batch_size=256", "train.precision=bf16"])
    alone, several = (cost.step_memory(settings, device="cuda", processes=n) for n in (1, 2))
    assert alone.peak(256) < several.peak(256) <= alone.peak(256) + alone.gradients
    assert alone.peak(128) == several.peak(128)  # accumulated


@pytest.mark.slow
def test_xl_is_counted_in_ten_seconds():
    started = time.process_time()
    cost.memory_table(settings_of([*IMAGENET, "model.size=DiT-XL/2", "hardware.memory_gb=80"]), 64, device="cuda")
    assert time.process_time() - started < 10


def test_the_largest_micro_batch_is_the_last_that_fits(capsys):
    cost.main([*IMAGENET, "model.size=DiT-B/2", "hardware.memory_gb=24", "train.micro_batch_size=32"])
    out = capsys.readouterr().out
    assert "at micro-batch 32: state 2.09, gradients 0.52" in out
    (line,) = [line for line in out.splitlines() if line.startswith("fits")]
    largest = int(line.split("micro-batch of ")[1].split()[0])
    peak = cost.step_memory(settings_of([*IMAGENET, "model.size=DiT-B/2"]), device="cuda").peak
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
        (4e9, "needed: train.micro_batch_size=8$"),
        (1e9, "needed: a smaller model$"),
    ],
)
def test_out_of_memory_names_the_nearest_setting_that_fits(limit, needed):
    settings = settings_of([*IMAGENET, "model.size=DiT-B/2", "train.global_batch_size=256"])
    said = cost.out_of_memory(settings, 256, 256, int(limit), 1)
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
