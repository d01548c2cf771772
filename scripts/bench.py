"""What a training step costs, dense against routed: `python scripts/bench.py [key=value ...]`, the keys of train.py.

    python scripts/bench.py                                     the embedded default
    python scripts/bench.py model.size=DiT-B/2 data=imagenet256 train.global_batch_size=16

The very step of train.py is timed, on latents made up here: routed, dense, routed, dense, ... in one process, so that
what else the machine does falls on both alike; medians are shown. Counts need no clock: they are the same on any
machine.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli  # noqa: E402
from prepare import BatchPlan, State, compile_blocks, decide_precision  # noqa: E402
from processes import start_processes  # noqa: E402
from routing_module import Routing  # noqa: E402
from loading import instantiate  # noqa: E402
from train import build, train_step, update_ema  # noqa: E402

ROUNDS, STEPS = 7, 3  # each round times STEPS routed and STEPS dense steps
LATENTS = SimpleNamespace(to_model_input=lambda raw, rows: raw)


class OpCounter(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def step(state: State, objective, batch: tuple, plan: BatchPlan, cfg: DictConfig, number: int) -> None:
    """train.py's step and EMA update on one made-up global batch."""
    micro_batches = iter([tuple(part[: plan.micro_batch_size] for part in batch)] * plan.accumulation)
    train_step(state, objective, LATENTS, micro_batches, number, plan, cfg)
    update_ema(state.ema, state.model, cfg.train.ema_decay)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_seconds(model: torch.nn.Module, rows: int, device: torch.device, dtype: torch.dtype) -> float:
    """What the linear layers' three products a step take alone, by torch.mm at the same shapes, for `rows` tokens in
    each block."""
    total = 0.0
    for linear, count in linear_shapes(model).items():
        n_in, n_out = linear
        x, w, g = (torch.randn(s, device=device, dtype=dtype) for s in ((rows, n_in), (n_in, n_out), (rows, n_out)))
        seconds = []
        for _ in range(5):
            synchronize(device)
            started = time.perf_counter()
            _ = x @ w, g @ w.T, x.T @ g
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        total += count * statistics.median(seconds)
    return total


def linear_shapes(model: torch.nn.Module) -> dict[tuple[int, int], int]:
    """(in, out) of the linear layers that see tokens, and how many of each."""
    shapes: dict[tuple[int, int], int] = {}
    for block in model.blocks:
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.startswith("adaLN"):
                key = (module.in_features, module.out_features)
                shapes[key] = shapes.get(key, 0) + 1
    return shapes


def counts(state: State, cfg: DictConfig) -> dict[str, int]:
    """Optimizer and EMA operators a step: P5."""
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)
    with OpCounter() as counter:
        state.optimizer.step()
        update_ema(state.ema, state.model, cfg.train.ema_decay)
    state.optimizer.zero_grad(set_to_none=True)
    return {name: n for name, n in sorted(counter.calls.items()) if name.startswith("_f")}


def main(overrides: list[str]) -> None:
    cfg = cli.load_config("config", overrides)
    dist = start_processes()
    device, batch_size = dist.device, cfg.train.global_batch_size
    cfg.train.precision = decide_precision(cfg.train.precision, device)
    micro_batch_size = cfg.train.micro_batch_size or batch_size
    plan = BatchPlan(batch_size, micro_batch_size, batch_size // micro_batch_size, 0, 1)
    dense_cfg = OmegaConf.merge(cfg, {"model": {"routes": []}})
    states = {"routed": build(cfg, dist, new=True)[0], "dense": build(dense_cfg, dist, new=True)[0]}
    routed, dense = states["routed"].model, states["dense"].model
    if not routed.routes:
        raise ValueError("the model has no routes to compare with; needed: model=tread")
    objective = instantiate(cfg.objective)
    ops = counts(states["routed"], cfg)
    compiled = {name: compile_blocks(state.model, cfg.train.compile, dist) for name, state in states.items()}["routed"]
    shape = (batch_size, cfg.data.channels, cfg.data.input_size, cfg.data.input_size)
    batch = (torch.randn(shape, device=device) * 0.5, torch.randint(cfg.data.num_classes, (batch_size,), device=device))

    for state in states.values():  # compiles
        for number in range(2):
            step(state, objective, batch, plan, cfg, number)
    seconds: dict[str, list[float]] = {name: [] for name in states}
    for _ in range(ROUNDS):
        for name, state in states.items():
            for number in range(STEPS):
                synchronize(device)
                started = time.perf_counter()
                step(state, objective, batch, plan, cfg, number)
                synchronize(device)
                seconds[name].append(time.perf_counter() - started)

    median = {name: statistics.median(values) for name, values in seconds.items()}
    predicted = dense.macs() / routed.macs(Routing())
    realised = median["dense"] / median["routed"]
    dtype = torch.bfloat16 if cfg.train.precision == "bf16" else torch.float32
    matmuls = matmul_seconds(dense, batch_size * dense.num_tokens, device, dtype)
    report = {
        "model": cfg.model.size, "parameters_m": sum(p.numel() for p in dense.parameters()) / 1e6, "batch": batch_size,
        "device": device.type, "precision": cfg.train.precision, "compile": compiled,
        "gmacs_dense": dense.macs() / 1e9, "gmacs_routed": routed.macs(Routing()) / 1e9,
        "step_s_dense": median["dense"], "step_s_routed": median["routed"],
        "img_per_s_dense": batch_size / median["dense"], "img_per_s_routed": batch_size / median["routed"],
        "speedup_predicted": predicted, "speedup_measured": realised, "measured_over_predicted": realised / predicted,
        "matmul_share_of_dense_step": matmuls / median["dense"],
        "optimizer_and_ema_ops": sum(ops.values()),
    }  # fmt: skip
    for name, value in report.items():
        print(f"{name:<28} {value:.4g}" if isinstance(value, float) else f"{name:<28} {value}")
    print(json.dumps(report))


if __name__ == "__main__":
    with cli.user_errors():
        main(sys.argv[1:])
