"""What a run will cost: `python cost.py experiment=imagenet256 model.size=DiT-B/2`, or any other config.

Multiply-adds (MACs) are those of one forward pass at batch 1: matrix products and attention, as in DiT's "Gflops". A
training step counts as three forward passes (the backward pass is two), a MAC as two FLOPs.

Memory is that of one process in an uncompiled step, which is run on tensors without data. A text counts as
data.text_length tokens, or one.
"""

import weakref
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import conditions
from checkpoints.config import Settings, Train
from checkpoints.load import align, build_network
from contracts import Loss, Network, Objective, Routing, muon_matrices
from system import cli
from system.building import build
from system.kernels import as_on_gpus, at_once
from system.settings import parse

BYTES_PER_PARAMETER = 20  # float32 weights, gradients, EMA and Adam's two moments
COUNTED = 997  # images of the counted step: a prime, so that a tensor's size tells whether it grows with their number
WAYS = ("routed", "routed checkpointed", "dense", "dense checkpointed")


def cost_table(model: Network, settings: Settings, hours: bool = True) -> str:
    """Lines on parameters, forward pass, state and the whole run. hours: what it takes, by settings.hardware, too."""
    total, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    dense, routed = model.macs(), model.macs(Routing())
    train, hardware = settings.train, settings.hardware
    at_end = train.max_steps - train.routed_steps
    macs = mean_macs(model, train, 0, train.max_steps)
    forward, told = f"{dense / 1e9:.3f} GMACs dense", f": {gpu_hours(macs, settings):.3g} GPU-hours"
    if model.routes:
        delayed = ["" if r.leave_layer_idx is None else f", leaving after {r.leave_layer_idx}" for r in model.routes]
        spans = [f"{r.start_layer_idx}..{r.end_layer_idx} at {r.selection_ratio:g}" for r in model.routes]
        spans = ", ".join(map("".join, zip(spans, delayed)))
        forward += f", {routed / 1e9:.3f} routed (blocks {spans}): {routed / dense:.4f}, {dense / routed:.3f}x cheaper"
        told += f" (dense: {gpu_hours(dense, settings):.3g})"
    told += f" at {hardware.mfu:.0%} of {hardware.peak_tflops:g} TFLOP/s"
    averages, steps = len(settings.ema.widths or ()), f"{train.max_steps} steps"
    steps += f" (the last {at_end} without routes)" if at_end else ""
    state = "weights, gradients, EMA, Adam's moments" + (f", {averages} power averages" if averages else "")
    state += " (one moment less of Muon's matrices)" if settings.optimizer.name == "muon" else ""
    return "\n".join([
        f"parameters {total / 1e6:.2f} M in {tensors} tensors",
        f"forward    {forward}",
        f"state      {total * (BYTES_PER_PARAMETER + 4 * averages) / 1e9:.3f} GB: {state} in float32",
        f"run        {steps} x {train.global_batch_size} images{told if hours else ''}",
    ])  # fmt: skip


def mean_macs(model: Network, train: Train, after: int, step: int) -> float:
    """Multiply-adds of a forward pass, in the mean of the steps beyond `after` up to `step`: the last are dense."""
    dense = max(0, step - max(after, train.routed_steps)) / (step - after)
    return dense * model.macs() + (1 - dense) * model.macs(Routing())


def training_flops(macs: float, images: float) -> float:
    """Of so many images at `macs` in a forward pass: two a multiply-add, and twice as many backwards."""
    return 6 * macs * images


def gpu_hours(macs: float, settings: Settings) -> float:
    """GPU-hours of all steps at `macs` per forward pass, on GPUs that reach hardware.mfu of their peak."""
    flops = training_flops(macs, settings.train.global_batch_size * settings.train.max_steps)
    return flops / (settings.hardware.peak_tflops * 1e12 * settings.hardware.mfu) / 3600


class StepMemory(NamedTuple):
    """Bytes of one process. peak(micro_batch, dense=, checkpointed=): of a step at its fullest, state included."""

    state: int  # between two steps: 16 a parameter with AdamW
    gradients: int  # 4 a parameter
    peak: Callable[..., int]


def step_memory(settings: Settings, *, device: str, processes: int = 1) -> StepMemory:
    """Of an uncompiled step on "cuda" or "cpu". Both are counted on the CPU: CUDA would need a driver."""
    fast = ("bf16", "auto" if device == "cuda" else "bf16")
    bf16, ns_bytes = settings.train.precision in fast, 2 if settings.optimizer.ns_precision in fast else 4
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, LiveBytes() as made:
        net, objective = build_network(settings), build(settings.objective, Objective, "objective")
        loss = Loss(align(net, settings) or net, net, objective, settings.train.middle_weight)
        state, update = count_update(loss, settings, made)
        update += ns_bytes * newton_schulz_numbers(net, processes, device) if settings.optimizer.name == "muon" else 0
    gradients = sum(p.nbytes for p in loss.net.parameters() if p.requires_grad)

    @cache
    def count(dense: bool, checkpointed: bool) -> np.ndarray:
        for block in net.all_blocks:
            block.recompute = checkpointed
        with fake, as_on_gpus(device == "cuda"):
            return count_backward(loss, dense, bf16, made.alive)

    def peak(micro_batch: int, *, dense=False, checkpointed=settings.train.gradient_checkpointing) -> int:
        held = processes > 1 or micro_batch < settings.train.global_batch_size  # as DDP's buckets, or sums so far
        living = count(dense, checkpointed) @ (1, micro_batch, not held) + held * gradients
        return state + max(int(living.max()), update)

    return StepMemory(state, gradients, peak)


@torch.no_grad()
def count_update(loss: Loss, settings: Settings, live: "LiveBytes") -> tuple[int, int]:
    """Bytes between two steps, and those beyond them while AdamW and EMA work. `live` has counted the network."""
    averaged_of = list(loss.network.parameters()) * (1 + len(settings.ema.widths or ()))
    parameters, averaged = list(loss.net.parameters()), [p.clone() for p in averaged_of]
    matrices = set(muon_matrices(loss.network) if settings.optimizer.name == "muon" else ())
    momenta = [torch.zeros_like(p) for p in matrices]  # noqa: F841 - alive until all is counted
    optimizer = torch.optim.AdamW([p for p in parameters if p not in matrices], fused=True)
    for p in parameters:
        p.grad = torch.empty_like(p) if p.requires_grad else None
    optimizer.step()
    torch._foreach_lerp_(averaged, averaged_of, 0.1)
    loss.net.zero_grad()
    total = np.cumsum(live.events, axis=0) @ (1, COUNTED, 1)
    return int(total[-1]), int(total.max() - total[-1])


def newton_schulz_numbers(net: Network, processes: int, device: str) -> int:
    """What training/optimizer.py holds at once: matrices of one shape, before and after an iteration, and products."""
    own = sorted(muon_matrices(net), key=torch.Tensor.numel, reverse=True)[::processes]
    alike = Counter(tuple(sorted(p.shape)) for p in own).items()
    return max(2 * min(n, at_once(r * c, device)) * r * (r + c) for (r, c), n in alike)


def count_backward(loss: Loss, dense: bool, bf16: bool, known: Iterable) -> np.ndarray:
    """What lives during a micro-batch's forward and backward pass: (events, 3), the parts as in LiveBytes."""
    net, shape = loss.network, getattr(loss.net, "feature_shape", None)
    with LiveBytes(known) as live:
        x, condition = torch.empty(COUNTED, *net.latent_shape), conditions.repeat(net.null_condition, COUNTED, "cpu")
        hooks = [p.register_post_accumulate_grad_hook(live.set_aside) for p in loss.net.parameters() if p.requires_grad]
        features = [] if shape is None else [torch.empty(COUNTED, *shape)]
        routing = None if dense else net.training_routing(COUNTED, None, x.device)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total = loss(x, condition, torch.Generator(), routing, *features).mean()
        total.backward()
    for hook in hooks:
        hook.remove()
    return np.cumsum(live.events, axis=0)


class LiveBytes(TorchDispatchMode):
    """events: changes of the bytes of tensors made within, in three parts: what does not grow with the COUNTED images;
    what does, per image; and gradients that were set aside. known: storages that were there before."""

    def __init__(self, known: Iterable[torch.UntypedStorage] = ()):
        super().__init__()
        self.alive, self.events = weakref.WeakSet(known), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in [tensor.untyped_storage() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]:
            if storage not in self.alive:
                self.alive.add(storage)
                per_image, rest = divmod(storage.nbytes(), COUNTED)
                fixed, per_image = (storage.nbytes(), 0) if rest else (0, per_image)
                self.events.append((fixed, per_image, 0))
                weakref.finalize(storage, self.events.append, (-fixed, -per_image, 0))
        return out

    def set_aside(self, parameter: torch.nn.Parameter) -> None:
        nbytes, parameter.grad = parameter.grad.nbytes, None
        self.events.append((0, 0, nbytes))


def memory_table(settings: Settings, micro_batch: int, *, device: str, processes: int = 1) -> str:
    """Lines on the peak of one process and, with hardware.memory_gb, the largest micro-batch that fits."""
    memory, limit = step_memory(settings, device=device, processes=processes), settings.hardware.memory_gb
    ways = {way: partial(memory.peak, dense="dense" in way, checkpointed="checkpointed" in way) for way in WAYS}
    peaks = ", ".join(f"{peak(micro_batch) / 1e9:.2f} GB {name}" for name, peak in ways.items())
    parts = f"state {memory.state / 1e9:.2f}, gradients {memory.gradients / 1e9:.2f}"
    told = f"memory     {peaks}, at micro-batch {micro_batch}: {parts}"
    if limit is None:
        return told
    largest = ", ".join(f"{bisect(range(1, 2**20), limit * 1e9, key=peak)} {name}" for name, peak in ways.items())
    return f"{told}\nfits       {limit:g} GB: a micro-batch of {largest}"


def out_of_memory(settings: Settings, micro_batch: int, rows: int, limit: int, processes: int) -> str:
    """After an out-of-memory error: what was predicted, and the nearest setting that fits into `limit` bytes.
    The micro-batch has to divide `rows`, the images of a process in a step."""
    peak = step_memory(settings, device="cuda", processes=processes).peak
    peak = partial(peak, dense=settings.train.dense_last > 0)
    found = f"{peak(micro_batch) / 1e9:.2f} GB were predicted, the device has {limit / 1e9:.2f}"
    needed = [f"train.micro_batch_size={n}" for n in range(1, micro_batch) if rows % n == 0 and peak(n) <= limit][-1:]
    if not settings.train.gradient_checkpointing and peak(micro_batch, checkpointed=True) <= limit:
        needed.append("train.gradient_checkpointing=true")
    return f"out of memory at micro-batch {micro_batch}: {found}; needed: {' or '.join(needed) or 'a smaller model'}"


def main(overrides: list[str]) -> None:
    settings = parse(Settings, cli.load_config("config", overrides))
    with torch.device("meta"):  # shapes without memory
        model = build_network(settings)
    print(f"model      {type(model).__name__} {model.name}\n{cost_table(model, settings)}")
    print(memory_table(settings, settings.train.micro_batch_size or settings.train.global_batch_size, device="cuda"))


if __name__ == "__main__":
    cli.command(main, __doc__)
