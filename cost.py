"""What a run will cost: `python cost.py experiment=imagenet256 model.size=DiT-B/2`, or any other config.

Multiply-adds (MACs) are those of one forward pass at batch 1: matrix products and attention, as in DiT's "Gflops". A
training step counts as three forward passes (the backward pass is two), a MAC as two FLOPs.

Memory is that of one process in an uncompiled step: its state, and what each block and the final layer keep for their
backward passes, counted on tensors without data. Compiled blocks keep less.
"""

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from routing_module import Routing
from system import UserError, cli
from system.instantiate import instantiate

BYTES_PER_PARAMETER = 20  # float32 weights, gradients, EMA and Adam's two moments
COUNTED = 16  # images of the smaller of the two counts


def cost_table(model: nn.Module, cfg: DictConfig) -> str:
    """Lines on parameters, forward pass, state, and the whole run by cfg.train and cfg.hardware. Raises UserError."""
    parameters = [p.numel() for p in model.parameters()]
    total = sum(parameters)
    dense, routed = model.macs(), model.macs(Routing())
    forward = f"{dense / 1e9:.3f} GMACs dense"
    if model.routes:
        spans = ", ".join(f"{r.start_layer_idx}..{r.end_layer_idx} at {r.selection_ratio:g}" for r in model.routes)
        forward += f", {routed / 1e9:.3f} routed (blocks {spans}): {routed / dense:.4f}, {dense / routed:.3f}x cheaper"
        if model.fp32_blocks:
            blocks = model.block_macs(Routing())
            share = sum(blocks[i] for i in model.fp32_blocks) / routed
            forward += (
                f"\nfp32       {share:.1%} of a routed pass, after routes, without bf16: "
                f"at half the speed a step takes {1 + share:.3f}x"
            )
    hours = f"{gpu_hours(routed, cfg):.3g} GPU-hours"
    if model.routes:
        hours += f" (dense: {gpu_hours(dense, cfg):.3g})"
    averages = len(cfg.ema.widths or ())
    state = "weights, gradients, EMA, Adam's moments" + (f", {averages} power averages" if averages else "")
    if cfg.optimizer.name == "muon":
        state += " (one moment less of Muon's matrices)"
    return "\n".join([
        f"parameters {total / 1e6:.2f} M in {len(parameters)} tensors",
        f"forward    {forward}",
        f"state      {total * (BYTES_PER_PARAMETER + 4 * averages) / 1e9:.3f} GB: {state} in float32",
        f"run        {cfg.train.max_steps} steps x {cfg.train.global_batch_size} images: {hours} "
        f"at {cfg.hardware.mfu:.0%} of {cfg.hardware.peak_tflops:g} TFLOP/s",
    ])  # fmt: skip


def gpu_hours(macs: int, cfg: DictConfig) -> float:
    """GPU-hours of cfg.train's steps at `macs` per forward pass, on GPUs that reach cfg.hardware.mfu of their peak.

    Raises UserError for a peak or share that is not positive.
    """
    if not cfg.hardware.peak_tflops > 0 or not 0 < cfg.hardware.mfu <= 1:
        found = f"{cfg.hardware.peak_tflops} and {cfg.hardware.mfu}"
        raise UserError(f"needed: hardware.peak_tflops > 0 and hardware.mfu in (0, 1]; got {found}")
    flops = 2 * 3 * macs * cfg.train.global_batch_size * cfg.train.max_steps
    return flops / (cfg.hardware.peak_tflops * 1e12 * cfg.hardware.mfu) / 3600


def step_products(cfg: DictConfig, micro_batch: int) -> Counter[tuple[int, int, int, int]]:
    """The blocks' matrix products of a dense and a routed forward pass, by shape (`DiT.products`)."""
    with torch.device("meta"):
        model = instantiate(cfg.model)
    return model.products(micro_batch) + model.products(micro_batch, Routing())


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process. peak(micro-batch): of a training step at its fullest, state included."""

    state: int  # between two steps: 16 a parameter with AdamW
    gradients: int  # 4 a parameter: in the backward pass, or always, as buckets that several processes exchange
    peak: Callable[[int], int]


def step_memory(cfg: DictConfig, *, device: str, processes: int = 1, dense: bool = False) -> StepMemory:
    """Of an uncompiled step of cfg on a type of device, "cuda" or "cpu"; `dense`: without routes."""
    with torch.device("meta"):
        model = instantiate(cfg.model)
    precision = cfg.train.precision if cfg.train.precision != "auto" else "bf16" if device == "cuda" else "fp32"
    parameters = size_of(model)
    state, update = parameters * (BYTES_PER_PARAMETER - 4 + 4 * len(cfg.ema.widths or ())), 0
    if cfg.optimizer.name == "muon":
        matrices = [p for block in model.all_blocks for part in (block.attn, block.mlp) for p in part.parameters()]
        in_matrices = sum(p.numel() for p in matrices if p.ndim == 2)
        state -= 4 * in_matrices  # one moment
        update = 4 * in_matrices // processes  # the weights before the step, in case it has to be undone
    if device == "cuda":  # counted on the CPU: without a driver there is no backward pass on CUDA tensors without data
        for block in model.all_blocks:
            block.attn.plain_on = ()
    model.gradient_checkpointing = cfg.train.gradient_checkpointing
    parts = parts_of(model, None if dense else Routing(), precision == "bf16")
    buckets = 4 * parameters if processes > 1 else 0

    def peak(micro_batch: int) -> int:
        backward = buckets + backward_peak(parts, micro_batch, cfg.train.gradient_checkpointing, processes)
        return state + max(backward, 4 * parameters + update)

    return StepMemory(state, 4 * parameters, peak)


@dataclass(frozen=True)
class Part:
    """A block or the final layer in a training step. Pairs: bytes at any micro-batch, and bytes more per image."""

    kept: tuple[float, float]  # from its forward pass to its backward pass: what autograd saves, and its output
    peak: tuple[float, float]  # within its backward pass: those, and gradients
    entry: int  # bytes of its input per image
    new_entry: bool  # its input is no other part's output: it was embedded, gathered or scattered
    gradients: int


def parts_of(model: nn.Module, routing: Routing | None, bf16: bool) -> list[Part]:
    """The parts of a network on the meta device, in the order of their calls."""
    calls = []
    for i, (block, tokens) in enumerate(zip(model.all_blocks, model.block_tokens(routing))):
        exact = routing is not None and i in model.fp32_blocks
        positions = tuple((*p.shape[:2], tokens, p.shape[-1]) for p in model.positions(None))
        calls.append((block, model.run, (tokens, block.attn.proj.in_features), positions, bf16 and not exact))
    head = model.final_layer
    calls.append((head, run_as_it_is, (model.num_tokens, head.linear.in_features), (), False))
    parts, counts, before = [], {}, None
    for module, run, entry, positions, in_bf16 in calls:
        key = (str(module), entry, in_bf16)
        if key not in counts:
            few, many = (count(module, run, (n * COUNTED, *entry), positions, in_bf16) for n in (1, 2))
            counts[key] = [(2 * a - b, (b - a) / COUNTED) for a, b in zip(few, many)]
        parts.append(Part(*counts[key], 4 * math.prod(entry), entry != before, 4 * size_of(module)))
        before = entry
    return parts


def run_as_it_is(part: Callable, tokens: torch.Tensor, c: torch.Tensor, positions: tuple) -> torch.Tensor:
    """The final layer, which is never checkpointed, as `DiT.run` runs a block."""
    return part(tokens, c, *positions)


def count(module: nn.Module, run: Callable, entry: tuple, positions: tuple, bf16: bool) -> tuple[int, int]:
    """Bytes (kept, peak) of a Part with an input of shape `entry` (B, N, D), called by `run`."""

    def part(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, weights, inputs)

    with FakeTensorMode():
        weights = {name: torch.empty(p.shape, requires_grad=True) for name, p in module.named_parameters()}
        x = torch.empty(entry, requires_grad=True)
        c = torch.empty(len(x), module.adaLN_modulation[1].in_features, requires_grad=True)
        angles = [torch.empty(shape) for shape in positions]
        with LiveBytes() as live:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = run(part, x, c, tuple(angles))
            kept = live.most = live.now
            out.backward(torch.empty_like(out))
    return kept, live.most


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made within, and still alive: `now`, and at `most`."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.alive = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.alive:
                self.alive.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, storage.nbytes())
        return out

    def forget(self, nbytes: int) -> None:
        self.now -= nbytes


def size_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def backward_peak(parts: list[Part], batch: int, checkpointed: bool, processes: int) -> int:
    """Bytes beside the state at the fullest moment of a backward pass, from the last part to the first.

    checkpointed: the blocks' inputs were counted to stay until the end of the pass.
    """

    def at(pair: tuple[float, float]) -> float:
        return pair[0] + pair[1] * batch

    stored = [batch * part.entry * part.new_entry + at(part.kept) for part in parts]
    most = after = 0
    for i, part in reversed(list(enumerate(parts))):
        most = max(most, sum(stored[:i]) + batch * part.entry * part.new_entry + at(part.peak) + after)
        after += part.gradients if processes == 1 else 0  # else they go to the buckets
        after += batch * part.entry if checkpointed and i < len(parts) - 1 else 0
    return int(most)


def memory_table(cfg: DictConfig, micro_batch: int, *, device: str, processes: int = 1) -> str:
    """Lines on the peak of one process and, with cfg.hardware.memory_gb, the largest micro-batch that fits.

    Raises UserError for a memory_gb that is no positive number.
    """
    limit = cfg.hardware.memory_gb
    if limit is not None and not (isinstance(limit, (int, float)) and limit > 0):
        raise UserError(f"hardware.memory_gb={limit}; needed: a number of gigabytes, or null")
    ways = {}
    for name, dense in (("routed", False), ("dense", True)):
        for suffix, checkpointed in (("", False), (" checkpointed", True)):
            ways[name + suffix] = step_memory(
                with_checkpointing(cfg, checkpointed), device=device, processes=processes, dense=dense
            )
    peaks = ", ".join(f"{memory.peak(micro_batch) / 1e9:.2f} GB {name}" for name, memory in ways.items())
    state, gradients = ways["dense"].state / 1e9, ways["dense"].gradients / 1e9
    lines = [f"memory     {peaks}, at micro-batch {micro_batch}: state {state:.2f}, gradients {gradients:.2f}"]
    if limit is not None:
        largest = {name: largest_that_fits(lambda n: memory.peak(n) <= limit * 1e9) for name, memory in ways.items()}
        fitting = ", ".join(f"{n} {name}" for name, n in largest.items())
        lines.append(f"fits       {limit:g} GB: a micro-batch of {fitting}")
    return "\n".join(lines)


def with_checkpointing(cfg: DictConfig, on: bool) -> DictConfig:
    return OmegaConf.merge(cfg, {"train": {"gradient_checkpointing": on}})


def out_of_memory(cfg: DictConfig, micro_batch: int, rows: int, limit: int, processes: int) -> str:
    """After an out-of-memory error: what was predicted, and the nearest setting that fits into `limit` bytes.

    rows: images of a process in a step, which the micro-batch has to divide.
    """
    ways = {
        on: step_memory(with_checkpointing(cfg, on), device="cuda", processes=processes).peak for on in (False, True)
    }
    present = cfg.train.gradient_checkpointing
    found = f"{ways[present](micro_batch) / 1e9:.2f} GB were predicted, the device has {limit / 1e9:.2f}"
    fitting = [n for n in range(1, micro_batch) if rows % n == 0 and ways[present](n) <= limit]
    needed = [f"train.micro_batch_size={n}" for n in fitting[-1:]]
    if not present and ways[True](micro_batch) <= limit:
        needed.append("train.gradient_checkpointing=true")
    return f"out of memory at micro-batch {micro_batch}: {found}; needed: {' or '.join(needed) or 'a smaller model'}"


def largest_that_fits(fits: Callable[[int], bool]) -> int:
    """The largest micro-batch that fits, of at most 2**20; 0 = none. Smaller ones fit too."""
    low, high = 0, 2**20
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main(overrides: list[str]) -> None:
    if set(overrides) & {"-h", "--help"}:
        print(__doc__.strip())
        return
    cfg = cli.load_config("config", overrides)
    with torch.device("meta"):  # shapes without memory
        model = instantiate(cfg.model)
    print(f"model      {cfg.model.size}\n{cost_table(model, cfg)}")
    print(memory_table(cfg, cfg.train.micro_batch_size or cfg.train.global_batch_size, device="cuda"))


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])
