"""What this code does on a GPU, in at most ten minutes: `bash scripts/gpu_check.sh [--small] [out=FILE.json]`.

The tests marked gpu, then the training step of four sizes, dense and routed (scripts/bench.py), with its memory beside
the prediction of cost.py, then reading data, sampling and scoring. It ends with a table for docs/performance.md, and
writes all figures to a JSON file. It trains on noise in a temporary folder and changes no run.

--small: the same program on tiny networks, on a CPU too, in less than two minutes.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import conditions
import cost
import data
from autoencoder import PixelCodec
from checkpoints.config import Settings
from checkpoints.generate import generate_latents
from checkpoints.load import Run, build_network
from evaluation.features import load_extractor
from guidance import Guidance
from scripts import bench
from scripts.plot import markdown
from system import UserError, cli
from system.building import build
from system.files import write_text_atomic
from system.processes import start_processes
from training.prepare import batch_plan

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 540  # seconds; what would begin later is left out, and the end says so
SIZES = {"DiT-S/2": 256, "DiT-B/2": 256, "DiT-L/2": 128, "DiT-XL/2": 128}  # micro-batches that fit in 40 GB
SMALL = ["model.depth=6", "model.hidden_size=32", "model.num_heads=2", "train.compile=off", "data.num_workers=0"]
SMALL += ["data.input_size=8", "data.num_classes=10", "train.precision=fp32", "train.global_batch_size=4"]
GOALS = {"mfu of XL/2, dense": 0.45, "measured / predicted": 0.95, "waits": 0}
COLUMNS = ("model", "batch", "dense img/s", "routed img/s", "dense MFU", "routed MFU", "measured / predicted",
           "dense GB", "routed GB", "predicted GB", "waits")  # fmt: skip


def run_tests() -> str:
    """The last line of the tests marked gpu, or how many are skipped without one."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=BUDGET)
    if done.returncode not in (0, 5):
        print(done.stdout)
    return done.stdout.strip().splitlines()[-1]


def config_of(size: str, batch: int, small: bool) -> Settings:
    """ImageNet's setting of a size; small: a tiny network on four images."""
    keys = [f"model.size={size}", f"train.global_batch_size={batch}", *(SMALL if small else ())]
    return bench.load("data=imagenet256", "model=tread", *keys)


def row_of(size: str, report: dict, settings: Settings) -> dict:
    """One line of the table, from a report. GB are those of a step beyond the state."""
    ways = {way: report["kinds"][f"ours {way}"] for way in ("dense", "routed")}
    mfu, batch = report["mfu"] or {}, settings.train.global_batch_size
    settings = replace(settings, train=replace(settings.train, precision=report["precision"]))
    memory = cost.step_memory(settings, device=start_processes().device.type)
    row = {"model": size, "batch": batch, "measured / predicted": report["measured_over_predicted"]}
    for way, kind in ways.items():
        row |= {f"{way} img/s": kind["img_per_s"], f"{way} MFU": mfu.get(way), f"{way} GB": kind["step_gb"]}
    row["predicted GB"] = (memory.peak(batch) - memory.state) / 1e9
    return row | {"waits": sum(kind["host_waits"] for kind in ways.values()), "report": report}


def loader_rate(settings: Settings) -> float:
    """Samples per second that the loader reads, with the config's workers."""
    with tempfile.TemporaryDirectory() as folder:
        latents = bench.noise_latents(Path(folder), settings)
        plan, steps = batch_plan(settings, start_processes()), 50
        loader = iter(data.make_loader(latents, plan, num_steps=steps, num_workers=settings.data.num_workers))
        next(loader)
        seconds = bench.seconds_of(lambda: list(loader), torch.device("cpu"))
        return (steps - 1) * plan.micro_batch_size / seconds


def sampling_rates(settings: Settings, images: int) -> dict[str, float]:
    """Images per second of 10 steps with guidance, in latents, by precision; random weights cost what others do."""
    device, rates = start_processes().device, {}
    model = build_network(settings).to(device).eval().requires_grad_(False)
    objective, pool = build(settings.objective, object, "objective"), conditions.pool(model.null_condition)
    for precision in ("fp32", "bf16"):
        run = Run(model, objective, PixelCodec(), settings, device, precision, pool=pool)
        labels = conditions.choose("balanced", range(images), pool)
        draw = lambda: generate_latents(run, Guidance(2.0), range(images), labels, {"num_steps": 10})
        draw()
        rates[precision] = images / bench.seconds_of(draw, device)
    return rates


def scoring_rate(images: int) -> float:
    """Images per second through the digits' classifier, from the host."""
    device = start_processes().device
    extractor, pixels = load_extractor("mnist", device=device), torch.zeros(images, 3, 28, 28, dtype=torch.uint8)
    extractor(pixels)
    return images / bench.seconds_of(lambda: extractor(pixels), device)


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    text = lambda value: "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
    return markdown(COLUMNS, [[text(row[name]) for name in COLUMNS] for row in rows])


def main(arguments: list[str]) -> None:
    options = dict(argument.partition("=")[::2] for argument in arguments)
    if unknown := options.keys() - {"--small", "out"}:
        raise UserError(f"unknown argument {min(unknown)}; needed: --small, out=FILE.json")
    small, out = "--small" in options, Path(options.get("out", "runs/gpu_check.json"))
    if not (small or torch.cuda.is_available()):
        raise UserError("no GPU; needed: one that CUDA finds, or --small")
    started, device = time.monotonic(), start_processes().device
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    rows, left_out, tests = [], [], run_tests()
    print(f"tests      {tests}", flush=True)
    for size, batch in SIZES.items():
        if time.monotonic() - started > BUDGET * 0.75:
            left_out.append(size)
            continue
        settings = config_of(size, batch, small)
        try:
            report = bench.bench(settings, compare=False, rounds=1 if small else bench.ROUNDS)
        except torch.OutOfMemoryError:
            left_out.append(f"{size} (out of memory at {batch})")
            continue
        rows.append(row_of(size, report, settings))
        print(f"bench      {size}: {report['measured_over_predicted']:.3f} measured / predicted", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    settings = config_of("DiT-B/2", 256, small)
    found = {
        "device": name, "torch": torch.__version__, "goals": GOALS, "tests": tests, "rows": rows, "left_out": left_out,
        "loader_samples_per_s": loader_rate(settings),
        "sampling_images_per_s": sampling_rates(settings, 4 if small else 256),
        "scoring_images_per_s": scoring_rate(16 if small else 5000), "seconds": time.monotonic() - started,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out, json.dumps(found, indent=2) + "\n")
    print(f"\n{name}, torch {torch.__version__}\n\n{table(rows)}")
    sampling = ", ".join(f"{rate:.4g} {precision}" for precision, rate in found["sampling_images_per_s"].items())
    print(f"Loader: {found['loader_samples_per_s']:.4g} samples/s. Sampling B/2, 10 guided steps: {sampling} images/s.")
    print(f"Left out: {', '.join(left_out) or 'nothing'}. {found['seconds']:.0f} s. {out}")


if __name__ == "__main__":
    cli.command(main, __doc__)
