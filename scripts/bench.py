"""What a training step costs, dense against routed: `python scripts/bench.py [--compare] [key=value ...]`.

    python scripts/bench.py                                     the embedded default
    python scripts/bench.py --compare model.size=DiT-B/2 data=imagenet256 train.global_batch_size=16

The keys are train.py's. It times train.py's own step, on shards of noise that the loader reads from disk: dense,
routed, dense, routed, ... in one process, so that other load on the machine affects both equally. Times are medians;
counts are the same on any machine. The last line is the table as JSON.

--compare adds a plain step of the same network, batch and precision, as research code commonly writes it: eager, with a
few waits for the device, and an optimizer and an EMA that update the weights one by one.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import dit
from cost import BYTES_PER_PARAMETER
from data import BatchPlan
from data.encoding import LatentEncoding
from data.shards import finalize, shard_name, write_shard
from randomness import normal, seeded_generator, uniform
from routing_module import Routing, num_kept
from system import UserError, cli
from system.compiling import compile_blocks, decide_compile
from system.launchers import own_process
from system.processes import start_processes
from train import set_learning_rate, train_step, update_ema
from training.log import TimedBatches
from training.prepare import TrainState, batch_plan, build, resolve_config, settle_precision

ROUNDS, STEPS = 7, 3  # each round times STEPS steps of each kind
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# Operators that return a value to the host, which on a GPU waits for all queued work.
ASKING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount")
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "L40S": 362, "4090": 165}  # bf16, dense, from the data sheets


class OpCounter(TorchDispatchMode):
    """Counts operators by name, matrix products by shape, and bytes copied between host and GPU."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.products: Counter[tuple] = Counter()  # (dtype, ((shape, stride), (shape, stride)))
        self.to_gpu = self.to_cpu = self.blocking = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        out = function(*args, **kwargs)
        if name in PRODUCTS:
            factors = args[-2:]
            self.products[out.dtype, tuple((tuple(x.shape), x.stride()) for x in factors)] += 1
        if name in ("_to_copy", "copy_") and isinstance(out, torch.Tensor):
            source = args[1] if name == "copy_" else args[0]
            devices = source.device.type, out.device.type
            moved = source.numel() * source.element_size()
            self.to_gpu += moved * (devices == ("cpu", "cuda"))
            self.to_cpu += moved * (devices == ("cuda", "cpu"))
            self.blocking += devices == ("cpu", "cuda") and not kwargs.get("non_blocking", False)
        return out

    @property
    def waits(self) -> int:
        return sum(self.calls[name] for name in ASKING)


class PlainAttention(dit.Attention):
    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class PlainBlock(dit.Block):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.attn = PlainAttention(hidden_size, num_heads)


class PlainDiT(dit.DiT):
    """DiT's function, written plainly: labels are checked on the host, all tokens are sorted and copied."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, *, routing: Routing | None = None):
        assert y.max() <= self.num_classes
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        (B, N, D), routes = x.shape, self.routes if routing is not None else ()
        starts, ends = ({getattr(r, end): r for r in routes} for end in ("start_layer_idx", "end_layer_idx"))
        for i, block in enumerate(self.blocks):
            if i in starts:
                shuffled = uniform((B, N), routing.generators, device=x.device).argsort(dim=1, descending=True)
                keep = shuffled[:, : num_kept(N, starts[i].selection_ratio), None].expand(-1, -1, D)  # (B, K, D)
                full, x = x.clone(), x.gather(1, keep)
            x = block(x, c)
            if i in ends:
                x = full.scatter(1, keep, x)
        return dit.unpatchify(self.final_layer(x, c), self.patch_size, self.out_channels)


def plain_state(cfg: DictConfig, device: torch.device) -> TrainState:
    """PlainDiT with PyTorch's default AdamW. Raises UserError for networks other than DiT."""
    if cfg.model._target_ != "dit.DiT":
        raise UserError(f"--compare has a plain form of dit.DiT only, not of {cfg.model._target_}; needed: model=tread")
    settings = {key: value for key, value in cfg.model.items() if key != "_target_"}
    model, ema = (PlainDiT(**settings, block=PlainBlock).to(device) for _ in range(2))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.train.lr, betas=tuple(cfg.optimizer.betas), eps=cfg.optimizer.eps,
        weight_decay=cfg.optimizer.weight_decay,
    )  # fmt: skip
    return TrainState(model, model, ema.requires_grad_(False), optimizer, guard=None)


def plain_step(
    state: TrainState, objective, latents: data.Latents, batches: Iterator, step: int, plan: BatchPlan, cfg: DictConfig
) -> float:
    """train_step and update_ema, written plainly -> the loss."""
    device, losses = state.model.pos_embed.device, []
    for micro in range(plan.accumulation):
        raw, y = (tensor.to(device) for tensor in next(batches))
        rows = plan.slice(seeded_generator(cfg.seed, "train", step, device=device), micro)
        x = latents.to_model_input(raw, rows)
        y = torch.where(uniform(y.shape, rows, device=device) < cfg.train.label_dropout, state.model.num_classes, y)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.train.precision == "bf16"):
            loss = objective.loss(partial(state.model, routing=Routing(generators=rows)), x, y, rows).mean()
        (loss / plan.accumulation).backward()
        losses.append(loss.item())
    nn.utils.clip_grad_norm_(state.model.parameters(), cfg.train.grad_clip)
    optimize(state, cfg)
    return statistics.fmean(losses)


def optimize(state: TrainState, cfg: DictConfig) -> None:
    """The plain step's optimizer and EMA."""
    state.optimizer.step()
    state.optimizer.zero_grad()
    with torch.no_grad():
        for averaged, p in zip(state.ema.parameters(), state.model.parameters()):
            averaged.mul_(cfg.train.ema_decay).add_(p, alpha=1 - cfg.train.ema_decay)


def our_step(
    state: TrainState, objective, latents: data.Latents, batches: Iterator, step: int, plan: BatchPlan, cfg: DictConfig
) -> None:
    train_step(state, objective, latents, batches, step, plan, cfg)
    update_ema(state.ema, state.model, cfg.train.ema_decay)


def noise_latents(folder: Path, cfg: DictConfig) -> data.Latents:
    """Shards of noise of the config's shape, large enough that no epoch ends within the counted steps."""
    shape, noise = (cfg.data.channels, cfg.data.input_size, cfg.data.input_size), seeded_generator("bench")
    n = max(16 * cfg.train.global_batch_size, 256)
    arrays = (normal(shape, noise).mul(0.5).half().numpy() for _ in range(n))
    samples = ((f"{i:06d}", array, i % cfg.data.num_classes) for i, array in enumerate(arrays))
    write_shard(folder / shard_name("train", 0), samples)
    finalize(folder, LatentEncoding("sample_scaled"), num_classes=cfg.data.num_classes)
    return data.open_latents(folder)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def product_seconds(products: Counter[tuple], device: torch.device) -> float:
    """Seconds of these matrix products, each shape on its own, back to back."""
    total = 0.0
    for (dtype, factors), count in products.items():
        a, b = (torch.empty_strided(*factor, dtype=dtype, device=device).normal_() for factor in factors)
        once = seconds_of(lambda: a @ b, device)
        repeats = max(7, min(200, int(0.03 / once)))  # 30 ms per shape, since small products vary
        total += count * statistics.median(seconds_of(lambda: a @ b, device) for _ in range(repeats))
    return total


def step_memory(work: Callable[[], object], device: torch.device) -> int:
    """Peak number of bytes allocated within a step, beyond those allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = most = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def count_update(state: TrainState, update: Callable[[], object]) -> OpCounter:
    """Operators of the optimizer's step and the EMA, after a first step."""
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)
    with OpCounter() as counter:
        update()
    state.optimizer.zero_grad(set_to_none=True)
    return counter


def optimizer_seconds(state: TrainState, device: torch.device) -> float:
    """Seconds of the optimizer's step alone, the median of several."""
    seconds = []
    for _ in range(ROUNDS):
        for p in state.model.parameters():
            p.grad = torch.randn_like(p)
        seconds.append(seconds_of(state.optimizer.step, device))
    state.optimizer.zero_grad(set_to_none=True)
    return statistics.median(seconds)


def bench(cfg: DictConfig, compare: bool) -> dict:
    """The report: figures of the whole run and, under `kinds`, those of each kind of step."""
    dist = start_processes()
    if dist.num_processes > 1:
        raise UserError(f"bench.py measures one process; started with {dist.num_processes}")
    cfg, device = resolve_config(cfg, dist), dist.device
    plan = batch_plan(cfg.train, dist)
    settle_precision(cfg, dist, plan.micro_batch_size)
    state, objective = build(cfg, dist, new=False)
    model = state.model
    if not model.routes:
        raise UserError("the model has no routes to compare with; needed: model=tread")
    states = {"ours": (state, our_step)} | ({"plain": (plain_state(cfg, device), plain_step)} if compare else {})
    for each, _ in states.values():
        # Trained on noise at the full rate, weights would diverge, and CPUs are slow where numbers underflow.
        set_learning_rate(each.optimizer, 1, cfg.train)
    ways = {"dense": (), "routed": model.routes}
    kinds = [(whose, way) for whose in states for way in ways]
    report = {kind: {} for kind in kinds}

    with tempfile.TemporaryDirectory() as folder:
        latents = noise_latents(Path(folder), cfg)
        loader = data.make_loader(
            latents, plan, num_steps=10**6, num_workers=cfg.data.num_workers, pin_memory=device.type == "cuda"
        )
        batches = TimedBatches(iter(loader))
        taken = 0

        def step(whose: str, way: str) -> None:
            nonlocal taken
            taken += 1
            state, take = states[whose]
            state.model.routes = ways[way]
            take(state, objective, latents, batches, taken, plan, cfg)

        updates = {"ours": lambda: (state.optimizer.step(), update_ema(state.ema, model, cfg.train.ema_decay))}
        updates |= {"plain": lambda: optimize(states["plain"][0], cfg)}
        for kind in kinds:
            step(*kind)
        updating = {whose: count_update(states[whose][0], updates[whose]) for whose in states}
        for kind in kinds:  # counted eagerly: compiled blocks hide their operators
            with OpCounter() as counter, FlopCounterMode(display=False) as flops:
                step(*kind)
            update = updating[kind[0]]
            report[kind] |= {
                "host_waits": counter.waits - update.waits,  # AdamW's own concern its step counts, on the host
                "optimizer_and_ema_calls": sum(update.calls.values()) - update.calls["detach"],
                "to_gpu_bytes": counter.to_gpu,
                "to_cpu_bytes": counter.to_cpu,
                "matrix_products": sum(counter.products.values()),
            }
            if kind[0] == "ours":  # the counter does not know the plain step's attention on CPUs
                report[kind]["gmacs_counted"] = flops.get_total_flops() / 2 / 3 / plan.global_batch_size / 1e9
            report[kind]["product_s"] = product_seconds(counter.products, device)
        compiled, why_not = decide_compile(cfg.train.compile, device)
        compile_blocks(model, compiled)
        counters.clear()
        for kind in kinds:
            step(*kind)
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        for kind in kinds:
            step(*kind)
        seconds: dict[tuple, list[float]] = {kind: [] for kind in kinds}
        batches.waited = 0.0
        for _ in range(ROUNDS):
            for kind in kinds:
                seconds[kind] += [seconds_of(lambda: step(*kind), device) for _ in range(STEPS)]
        waited = batches.waited / sum(map(sum, seconds.values()))
        recompiles = counters["stats"]["unique_graphs"] - graphs
        for kind in kinds:
            report[kind]["step_gb"] = step_memory(lambda: step(*kind), device) / 1e9
        optimizer_s = optimizer_seconds(state, device)

    model.routes = ways["routed"]
    gmacs = {"dense": model.macs() / 1e9, "routed": model.macs(Routing()) / 1e9}
    for kind in kinds:
        row, median = report[kind], statistics.median(seconds[kind])
        row |= {"gmacs": gmacs[kind[1]], "step_s": median, "img_per_s": plan.global_batch_size / median}
        row["product_share"] = row.pop("product_s") / median
        row["tflops"] = 6e-3 * gmacs[kind[1]] * row["img_per_s"]
    ours = {way: report["ours", way] for way in ways}
    predicted, realised = gmacs["dense"] / gmacs["routed"], ours["dense"]["step_s"] / ours["routed"]["step_s"]
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else on_cpu
    peak = next((peak for known, peak in PEAK_TFLOPS.items() if known in name and cfg.train.precision == "bf16"), None)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": cfg.model.size, "parameters": parameters, "state_gb": parameters * BYTES_PER_PARAMETER / 1e9,
        "batch": f"{plan.micro_batch_size} x {plan.accumulation}", "device": name, "torch": torch.__version__,
        "precision": cfg.train.precision, "compile": f"{compiled}, {why_not}" if why_not else compiled,
        "gradient_checkpointing": cfg.train.gradient_checkpointing, "steps_timed": ROUNDS * STEPS,
        "speedup_predicted": predicted, "speedup_measured": realised, "measured_over_predicted": realised / predicted,
        "optimizer": cfg.optimizer.name, "optimizer_s": optimizer_s,
        "optimizer_share": {way: optimizer_s / ours[way]["step_s"] for way in ways},
        "data_wait": waited, "graphs": graphs, "graph_breaks": breaks, "recompiles": recompiles,
        "peak_tflops": peak, "mfu": peak and {way: ours[way]["tflops"] / peak for way in ways},
        "faster_than_plain": {
            way: report["plain", way]["step_s"] / ours[way]["step_s"] for way in ways
        } if compare else None,
        "kinds": {" ".join(kind): row for kind, row in report.items()},
    }  # fmt: skip


def show(report: dict) -> str:
    """The report as a table: the figures of the whole run, then one column per kind of step."""

    def text(value) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {text(part)}" for name, part in value.items())
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    kinds = report["kinds"]
    lines = [f"{name:<26}{text(value)}" for name, value in report.items() if name != "kinds" and value is not None]
    lines += ["", " " * 26 + "".join(f"{kind:>14}" for kind in kinds)]
    for name in next(iter(kinds.values())):
        lines.append(f"{name:<26}" + "".join(f"{text(row.get(name, '-')):>14}" for row in kinds.values()))
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    if set(arguments) & {"-h", "--help"}:
        print(__doc__.strip())
        return
    overrides = [argument for argument in arguments if argument != "--compare"]
    report = bench(cli.load_config("config", overrides), "--compare" in arguments)
    print(show(report))
    print(json.dumps(report))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "CUDA is not available")
    with cli.user_errors():
        own_process()
        main(sys.argv[1:])
