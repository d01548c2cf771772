"""What things cost, measured and counted.

    python scripts/bench.py [--compare] [key=value ...]    a training step, dense against routed
    python scripts/bench.py guidance [key=value ...]       a guided prediction, sparse against classifier-free
    python scripts/bench.py growth [OUT.png]               how a step grows with tokens, width, depth, batch and routing

The keys are train.py's: model.size=DiT-B/2 data=imagenet256 train.global_batch_size=16.

A training step is train.py's own, on shards of noise that the loader reads from disk: dense, routed, dense, routed, ...
in one process, so that other load on the machine affects both equally. Times are medians; counts are the same on any
machine. The last line is the table as JSON. --compare adds a plain step of the same network, batch and precision, as
research code commonly writes it: eager, with a few waits for the device, and an optimizer and an EMA that update the
weights one by one.

guidance: DiT-B/2 with random weights, at batch 4 in fp32; other ratios: eval.gamma_strong=0.5 eval.gamma_weak=0.9.
Classifier-free guidance runs both branches in one batch, sparse guidance in two.

growth: multiply-adds, and the memory of a step beyond its state, as cost.py counts them: around DiT-B/2 in bf16, on 256
tokens, at micro-batch 32, with one quantity changed at a time. Prints the slopes on logarithmic axes, and draws them.
"""

import json
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cost
import data
import dit
import sample
from checkpoints.load import round_linears
from data import BatchPlan
from data.encoding import LatentEncoding
from data.shards import finalize, shard_name, write_shard
from guidance import Guidance
from randomness import normal, seeded_generator, uniform
from routing_module import Routing, num_kept
from scripts.plot import canvas, markdown
from system import UserError, cli
from system.compiling import compile_blocks, decide_compile
from system.instantiate import instantiate
from system.processes import start_processes
from train import set_learning_rate, train_step, update_ema
from training.log import TimedBatches
from training.prepare import TrainState, batch_plan, build, resolve_config, settle_precision

ROUNDS, STEPS = 7, 3  # each round times STEPS steps of each kind
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# Operators that return a value to the host, which on a GPU waits for all queued work.
ASKING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount")
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "L40S": 362, "4090": 165}  # bf16, dense, from the data sheets
BASE = ["data=imagenet256", "model=tread", "model.size=DiT-B/2"]  # of guidance and growth
VARIED = {  # quantity: (its values, the overrides that set one)
    "tokens": ([64, 256, 1024, 4096], lambda n: [f"data.input_size={2 * math.isqrt(n)}"]),
    "width": ([384, 768, 1152, 1536], lambda d: [f"model.hidden_size={d}", f"model.num_heads={d // 64}"]),
    "depth": ([8, 12, 24, 48], lambda n: [f"model.depth={n}"]),
    "micro-batch": ([8, 16, 32, 64], lambda n: [f"train.global_batch_size={n}"]),
    "share of tokens kept": (
        [0.25, 0.5, 0.75, 1.0],
        lambda kept: [f"model.routes=[{{selection_ratio:{1 - kept},start_layer_idx:2,end_layer_idx:-4}}]"],
    ),
}


# The plain step: a reference that keeps its own copy of what it needs of DiT


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
) -> None:
    """our_step, written plainly."""
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
    plain_update(state, cfg)


def plain_update(state: TrainState, cfg: DictConfig) -> None:
    """The plain step's optimizer and EMA."""
    state.optimizer.step()
    state.optimizer.zero_grad()
    with torch.no_grad():
        for averaged, p in zip(state.ema.parameters(), state.model.parameters()):
            averaged.mul_(cfg.train.ema_decay).add_(p, alpha=1 - cfg.train.ema_decay)


# Our step


def our_step(
    state: TrainState, objective, latents: data.Latents, batches: Iterator, step: int, plan: BatchPlan, cfg: DictConfig
) -> None:
    train_step(state, objective, latents, batches, step, plan, cfg)
    update_ema(state.ema, state.model, cfg.train.ema_decay)


def our_update(state: TrainState, cfg: DictConfig) -> None:
    """Our step's optimizer and EMA."""
    state.optimizer.step()
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


# Measuring


class OpCounter(TorchDispatchMode):
    """Counts operators by name, matrix products by shape, and bytes copied between host and GPU."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.products: Counter[tuple] = Counter()  # (dtype, ((shape, stride), (shape, stride)))
        self.to_gpu = self.to_cpu = self.blocking = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] += 1
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if name in PRODUCTS:
            self.products[out.dtype, tuple((tuple(x.shape), x.stride()) for x in args[-2:])] += 1
        if name in ("_to_copy", "copy_") and isinstance(out, torch.Tensor):
            source = args[name == "copy_"]
            devices, moved = (source.device.type, out.device.type), source.numel() * source.element_size()
            self.to_gpu += moved * (devices == ("cpu", "cuda"))
            self.to_cpu += moved * (devices == ("cuda", "cpu"))
            self.blocking += devices == ("cpu", "cuda") and not kwargs.get("non_blocking", False)
        return out

    @property
    def waits(self) -> int:
        return sum(self.calls[name] for name in ASKING)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


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
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max(initial=0))


def with_gradients(state: TrainState, make: Callable, work: Callable[[], object]) -> object:
    """What `work` returns when every weight has a gradient, make(weight)."""
    for p in state.model.parameters():
        p.grad = make(p)
    found = work()
    state.optimizer.zero_grad(set_to_none=True)
    return found


def count(work: Callable[[], object]) -> OpCounter:
    with OpCounter() as counter:
        work()
    return counter


def bench(cfg: DictConfig, compare: bool, rounds: int = ROUNDS) -> dict:
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
    states = {"ours": (state, our_step, our_update)}
    if compare:
        states["plain"] = plain_state(cfg, device), plain_step, plain_update
    for each, _, _ in states.values():
        # Trained on noise at the full rate, weights would diverge, and CPUs are slow where numbers underflow.
        set_learning_rate(each.optimizer, 1, cfg.train)
    ways = {"dense": (), "routed": model.routes}
    report = {(whose, way): {} for whose in states for way in ways}

    with tempfile.TemporaryDirectory() as folder:
        latents, on_gpu = noise_latents(Path(folder), cfg), device.type == "cuda"
        workers = cfg.data.num_workers
        loader = data.make_loader(latents, plan, num_steps=10**6, num_workers=workers, pin_memory=on_gpu)
        batches, taken = TimedBatches(iter(loader)), 0

        def step(whose: str, way: str) -> None:
            nonlocal taken
            taken += 1
            state, take, _ = states[whose]
            state.model.routes = ways[way]
            take(state, objective, latents, batches, taken, plan, cfg)

        def each_step() -> None:
            for kind in report:
                step(*kind)

        each_step()
        updates = {
            whose: with_gradients(state, torch.zeros_like, lambda: count(lambda: update(state, cfg)))
            for whose, (state, _, update) in states.items()
        }
        for (whose, way), row in report.items():  # counted eagerly: compiled blocks hide their operators
            update = updates[whose]
            with FlopCounterMode(display=False) as flops:
                counter = count(lambda: step(whose, way))
            row |= {
                "host_waits": counter.waits - update.waits,  # AdamW's own concern its step counts, on the host
                "optimizer_and_ema_calls": sum(update.calls.values()) - update.calls["detach"],
                "to_gpu_bytes": counter.to_gpu,
                "to_cpu_bytes": counter.to_cpu,
                "matrix_products": sum(counter.products.values()),
            }
            if whose == "ours":  # the counter does not know the plain step's attention on CPUs
                row["gmacs_counted"] = flops.get_total_flops() / 2 / 3 / plan.global_batch_size / 1e9
            row["product_s"] = product_seconds(counter.products, device)
        compiled, why_not = decide_compile(cfg.train.compile, device)
        compile_blocks(model, compiled)
        counters.clear()
        each_step()
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        each_step()
        seconds: dict[tuple, list[float]] = {kind: [] for kind in report}
        batches.waited = 0.0
        for _ in range(rounds):
            for kind in report:
                seconds[kind] += [seconds_of(lambda: step(*kind), device) for _ in range(STEPS)]
        waited = batches.waited / sum(map(sum, seconds.values()))
        recompiles = counters["stats"]["unique_graphs"] - graphs
        for kind, row in report.items():
            row["step_gb"] = step_memory(lambda: step(*kind), device) / 1e9
        optimizer = lambda: with_gradients(state, torch.randn_like, lambda: seconds_of(state.optimizer.step, device))
        optimizer_s = statistics.median(optimizer() for _ in range(rounds))

    model.routes = ways["routed"]
    gmacs = {"dense": model.macs() / 1e9, "routed": model.macs(Routing()) / 1e9}
    for kind, row in report.items():
        median = statistics.median(seconds[kind])
        row |= {"gmacs": gmacs[kind[1]], "step_s": median, "img_per_s": plan.global_batch_size / median}
        row["product_share"] = row.pop("product_s") / median
        row["tflops"] = 6e-3 * gmacs[kind[1]] * row["img_per_s"]
    ours = {way: report["ours", way] for way in ways}
    predicted, realised = gmacs["dense"] / gmacs["routed"], ours["dense"]["step_s"] / ours["routed"]["step_s"]
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if on_gpu else on_cpu
    peak = next((peak for known, peak in PEAK_TFLOPS.items() if known in name and cfg.train.precision == "bf16"), None)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": cfg.model.size, "parameters": parameters, "state_gb": parameters * cost.BYTES_PER_PARAMETER / 1e9,
        "batch": f"{plan.micro_batch_size} x {plan.accumulation}", "device": name, "torch": torch.__version__,
        "precision": cfg.train.precision, "compile": f"{compiled}, {why_not}" if why_not else compiled,
        "gradient_checkpointing": cfg.train.gradient_checkpointing, "steps_timed": rounds * STEPS,
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


# Guidance and growth


def bench_guidance(overrides: Sequence[str]) -> None:
    """Prints multiply-adds and seconds of one prediction: both methods alternate, and times are medians."""
    base = ["objective=rf", "guidance@eval=sparse", "eval.gamma_strong=0.3", "train.global_batch_size=4"]
    cfg = cli.load_config("config", [*BASE, *base, "train.precision=fp32", *overrides])
    precision, seeds, device = cfg.train.precision, range(cfg.train.global_batch_size), start_processes().device
    sparse = Guidance(cfg.eval.scale, None, cfg.eval.gamma_strong, cfg.eval.gamma_weak, "same")
    methods = {"classifier-free": Guidance(cfg.eval.scale), "sparse": sparse}
    net = instantiate(cfg.model)
    if precision == "bf16":
        round_linears(net)
    run = sample.Run(net.to(device).eval(), instantiate(cfg.objective), None, cfg, device, precision)
    labels, seconds, macs = sample.labels_for(run.num_classes, seeds, "random"), {name: [] for name in methods}, {}
    for repeat in range(ROUNDS + 1):
        for name, guidance in methods.items():
            draw = lambda: sample.generate_latents(run, guidance, seeds, labels, {"num_steps": 1})
            seconds[name] += [seconds_of(draw, device)][: repeat > 0]  # the first one warms up
            macs[name] = run.macs
    for name in methods:
        print(f"{name:16} {macs[name] / 1e9:7.2f} GMACs an image, {statistics.median(seconds[name]):.3f} s a batch")
    counted = macs["sparse"] / macs["classifier-free"]
    measured = statistics.median(a / b for a, b in zip(seconds["sparse"], seconds["classifier-free"]))
    where = f"{cfg.model.size}, batch {len(seeds)}, {precision}, {device.type}"
    print(f"sparse / classifier-free: counted {counted:.3f}, measured {measured:.3f} ({where})")


def step_costs(overrides: list[str]) -> tuple[float, float]:
    """(multiply-adds of a step's forward passes, bytes of a step beyond the state), routed."""
    cfg = cli.load_config("config", [*BASE, "train.precision=bf16", "train.global_batch_size=32", *overrides])
    with torch.device("meta"):
        model = instantiate(cfg.model)
    memory, batch = cost.step_memory(cfg, device="cuda"), cfg.train.global_batch_size
    return batch * model.macs(Routing()), memory.peak(batch) - memory.state


def growth(out: Path) -> None:
    figure, panels = canvas((10, 4), 1, 2)
    for axes, what in zip(panels, ("multiply-adds of a step", "memory of a step beyond its state")):
        axes.set(xscale="log", yscale="log", xlabel="quantity, relative to the smallest", title=f"{what}, relative")
        axes.grid(alpha=0.3)
    rows = []
    for name, (values, overrides) in VARIED.items():
        costs = np.array([step_costs(overrides(value)) for value in values])  # (values, 2)
        x, relative = np.array(values) / values[0], (costs / costs[0]).T
        slopes = [np.polyfit(np.log(x), np.log(y), 1)[0] for y in relative]
        rows.append([name, ", ".join(map(str, values)), *(f"{slope:.2f}" for slope in slopes)])
        for axes, y, slope in zip(panels, relative, slopes):
            axes.plot(x, y, marker="o", label=f"{name}: {slope:.2f}")
            axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(markdown(("quantity", "values", "slope of multiply-adds", "slope of memory"), rows) + str(out))


def main(arguments: list[str]) -> None:
    verb, *rest = arguments if arguments and arguments[0] in ("guidance", "growth") else ("step", *arguments)
    if verb == "guidance":
        bench_guidance(rest)
    elif verb == "growth":
        growth(Path(rest[0] if rest else "runs/growth.png"))
    else:
        report = bench(cli.load_config("config", [key for key in rest if key != "--compare"]), "--compare" in rest)
        print(show(report))
        print(json.dumps(report))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "CUDA is not available")
    cli.command(main, __doc__)
