"""Compiled blocks under DDP."""

import sys

from tests import started
from tests.conftest import ROOT

COMPILED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from functools import partialmethod
from types import SimpleNamespace
import train as training
from data import BatchPlan
from dit import DiT
from lightningdit import LightningDiT
from rf import RectifiedFlow
from system.compiling import compile_blocks
from system.processes import start_processes
from tests.made_runs import made_settings
from training.guard import FiniteGuard
from training.prepare import TrainingData, TrainState

dist = start_processes()
pieces = 0  # what a compiler is given

def counting(module, inputs):
    global pieces
    pieces += 1
    return module.forward  # graphs are counted, none is built

torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend=counting)
settings = made_settings(["train.global_batch_size=8", "train.precision=fp32"])
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
    for block in model.all_blocks:
        block.recompute = checkpointed
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, eps=1.0, fused=True)  # nearly linear in the gradient
    guard = FiniteGuard(optimizer, torch.device("cpu"), "stop")
    on_cpu = SimpleNamespace(device=torch.device("cpu"))
    state = TrainState(model, model, {}, optimizer, guard, RectifiedFlow(), on_cpu)
    state.net = training.wrap(state) if world > 1 else model
    compile_blocks(model.all_blocks, "blocks")
    plan, pieces = BatchPlan(8, 4 // world, 2, rank, world), 0
    for state.step in (1, 2):
        rows = [plan.slice(None, micro).start for micro in range(2)]
        size = plan.micro_batch_size
        batches = iter([(raw[row : row + size], y[row : row + size]) for row in rows])
        training.train_step(settings, TrainingData(Latents, Latents, plan), state, batches)
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
    done = started.run([sys.executable, tmp_path / "compiled.py", ROOT], processes=2, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for network, checkpointed, one, two, difference in lines:
        assert int(one) == int(two) > 0 and float(difference) < 1e-6, (network, checkpointed, one, two, difference)
