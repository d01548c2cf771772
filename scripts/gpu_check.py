"""What this code does on a GPU, in at most ten minutes: `bash scripts/gpu_check.sh [--small] [out=FILE.json]`.

The tests marked gpu, then the training step of four sizes, dense and routed (scripts/bench.py), with its memory against
the prediction of cost.py, then reading data, sampling and scoring. It ends with a table for docs/performance.md, and
writes all figures to a JSON file. It trains on noise in a temporary folder and changes no run.

--small: the same program on tiny networks, on a CPU too, in less than two minutes.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import bench

import data
from checkpoints.load import Run
from cost import step_memory
from evaluation.features import load_extractor
from guidance import Guidance
from sample import generate, labels_for
from system import UserError, cli
from system.files import write_text_atomic
from system.instantiate import instantiate
from system.launchers import own_process
from system.precision import decide_precision
from system.processes import start_processes
from training.prepare import batch_plan

BUDGET = 540  # seconds; what would begin later is left out, and said
SIZES = {"DiT-S/2": 256, "DiT-B/2": 256, "DiT-L/2": 128, "DiT-XL/2": 128}  # micro-batches that fit in 40 GB
SMALL = ["model.depth=6", "model.hidden_size=32", "model.num_heads=2", "train.compile=off", "data.num_workers=0"]
SMALL += ["data.input_size=8", "data.num_classes=10", "train.precision=fp32"]
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


def config_of(size: str, batch: int, small: bool) -> DictConfig:
    """ImageNet's setting of a size; small: a tiny network on four images."""
    tiny = [*SMALL, "train.global_batch_size=4"] if small else [f"train.global_batch_size={batch}"]
    return cli.load_config("config", ["data=imagenet256", "model=tread", f"model.size={size}", *tiny])


def row_of(size: str, report: dict, cfg: DictConfig) -> dict:
    """One line of the table from bench.py's report. GB are those of a step beyond the state."""
    kinds, mfu, batch = report["kinds"], report["mfu"] or {}, cfg.train.global_batch_size
    cfg.train.precision = report["precision"]
    memory = step_memory(cfg, device=start_processes().device.type)
    return {
        "model": size, "batch": batch,
        **{f"{way} img/s": kinds[f"ours {way}"]["img_per_s"] for way in ("dense", "routed")},
        **{f"{way} MFU": mfu.get(way) for way in ("dense", "routed")},
        "measured / predicted": report["measured_over_predicted"],
        **{f"{way} GB": kinds[f"ours {way}"]["step_gb"] for way in ("dense", "routed")},
        "predicted GB": (memory.peak(batch) - memory.state) / 1e9,
        "waits": sum(kinds[f"ours {way}"]["host_waits"] for way in ("dense", "routed")),
    }  # fmt: skip


def loader_rate(cfg: DictConfig) -> float:
    """Samples per second that the loader reads, with the config's workers."""
    with tempfile.TemporaryDirectory() as folder:
        latents = bench.noise_latents(Path(folder), cfg)
        plan, steps = batch_plan(cfg.train, start_processes()), 50
        loader = iter(data.make_loader(latents, plan, num_steps=steps, num_workers=cfg.data.num_workers))
        next(loader)
        started = time.perf_counter()
        for _ in loader:
            pass
        return (steps - 1) * plan.micro_batch_size / (time.perf_counter() - started)


def sampling_rates(cfg: DictConfig, images: int) -> dict[str, float]:
    """Images per second of 10 steps with guidance, in latents, by precision; random weights cost what others do."""
    device, rates = start_processes().device, {}
    cfg.data.codec = {"_target_": "autoencoder.PixelCodec"}
    model = instantiate(cfg.model).to(device).eval().requires_grad_(False)
    for precision in ("fp32", "bf16"):
        run = Run(model, instantiate(cfg.objective), instantiate(cfg.data.codec).to(device), cfg, device, precision)
        run.codec.check = lambda channels: None  # latents are not decoded here
        run.codec.decode = lambda latents: latents
        labels = labels_for(run.num_classes, range(images), "balanced")
        draw = lambda: list(generate(run, Guidance(2.0), range(images), labels, images, steps=10))
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
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([text(row[name]) for name in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str]) -> None:
    if set(arguments) & {"-h", "--help"}:
        print(__doc__.strip())
        return
    unknown = [argument for argument in arguments if argument != "--small" and not argument.startswith("out=")]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]}; needed: --small, out=FILE.json")
    small = "--small" in arguments
    if not (small or torch.cuda.is_available()):
        raise UserError("no GPU; needed: one that CUDA finds, or --small")
    out = Path(next((a.removeprefix("out=") for a in arguments if a.startswith("out=")), "runs/gpu_check.json"))
    started, device = time.monotonic(), start_processes().device
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found = {
        "device": name,
        "torch": torch.__version__,
        "goals": GOALS,
        "tests": run_tests(),
        "rows": [],
        "left_out": [],
    }
    print(f"tests      {found['tests']}", flush=True)
    if small:
        bench.ROUNDS, bench.STEPS = 1, 1
    for size, batch in SIZES.items():
        if time.monotonic() - started > BUDGET * 0.75:
            found["left_out"].append(size)
            continue
        cfg = config_of(size, batch, small)
        try:
            report = bench.bench(cfg, compare=False)
        except torch.OutOfMemoryError:
            found["left_out"].append(f"{size} (out of memory at {batch})")
            continue
        found["rows"].append(row_of(size, report, cfg) | {"report": report})
        print(f"bench      {size}: {report['measured_over_predicted']:.3f} measured / predicted", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    cfg = config_of("DiT-B/2", 256, small)
    found["auto"] = decide_precision("auto", device, lambda: instantiate(cfg.model).products(64), backward=False)
    found["loader_samples_per_s"] = loader_rate(cfg)
    found["sampling_images_per_s"] = sampling_rates(cfg, 4 if small else 256)
    found["scoring_images_per_s"] = scoring_rate(16 if small else 5000)
    found["seconds"] = time.monotonic() - started
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out, json.dumps(found, indent=2) + "\n")
    print(f"\n{name}, torch {torch.__version__}\n\n{table(found['rows'])}\n")
    sampling = ", ".join(f"{rate:.4g} {precision}" for precision, rate in found["sampling_images_per_s"].items())
    print(f"Loader: {found['loader_samples_per_s']:.4g} samples/s. Sampling B/2, 10 guided steps: {sampling} images/s.")
    print(f"Left out: {', '.join(found['left_out']) or 'nothing'}. {found['seconds']:.0f} s. {out}")


if __name__ == "__main__":
    with cli.user_errors():
        own_process()
        main(sys.argv[1:])
