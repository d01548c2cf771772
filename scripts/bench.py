"""What things cost, measured and counted.

    python scripts/bench.py [--compare] [key=value ...]    a training step, dense against routed
    python scripts/bench.py guidance [key=value ...]       a guided prediction, sparse against classifier-free
    python scripts/bench.py growth [OUT.png]               how a step grows with tokens, width, depth, batch and routing
    python scripts/bench.py times [OUT.png] [key=value ...]  and how its seconds do, with AdamW and with Muon

The keys are train.py's: model.size=DiT-B/2 data=imagenet256 train.global_batch_size=16.

A training step is train.py's own, on shards of noise that the loader reads from disk: dense, routed, dense, routed, ...
in one process, so that other load on the machine affects both equally. Times are medians; counts are the same on any
machine. The last line is the table as JSON. --compare adds the steps of two official codes, for the same network,
objective, batch and precision: DiT's (dense, eager) and CompVis's TREAD (its blocks compiled). Both wait for the
device, and their optimizer and their EMA update the weights one by one.

guidance: DiT-B/2 with random weights, at batch 4 in fp32; other ratios: eval.gamma_strong=0.5 eval.gamma_weak=0.9.
Classifier-free guidance runs both branches in one batch, sparse guidance in two.

growth: multiply-adds, and the memory of a step beyond its state, as cost.py counts them: around DiT-B/2 in bf16, on 256
tokens, at micro-batch 32, with one quantity changed at a time, the tokens for other mixers too. Prints the slopes on
logarithmic axes, and draws them.

times: seconds of a routed step, and the optimizer's share of them, around DiT-XS/2 on 256 tokens at batch 16.
"""

import dataclasses
import itertools
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
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conditions
import cost
import data
import dit
from autoencoder import PixelCodec
from checkpoints.config import Guidance, Settings
from checkpoints.generate import count_calls, generate_latents
from checkpoints.load import Routing, Run, build_network, round_linears
from data.encoding import LatentEncoding
from data.shards import finalize, shard_name, write_shard
from evaluation.drawing import canvas, logarithmic, styles
from randomness import normal, seeded_generator, uniform
from scripts.plot import markdown
from system import UserError, cli
from system.building import build
from system.compiling import compile_blocks, decide_compile
from system.precision import peak_tflops
from system.processes import start_processes
from system.settings import parse
from train import train_step
from training.ema import update_ema
from training.log import TimedBatches
from training.prepare import TrainingData, TrainState, batch_plan, build_state, settle_precision

ROUNDS, STEPS = 7, 3  # each round times STEPS steps of each kind
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# Operators that return a value to the host, which on a GPU waits for all queued work.
ASKING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount")
BASE = ["data=imagenet256", "model=tread", "model.size=DiT-B/2"]  # of guidance and growth
TOKENS = [64, 256, 1024, 4096]


def tokens_of(model: str, n: int) -> list[str]:
    return [f"model={model}", f"data.input_size={2 * math.isqrt(n)}"]


VARIED = {  # quantity: (its values, the overrides that set one)
    "tokens": (TOKENS, partial(tokens_of, "tread")),
    "width": ([384, 768, 1152, 1536], lambda d: [f"model.hidden_size={d}", f"model.num_heads={d // 64}"]),
    "depth": ([8, 12, 24, 48], lambda n: [f"model.depth={n}"]),
    "micro-batch": ([8, 16, 32, 64], lambda n: [f"train.global_batch_size={n}"]),
    "share of tokens kept": (
        [0.25, 0.5, 0.75, 1.0],
        lambda kept: [f"model.routes=[{{selection_ratio:{1 - kept},start_layer_idx:2,end_layer_idx:-4}}]"],
    ),
}
TIMED = {  # as VARIED, of what is measured
    "tokens": ([64, 256, 1024], partial(tokens_of, "tread")),
    "width": ([128, 256, 512], lambda d: [f"model.hidden_size={d}", f"model.num_heads={d // 32}"]),
    "batch": ([8, 16, 32], lambda n: [f"train.global_batch_size={n}"]),
}
MIXERS = ("pom", "linear", "ssd", "rwkv")
VARIED |= {f"tokens of {mixer}": (TOKENS, partial(tokens_of, mixer)) for mixer in MIXERS}


# The steps of other codes: references that keep their own copy of what they need of DiT


class PlainBlock(dit.Block):
    """DiT's block as its official code and CompVis's TREAD write it, with timm's attention."""

    def forward(self, x: torch.Tensor, c: torch.Tensor, text: None = None) -> torch.Tensor:
        modulation = self.adaLN_modulation(c)[:, None]  # (B, 1, 6 D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        q, k, v = self.attn.qkv(self.norm1(x) * (1 + scale_msa) + shift_msa).chunk(3, dim=-1)  # (B, K, D) each
        q, k, v = (part.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        x = x + gate_msa * self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        inner = self.mlp.fc1(self.norm2(x) * (1 + scale_mlp) + shift_mlp)
        return x + gate_mlp * self.mlp.fc2(F.gelu(inner, approximate="tanh"))


class CompiledBlock(PlainBlock):
    forward = torch.compile(PlainBlock.forward)  # as CompVis decorates it: one function, for all blocks and shapes


@dataclasses.dataclass(eq=False, repr=False)
class PlainDiT(dit.DiT):
    """DiT's function, its routes as CompVis's TREAD takes them: labels are checked on the host, all tokens are sorted
    and copied."""

    block: type[PlainBlock] = PlainBlock

    def new_block(self) -> dit.Block:
        return self.block(self.hidden_size, self.num_heads, self.mlp_ratio)

    def forward(self, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor, *, routing: Routing | None = None):
        assert not isinstance(self.blocks[0], CompiledBlock) or condition.max() <= self.num_classes
        c = self.t_embedder(t) + self.y_embedder(condition)  # (B, D)
        x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        (B, N, D), routes = x.shape, self.routes if routing is not None else ()
        starts, ends = ({getattr(r, end): r for r in routes} for end in ("start_layer_idx", "end_layer_idx"))
        for i, block in enumerate(self.blocks):
            if i in starts:
                shuffle = uniform((B, N), routing.generators, device=x.device).argsort(dim=1, descending=True)
                restore, K = shuffle.argsort(dim=1)[..., None].expand(-1, -1, D), N - int(N * starts[i].selection_ratio)
                full, shuffle = x.clone(), shuffle[..., None].expand(-1, -1, D)  # (B, N, D) each
                x = x.gather(1, shuffle)[:, :K]  # (B, K, D)
            x = block(x, c)
            if i in ends:
                x = torch.cat([x, full.gather(1, shuffle)[:, K:]], dim=1).gather(1, restore)
        return dit.unpatchify(self.final_layer(x, c), self.patch_size, self.grid)


# Whose step, of which blocks, and how it is taken. Both have AdamW as it is by default, and averages weight by weight.
REFERENCES = {"DiT": (PlainBlock, ["dense"]), "TREAD": (CompiledBlock, ["dense", "routed"])}


def plain_state(ours: TrainState, settings: Settings, block: type[PlainBlock]) -> TrainState:
    """PlainDiT with PyTorch's default AdamW. Raises UserError for networks other than DiT."""
    target = settings.model["_target_"]
    if target != "dit.DiT" or any(route.leave_layer_idx is not None for route in ours.model.routes):
        found = f"{target} with delayed routes" if target == "dit.DiT" else target
        raise UserError(f"--compare has a plain form of dit.DiT only, not of {found}; needed: model=tread")
    arguments = {key: value for key, value in settings.model.items() if key != "_target_"}
    model, ema = (PlainDiT(**arguments, block=block).to(ours.ema.device) for _ in range(2))
    how = settings.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.train.lr, betas=how.betas, eps=how.eps, weight_decay=how.weight_decay
    )
    averages = {"ema": ema.requires_grad_(False)}
    return dataclasses.replace(ours, net=model, model=model, averages=averages, optimizer=optimizer)


def plain_step(settings: Settings, loaded: TrainingData, state: TrainState, batches: Iterator) -> None:
    """our_step, written plainly, and without clipping."""
    train, plan, device, losses = settings.train, loaded.plan, state.ema.device, []
    for micro in range(plan.accumulation):
        raw, y = (tensor.to(device) for tensor in next(batches))
        rows = plan.slice(seeded_generator(settings.seed, "train", state.step, device=device), micro)
        x = loaded.train.to_model_input(raw, rows)
        y = torch.where(uniform(y.shape, rows, device=device) < train.label_dropout, state.model.num_classes, y)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            routing = state.model.training_routing(len(x), rows, device)
            errors = state.objective.errors(partial(state.model, routing=routing), x, y, rows)
            loss = state.model.reduce(*errors, routing).mean()
        (loss / plan.accumulation).backward()
        losses.append(loss.item())
    plain_update(state, settings)


def plain_update(state: TrainState, settings: Settings) -> None:
    """The plain step's optimizer and EMA."""
    state.optimizer.step()
    state.optimizer.zero_grad()
    with torch.no_grad():
        for averaged, p in zip(state.averages["ema"].parameters(), state.model.parameters()):
            averaged.mul_(settings.train.ema_decay).add_(p, alpha=1 - settings.train.ema_decay)


# Our step


def our_step(settings: Settings, loaded: TrainingData, state: TrainState, batches: Iterator) -> None:
    train_step(settings, loaded, state, batches)
    update_ema(state.averages["ema"], state.model, settings.train.ema_decay)


def our_update(state: TrainState, settings: Settings) -> None:
    """Our step's optimizer and EMA."""
    state.optimizer.step()
    update_ema(state.averages["ema"], state.model, settings.train.ema_decay)


def noise_latents(folder: Path, settings: Settings) -> data.Latents:
    """Shards of noise of the latents' shape, large enough that no epoch ends within the counted steps."""
    noise, classes = seeded_generator("bench"), settings.data.num_classes
    n = max(16 * settings.train.global_batch_size, 256)
    arrays = (normal(settings.data.latent_shape, noise).mul(0.5).half().numpy() for _ in range(n))
    write_shard(folder / shard_name("train", 0), ((f"{i:06d}", array, i % classes) for i, array in enumerate(arrays)))
    finalize(folder, LatentEncoding("sample_scaled"), num_classes=classes)
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


def bench(settings: Settings, compare: bool, rounds: int = ROUNDS) -> dict:
    """The report: figures of the whole run and, under `kinds`, those of each kind of step."""
    dist = start_processes()
    if dist.num_processes > 1:
        raise UserError(f"bench.py measures one process; started with {dist.num_processes}")
    plan, device = batch_plan(settings, dist), dist.device
    # Trained on noise at the full rate, weights would diverge, and CPUs are slow where numbers underflow.
    slow = dataclasses.replace(
        settings.train, lr=settings.train.lr / max(settings.train.warmup_steps, 1), warmup_steps=0
    )
    settings = settle_precision(dataclasses.replace(settings, train=slow), dist)
    state = build_state(settings, dist, new=False)
    model = state.model
    if not model.routes:
        raise UserError("the model has no routes to compare with; needed: model=tread")
    ways = {"dense": lambda *given: None, "routed": model.training_routing}
    states, kinds = {"ours": (state, our_step, our_update)}, [("ours", way) for way in ways]
    for whose, (block, theirs) in REFERENCES.items() if compare else ():
        states[whose] = plain_state(state, settings, block), plain_step, plain_update
        kinds += [(whose, way) for way in theirs]
    report = {kind: {} for kind in kinds}

    with tempfile.TemporaryDirectory() as folder:
        latents, on_gpu = noise_latents(Path(folder), settings), device.type == "cuda"
        loaded, workers = TrainingData(latents, latents, plan), settings.data.num_workers
        loader = data.make_loader(latents, plan, num_steps=10**6, num_workers=workers, pin_memory=on_gpu)
        batches = TimedBatches(iter(loader))

        def step(whose: str, way: str) -> None:
            state, take, _ = states[whose]
            state.step += 1
            state.model.training_routing = ways[way]
            take(settings, loaded, state, batches)

        def each_step() -> None:
            for kind in kinds:
                step(*kind)

        with torch.compiler.set_stance("force_eager"):  # compiled blocks hide their operators
            each_step()
        updates = {
            whose: with_gradients(state, torch.zeros_like, lambda: count(lambda: update(state, settings)))
            for whose, (state, _, update) in states.items()
        }
        for (whose, way), row in report.items():
            update = updates[whose]
            with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as flops:
                counter = count(lambda: step(whose, way))
            row |= {
                "host_waits": counter.waits - update.waits,  # AdamW's own concern its step counts, on the host
                "optimizer_and_ema_calls": sum(update.calls.values()) - update.calls["detach"],
                "to_gpu_bytes": counter.to_gpu,
                "to_cpu_bytes": counter.to_cpu,
                "matrix_products": sum(counter.products.values()),
            }
            if whose == "ours":  # the counter does not know the other steps' attention on CPUs
                row["gmacs_counted"] = flops.get_total_flops() / 2 / 3 / plan.global_batch_size / 1e9
            row["product_s"] = product_seconds(counter.products, device)
        compiled, why_not = decide_compile(settings.train.compile, device)
        compile_blocks(model.all_blocks, compiled)
        for other in 2 * kinds[len(ways) :]:  # whose graphs are not counted
            step(*other)
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
        optimizer_product_s = product_seconds(updates["ours"].products, device)

    gmacs = {"dense": model.macs() / 1e9, "routed": model.macs(Routing()) / 1e9}
    for kind, row in report.items():
        median = statistics.median(seconds[kind])
        row |= {"gmacs": gmacs[kind[1]], "step_s": median, "img_per_s": plan.global_batch_size / median}
        row["product_share"] = row.pop("product_s") / median
        row["tflops"] = cost.training_flops(gmacs[kind[1]], row["img_per_s"]) / 1e3
    ours = {way: report["ours", way] for way in ways}
    predicted, realised = gmacs["dense"] / gmacs["routed"], ours["dense"]["step_s"] / ours["routed"]["step_s"]
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if on_gpu else on_cpu
    peak = peak_tflops(next(model.parameters()).device, settings.train.precision)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": f"{type(model).__name__} {model.name}", "parameters": parameters,
        "state_gb": parameters * cost.BYTES_PER_PARAMETER / 1e9,
        "batch": f"{plan.micro_batch_size} x {plan.accumulation}", "device": name, "torch": torch.__version__,
        "precision": settings.train.precision, "compile": f"{compiled}, {why_not}" if why_not else compiled,
        "gradient_checkpointing": settings.train.gradient_checkpointing, "steps_timed": rounds * STEPS,
        "speedup_predicted": predicted, "speedup_measured": realised, "measured_over_predicted": realised / predicted,
        "optimizer": settings.optimizer.name, "optimizer_s": optimizer_s, "optimizer_product_s": optimizer_product_s,
        "optimizer_share": {way: optimizer_s / ours[way]["step_s"] for way in ways},
        "data_wait": waited, "graphs": graphs, "graph_breaks": breaks, "recompiles": recompiles,
        "peak_tflops": peak, "mfu": peak and {way: ours[way]["tflops"] / peak for way in ways},
        "faster_than": {
            f"{whose} {way}": row["step_s"] / ours[way]["step_s"]
            for (whose, way), row in report.items() if whose != "ours"
        } or None,
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


def load(*overrides: str) -> Settings:
    return parse(Settings, cli.load_config("config", overrides))


def bench_guidance(overrides: Sequence[str]) -> None:
    """Prints multiply-adds and seconds of one prediction: both methods alternate, and times are medians."""
    base = ["objective=rf", "guidance@eval=sparse", "eval.gamma_strong=0.3", "train.global_batch_size=4"]
    settings = load(*BASE, *base, "train.precision=fp32", *overrides)
    seeds, device = range(settings.train.global_batch_size), start_processes().device
    precision, methods = settings.train.precision, {"classifier-free": Guidance(settings.eval.scale)}
    methods["sparse"] = dataclasses.replace(settings.eval.alone, weak_label="same")
    net = build_network(settings)
    if precision == "bf16":
        round_linears(net)
    objective, one = build(settings.objective, object, "objective"), {"num_steps": 1}
    pool = conditions.pool(net.null_condition)
    run = Run(net.to(device).eval(), objective, PixelCodec(), settings, device, precision, pool=pool)
    labels, seconds = conditions.choose("random", seeds, pool), {name: [] for name in methods}
    for repeat in range(ROUNDS + 1):
        for name, guidance in methods.items():
            draw = lambda: generate_latents(run, guidance, seeds, labels, one)
            seconds[name] += [seconds_of(draw, device)][: repeat > 0]  # the first one warms up
    macs = {name: count_calls(run, guidance, steps=1)[1] for name, guidance in methods.items()}
    for name in methods:
        print(f"{name:16} {macs[name] / 1e9:7.2f} GMACs an image, {statistics.median(seconds[name]):.3f} s a batch")
    counted = macs["sparse"] / macs["classifier-free"]
    measured = statistics.median(a / b for a, b in zip(seconds["sparse"], seconds["classifier-free"]))
    where = f"{net.name}, batch {len(seeds)}, {precision}, {device.type}"
    print(f"sparse / classifier-free: counted {counted:.3f}, measured {measured:.3f} ({where})")


def step_costs(overrides: list[str]) -> tuple[float, float]:
    """(multiply-adds of a step's forward passes, bytes of a step beyond the state), routed."""
    settings = load(*BASE, "train.precision=bf16", "train.global_batch_size=32", *overrides)
    with torch.device("meta"):
        model = build_network(settings)
    memory, batch = cost.step_memory(settings, device="cuda"), settings.train.global_batch_size
    return batch * model.macs(Routing()), memory.peak(batch) - memory.state


def growth(out: Path) -> None:
    figure, panels = canvas((10, 4), 1, 2)
    for axes, what in zip(panels, ("multiply-adds of a step", "memory of a step beyond its state")):
        axes.set(xlabel="quantity, relative to the smallest", title=f"{what}, relative")
    rows = []
    for look, (name, (values, overrides)) in zip(styles(len(VARIED)), VARIED.items()):
        costs = np.array([step_costs(overrides(value)) for value in values])  # (values, 2)
        slopes = [slope(values, column) for column in costs.T]
        rows.append([name, ", ".join(map(str, values)), *(f"{slope:.2f}" for slope in slopes)])
        for axes, y, slope_of in zip(panels, (costs / costs[0]).T, slopes):
            axes.plot(np.array(values) / values[0], y, label=f"{name}: {slope_of:.2f}", **look)
    logarithmic(panels[1])
    keep(figure, panels, out)
    print(markdown(("quantity", "values", "slope of multiply-adds", "slope of memory"), rows) + str(out))


def times(out: Path, overrides: Sequence[str]) -> None:
    base = ["data=imagenet256", "model=tread", "model.size=DiT-XS/2", "train.global_batch_size=16", *overrides]
    figure, panels = canvas((10, 4), 1, 2)
    for axes, what in zip(panels, ("seconds of a routed step", "share of the optimizer")):
        axes.set(xlabel="quantity, relative to the smallest", title=what)
    rows, kinds = [], list(itertools.product(TIMED.items(), ("adamw", "muon")))
    for look, ((name, (values, keys)), optimizer) in zip(styles(len(kinds)), kinds):
        reports = []
        for value in values:
            torch._dynamo.reset()  # it counts the graphs of all networks of a process against one limit
            asked = load(*base, f"optimizer={optimizer}", *keys(value))
            reports.append(bench(asked, compare=False, rounds=ROUNDS // 2))
        seconds = [report["kinds"]["ours routed"]["step_s"] for report in reports]
        shares, grows = [report["optimizer_share"]["routed"] for report in reports], slope(values, seconds)
        rows.append([name, optimizer, ", ".join(map(str, values)), ", ".join(f"{s:.3g}" for s in seconds)])
        rows[-1] += [f"{grows:.2f}", ", ".join(f"{share:.2f}" for share in shares)]
        print(*rows[-1], sep=" | ", flush=True)
        for axes, y in zip(panels, (seconds, shares)):
            axes.plot(np.array(values) / values[0], y, label=f"{name}, {optimizer}: {grows:.2f}", **look)
    keep(figure, panels, out)
    print(markdown(("quantity", "optimizer", "values", "seconds", "slope", "the optimizer's share"), rows) + str(out))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """On logarithmic axes."""
    return np.polyfit(np.log(x), np.log(y), 1)[0]


def keep(figure, panels, out: Path) -> None:
    logarithmic(panels[0])
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main(arguments: list[str]) -> None:
    verb, *rest = arguments if arguments and arguments[0] in ("guidance", "growth", "times") else ("step", *arguments)
    if verb != "step" and "--compare" in rest:
        raise UserError(f"--compare is for a training step; needed: bench.py {verb} without it")
    if verb == "guidance":
        bench_guidance(rest)
    elif verb in ("growth", "times"):
        named = bool(rest) and "=" not in rest[0]
        out, keys = Path(rest[0] if named else f"runs/{verb}.png"), rest[named:]
        if own := [key for key in keys if verb == "growth" or key.startswith("optimizer=")]:
            raise UserError(f"{verb} chooses that itself, and takes no {own[0]}; needed: bench.py {verb} without it")
        growth(out) if verb == "growth" else times(out, keys)
    else:
        report = bench(load(*(key for key in rest if key != "--compare")), "--compare" in rest)
        print(show(report))
        print(json.dumps(report))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "CUDA is not available")
    cli.command(main, __doc__)
