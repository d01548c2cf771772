"""What only a GPU can show, marked gpu and skipped without one; and scripts/gpu_check.sh, which also runs on a CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

import train as training
from checkpoints.generate import generate_latents
from checkpoints.load import Run
from cost import step_memory
from data import BatchPlan
from dit import DiT
from edm import EDM
from evaluation import metrics
from guidance import Guidance
from randomness import seeded_generator
from routing_module import Routing, draw_keep_ids, gather_tokens, scatter_tokens
from system import UserError
from system.compiling import compile_blocks
from system.precision import tf32
from system.processes import start_processes
from tests import gpu_check
from tests.conftest import ROOT, assert_same_run
from tests.made_runs import made_settings
from training.ema import update_averages
from training.prepare import TrainingData, build_state
from training.stopping import EXIT_START_AGAIN

TREAD = [dict(selection_ratio=0.5, start_layer_idx=2, end_layer_idx=-4)]
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(test):
    return gpu(needs_cuda(test))


class Latents:
    @staticmethod
    def to_model_input(raw, rows):
        return raw.float()


@pytest.fixture
def step():
    """step(number), state and settings of a routed DiT-S/2 in bf16 on the GPU; its batches are there already."""
    keys = ["data=imagenet256", "model.size=DiT-S/2", "train.precision=bf16", "train.global_batch_size=32"]
    settings = made_settings(keys)
    state = build_state(settings, start_processes(), new=True)
    batch = torch.randn(32, 4, 32, 32, device="cuda"), torch.zeros(32, dtype=torch.int64, device="cuda")
    data = TrainingData(Latents, Latents, BatchPlan(32, 32, 1, 0, 1))

    def take(number):
        state.step = number
        training.train_step(settings, data, state, iter([batch]))
        update_averages(state.averages, state.model, number, 0.9, False)

    return take, state, settings


@pytest.fixture
def syncs_are_errors():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("compiled", ["off", "blocks"])
def test_a_step_never_waits_and_does_not_compile_again(step, compiled, syncs_are_errors):
    take, state, _ = step
    torch.compiler.reset()
    compile_blocks(state.model.all_blocks, compiled)
    for number in (1, 2):
        take(number)
    graphs = counters["stats"]["unique_graphs"]
    syncs_are_errors()
    for number in (3, 4, 5):
        take(number)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sampling_never_waits(precision, syncs_are_errors):
    net = DiT(size="DiT-S/2", learn_sigma=False, routes=TREAD).cuda().eval().requires_grad_(False)
    run = Run(net, EDM(), None, None, torch.device("cuda"), precision)
    labels = torch.zeros(4, dtype=torch.int64, device="cuda")
    draw = lambda: generate_latents(run, Guidance(1.5, None, 0.3, 0.7, "same"), range(4), labels, {"num_steps": 3})
    draw()
    syncs_are_errors()
    draw()


@on_gpu
def test_resume_is_bit_equal_with_deterministic(run):
    keys = ["train.deterministic=true", "train.precision=bf16"]
    _, golden = run("golden", *keys)
    assert run("cut", *keys, stop_after=3)[0] == EXIT_START_AGAIN
    _, folder = run("cut", *keys)
    assert_same_run(golden, folder)
    torch.use_deterministic_algorithms(False)


@on_gpu
def test_gradients_through_a_route_are_the_cpus():
    keep = draw_keep_ids(4, 64, 0.5, generators=seeded_generator("route"))
    x, weight = torch.randn(4, 64, 32), torch.randn(4, 64, 32)
    gradients = []
    for device in ("cpu", "cuda"):
        own = x.to(device).requires_grad_()
        ids = keep.to(device)
        (scatter_tokens(gather_tokens(own, ids) * 2, ids, own) * weight.to(device)).sum().backward()
        gradients.append(own.grad.cpu())
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@on_gpu
@pytest.mark.parametrize("way, bound", [("fp32", 1e-5), ("tf32", 3e-3), ("bf16", 3e-2)])
def test_errors_against_float64(way, bound):
    net = DiT(size="DiT-S/2", learn_sigma=False).cuda().eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.03)
    x, t = torch.randn(2, 4, 32, 32, device="cuda"), torch.rand(2, device="cuda")
    y = torch.zeros(2, dtype=torch.int64, device="cuda")
    with tf32(way == "tf32"), torch.autocast("cuda", torch.bfloat16, enabled=way == "bf16"):
        found = net(x, t, y).double().cpu()
    exact = net.cpu().double()(x.cpu().double(), t.cpu().double(), y.cpu())
    assert (found - exact).norm() / exact.norm() < bound


@on_gpu
def test_the_peak_is_the_predicted_one(step):
    take, _, settings = step
    take(1)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    take(2)
    memory = step_memory(settings, device="cuda")
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(memory.peak(32) - memory.state, rel=0.1)


@on_gpu
def test_routed_training_is_as_on_the_cpu():
    torch.manual_seed(0)
    net = DiT(8, 2, 4, 64, 6, 2, num_classes=3, learn_sigma=False, routes=[dict(TREAD[0], end_layer_idx=-2)])
    keep = draw_keep_ids(4, 16, 0.5, generators=seeded_generator("route"))
    x, t, y = torch.randn(4, 4, 8, 8), torch.rand(4), torch.zeros(4, dtype=torch.int64)
    outputs = [net.to(d)(x.to(d), t.to(d), y.to(d), routing=Routing(keep_ids=keep.to(d))) for d in ("cpu", "cuda")]
    torch.testing.assert_close(outputs[0], outputs[1].cpu(), rtol=1e-4, atol=1e-4)


def test_the_small_check_runs_anywhere_and_ends_with_a_table(tmp_path):
    out = tmp_path / "check"
    command = [sys.executable, "-m", "tests.gpu_check", "step", "--small", f"out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / "step.json").read_text())
    assert [row["model"] for row in found["rows"]] == ["DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2"]
    assert all(row["waits"] == 0 and row["routed GB"] > 0 < row["predicted GB"] for row in found["rows"])
    assert (
        min(found["loader_samples_per_s"], found["scoring_images_per_s"], *found["sampling_images_per_s"].values()) > 0
    )
    assert (out / "step.md").read_text() in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1


def test_without_a_gpu_the_full_check_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for arguments, said in ((["step"], "no GPU; needed"), ([], "found: ; needed: step, race, exact, several")):
        with pytest.raises(UserError, match=said):
            gpu_check.main(arguments)


@on_gpu
def test_precision_recall_and_kid_are_the_cpus():
    generated, real = (torch.randn(1200, 64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    on_cpu, on_gpu = (
        [*metrics.precision_recall(a, b), *metrics.kernel_distance(a, b, subsets=5)]
        for a, b in ((generated, real), (generated.cuda(), real.cuda()))
    )
    assert on_gpu == pytest.approx(on_cpu, abs=0.002)
