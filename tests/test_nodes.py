"""Several processes as on several machines: compiled blocks under DDP, and two nodes that lose each other."""

import os
import signal
import subprocess
import sys
import time

import pytest

from checkpoints.run_folder import complete_checkpoints, latest_checkpoint, verify_checkpoint
from tests.conftest import COMPARED, numbers
from tests.test_processes import ROOT, start, torchrun, wait_for

COMPILED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from functools import partialmethod
import train as training
from data import BatchPlan
from dit import DiT
from lightningdit import LightningDiT
from rf import RectifiedFlow
from system import cli
from system.compiling import compile_blocks
from system.processes import start_processes
from training.guard import FiniteGuard
from training.prepare import TrainState

dist = start_processes()
pieces = 0  # what a compiler is given

def counting(module, inputs):
    global pieces
    pieces += 1
    return module.forward  # graphs are counted, none is built

torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend=counting)
cfg = cli.load_config("config", ["train.global_batch_size=8", "train.precision=fp32"])
raw, y = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8)
Latents = type("Latents", (), {"to_model_input": staticmethod(lambda raw, rows: raw)})
ROUTES = [dict(selection_ratio=0.5, start_layer_idx=2, end_layer_idx=3)]

def steps(network, checkpointed, rank, world):
    '''Two steps of two micro-batches each -> (weights, pieces compiled).'''
    global pieces
    torch.compiler.reset()
    torch.manual_seed(0)
    model = network(8, 2, 4, hidden_size=192, depth=5, num_heads=2, num_classes=10, learn_sigma=False, routes=ROUTES)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.gradient_checkpointing = checkpointed
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, eps=1.0, fused=True)  # nearly linear in the gradient
    guard = FiniteGuard(optimizer, torch.device("cpu"), "stop")
    net = training.wrap(model, RectifiedFlow()) if world > 1 else model
    compile_blocks(model, "blocks")
    state = TrainState(net, model, None, optimizer, guard)
    plan, pieces = BatchPlan(8, 4 // world, 2, rank, world), 0
    for step in (1, 2):
        rows = [plan.slice(None, micro).start for micro in range(2)]
        size = plan.micro_batch_size
        batches = iter([(raw[row : row + size], y[row : row + size]) for row in rows])
        training.train_step(state, RectifiedFlow(), Latents, batches, step, plan, cfg)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), pieces

for network in (DiT, LightningDiT):
    for checkpointed in (False, True):
        two, two_pieces = steps(network, checkpointed, dist.process_index, 2)
        if dist.process_index == (network is DiT):  # one process compares the one network, one the other
            one, one_pieces = steps(network, checkpointed, 0, 1)
            difference = (one - two).abs().max().item()
            print(f"{network.__name__} {checkpointed} {one_pieces} {two_pieces} {difference:.3g}", flush=True)
dist.wait_for_everyone()
dist.destroy_process_group()
"""


def test_ddp_leaves_the_compiled_blocks_whole_and_the_numbers_equal(tmp_path):
    """As many graphs as one process has, within 1e-6: two micro-batches a step, gradient checkpointing off and on."""
    (tmp_path / "compiled.py").write_text(COMPILED)
    command = [*torchrun(29670), str(tmp_path / "compiled.py"), str(ROOT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for network, checkpointed, one, two, difference in lines:
        assert int(one) == int(two) > 0 and float(difference) < 1e-6, (network, checkpointed, one, two, difference)


class Nodes:
    """Two machines on one: two launchers of two processes each, which meet at a loopback address."""

    def __init__(self, port, *overrides):
        self.jobs = [start(self.command(port, rank), *overrides) for rank in (0, 1)]

    @staticmethod
    def command(port, rank):
        return [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank),
            "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(port),
        ]  # fmt: skip

    def signal(self, rank, number):
        """To all processes of a node."""
        os.killpg(self.jobs[rank].pid, number)
        for pid in children(self.jobs[rank].pid):  # torchrun starts each in a session of its own
            os.kill(pid, number)

    def wait(self, rank, seconds):
        return self.jobs[rank].wait(seconds)

    def finish(self, seconds=180):
        for job in self.jobs:
            out, err = job.communicate(timeout=seconds)
            assert job.returncode == 0, err


def children(pid):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in out.split()]


@pytest.mark.slow
def test_two_nodes_lose_each_other_and_the_run_comes_back_to_the_bit(tiny_overrides, tmp_path):
    own = [*tiny_overrides, f"results_dir={tmp_path}", "train.max_steps=60", "train.save_every=5", "train.timeout_s=5"]
    Nodes(29680, *own, "run_name=golden").finish()

    lost = [*own, "run_name=lost"]
    killed = Nodes(29681, *lost)
    wait_for(tmp_path / "lost", 12, seconds=120)
    killed.signal(1, signal.SIGKILL)
    started = time.monotonic()
    assert killed.wait(0, 60) != 0 and time.monotonic() - started < 30  # the node that is left ends by itself
    before = latest_checkpoint(tmp_path / "lost")

    cut_off = Nodes(29682, *lost)
    wait_for(tmp_path / "lost", 30, seconds=120)
    assert numbers(tmp_path / "lost")[-1]["step"] < 60
    cut_off.signal(1, signal.SIGSTOP)  # it answers nothing, and its connections stay open
    started = time.monotonic()
    assert cut_off.wait(0, 60) != 0 and time.monotonic() - started < 30
    cut_off.signal(1, signal.SIGCONT)  # the network is back, the job has gone
    assert cut_off.wait(1, 60) != 0
    for path in complete_checkpoints(tmp_path / "lost"):
        verify_checkpoint(path)
    assert latest_checkpoint(tmp_path / "lost").name > before.name >= "step_0000010"

    Nodes(29683, *lost).finish()
    assert numbers(tmp_path / "lost") == numbers(tmp_path / "golden")
    for file in COMPARED:
        found, golden = (latest_checkpoint(tmp_path / name) / file for name in ("lost", "golden"))
        assert found.read_bytes() == golden.read_bytes(), file
