"""What a run will cost: `python cost.py experiment=imagenet256 model.size=DiT-B/2`, or any other config.

Multiply-adds (MACs) are those of one forward pass at batch 1: matrix products and attention, as in DiT's "Gflops". A
training step counts as three forward passes (the backward pass is two), a MAC as two FLOPs.

Memory is that of one process in an uncompiled training step, which is run on tensors without data. Compiled blocks keep
less. A text counts as one token.
"""

import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import conditions
from checkpoints.config import Settings
from checkpoints.load import build_network
from contracts import Network, Objective, muon_matrices
from routing_module import Routing
from system import cli
from system.building import build
from system.kernels import as_on_gpus
from system.settings import parse

BYTES_PER_PARAMETER = 20  # float32 weights, gradients, EMA and Adam's two moments
COUNTED = 997  # images of the counted step: a prime, so that a tensor's size tells whether it grows with their number


def cost_table(model: Network, settings: Settings) -> str:
    """Lines on parameters, forward pass, state, and the whole run by settings.train and settings.hardware."""
    parameters = [p.numel() for p in model.parameters()]
    total = sum(parameters)
    dense, routed = model.macs(), model.macs(Routing())
    forward, hours = f"{dense / 1e9:.3f} GMACs dense", f"{gpu_hours(routed, settings):.3g} GPU-hours"
    if model.routes:
        spans = ", ".join(f"{r.start_layer_idx}..{r.end_layer_idx} at {r.selection_ratio:g}" for r in model.routes)
        forward += f", {routed / 1e9:.3f} routed (blocks {spans}): {routed / dense:.4f}, {dense / routed:.3f}x cheaper"
        hours += f" (dense: {gpu_hours(dense, settings):.3g})"
    averages, train, hardware = len(settings.ema.widths or ()), settings.train, settings.hardware
    state = "weights, gradients, EMA, Adam's moments" + (f", {averages} power averages" if averages else "")
    if settings.optimizer.name == "muon":
        state += " (one moment less of Muon's matrices)"
    return "\n".join([
        f"parameters {total / 1e6:.2f} M in {len(parameters)} tensors",
        f"forward    {forward}",
        f"state      {total * (BYTES_PER_PARAMETER + 4 * averages) / 1e9:.3f} GB: {state} in float32",
        f"run        {train.max_steps} steps x {train.global_batch_size} images: {hours} "
        f"at {hardware.mfu:.0%} of {hardware.peak_tflops:g} TFLOP/s",
    ])  # fmt: skip


def gpu_hours(macs: int, settings: Settings) -> float:
    """GPU-hours of all steps at `macs` per forward pass, on GPUs that reach hardware.mfu of their peak."""
    flops = 2 * 3 * macs * settings.train.global_batch_size * settings.train.max_steps
    return flops / (settings.hardware.peak_tflops * 1e12 * settings.hardware.mfu) / 3600


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process. peak(micro-batch, dense=, checkpointed=): of a step at its fullest, state included."""

    state: int  # between two steps: 16 a parameter with AdamW
    gradients: int  # 4 a parameter
    peak: Callable[..., int]


def step_memory(settings: Settings, *, device: str, processes: int = 1) -> StepMemory:
    """Of an uncompiled step on a type of device, "cuda" or "cpu"."""
    # Always on CPU tensors: those of CUDA have no backward pass without a driver.
    fake, live, attention = FakeTensorMode(), LiveBytes(), as_on_gpus if device == "cuda" else nullcontext
    bf16 = settings.train.precision == "bf16" or settings.train.precision == "auto" and device == "cuda"
    with fake, live:
        net, objective = build_network(settings), build(settings.objective, Objective, "objective")
        update_peak = count_update(net, settings, processes, live)
    state, gradients = live.now, sum(p.nbytes for p in net.parameters() if p.requires_grad)
    live.drop_gradients(net)

    @cache
    def count(dense: bool, checkpointed: bool) -> np.ndarray:
        for block in net.all_blocks:
            block.recompute = checkpointed
        live.start(COUNTED)
        with fake, live, attention():
            backward(net, objective, COUNTED, routed=not dense, bf16=bf16)
        return np.array(live.rows)  # (tensors made, 3)

    def peak(micro_batch: int, *, dense=False, checkpointed=settings.train.gradient_checkpointing) -> int:
        fixed, per_image, made = count(dense, checkpointed).T
        # Several processes hold them always, as the buckets that they exchange; accumulation from its first pass on.
        held = processes > 1 or micro_batch < settings.train.global_batch_size
        in_backward = fixed + per_image * micro_batch + (gradients if held else made)
        return max(int(in_backward.max()), update_peak)

    return StepMemory(state, gradients, peak)


def memory_table(*a, **k):
    return "memory"


def out_of_memory(*a):
    return "oom"
