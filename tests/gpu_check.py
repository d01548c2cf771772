"""What this code does on a GPU, in four runs of at most seven minutes: `bash scripts/gpu_check.sh NAME`.

    step      the training step of four sizes, dense and routed (scripts/bench.py): speed, MFU, measured / predicted,
              memory beside the prediction of cost.py; then reading data, sampling and scoring
    race      dense, tread and sprint on Fashion-MNIST at 196 tokens, three seeds (configs/race/gpu.yaml)
    exact     the tests marked gpu: exact resume, no waits, sampling and gradients beside the CPU's
    several   the tests of several processes, by NCCL; needs two GPUs

out=FOLDER (runs/gpu_check) gets each figure as it is found, so that a run that is cut off leaves what it had. --small:
the same program on tiny networks, on a CPU too.
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
BUDGET = 400  # seconds; what would begin later is left out, and the end says so
SIZES = {"DiT-S/2": 256, "DiT-B/2": 256, "DiT-L/2": 128, "DiT-XL/2": 128}  # micro-batches that fit in 40 GB
SMALL = ["model.depth=6", "model.hidden_size=32", "model.num_heads=2", "train.compile=off", "data.num_workers=0"]
SMALL += ["data.input_size=8", "data.num_classes=10", "train.precision=fp32", "train.global_batch_size=4"]
GOALS = {"mfu of XL/2, dense": 0.45, "measured / predicted": 0.95, "waits": 0}
COLUMNS = ("model", "batch", "dense img/s", "routed img/s", "dense MFU", "routed MFU", "measured / predicted",
           "dense GB", "routed GB", "predicted GB", "waits")  # fmt: skip


def run_tests(out: Path, name: str, *what: str) -> None:
    """pytest, whose output also goes to <name>.txt, line by line. Raises UserError where a test fails."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *what]
    with open(out / f"{name}.txt", "w") as file, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as tests:
        for line in tests.stdout:
            print(line := line.decode(errors="replace"), end="", flush=True)
            print(line, end="", flush=True, file=file)
    if tests.returncode not in (0, 5):  # 5: all were left out
        raise UserError(f"tests failed: {out / name}.txt")


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


def check_step(out: Path, small: bool) -> None:
    """step.json, anew after each row, and at the end step.md."""
    started, device = time.monotonic(), start_processes().device
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    found = {"device": name, "torch": torch.__version__, "goals": GOALS, "rows": [], "left_out": []}

    def keep(**more) -> None:
        found.update(more, seconds=time.monotonic() - started)
        write_text_atomic(out / "step.json", json.dumps(found, indent=2) + "\n")

    for size, batch in SIZES.items():
        if time.monotonic() - started > BUDGET * 0.75:
            found["left_out"].append(size)
            continue
        settings = config_of(size, batch, small)
        try:
            report = bench.bench(settings, compare=False, rounds=1 if small else bench.ROUNDS)
        except torch.OutOfMemoryError:
            found["left_out"].append(f"{size} (out of memory at {batch})")
            continue
        found["rows"].append(row_of(size, report, settings))
        keep()
        print(f"bench      {size}: {report['measured_over_predicted']:.3f} measured / predicted", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    settings = config_of("DiT-B/2", 256, small)
    keep(loader_samples_per_s=loader_rate(settings))
    keep(sampling_images_per_s=sampling_rates(settings, 4 if small else 256))
    keep(scoring_images_per_s=scoring_rate(16 if small else 5000))
    sampling = ", ".join(f"{rate:.4g} {precision}" for precision, rate in found["sampling_images_per_s"].items())
    said = f"{name}, torch {torch.__version__}\n\n{table(found['rows'])}\nLoader: {found['loader_samples_per_s']:.4g} "
    said += f"samples/s. Sampling B/2, 10 guided steps: {sampling} images/s.\n"
    said += f"Left out: {', '.join(found['left_out']) or 'nothing'}. {found['seconds']:.0f} s.\n"
    (out / "step.md").write_text(said)
    print(f"\n{said}{out}/step.json", flush=True)


def check_race(out: Path, small: bool) -> None:
    """The race of a rule, its record below `out`; what is finished is not run again."""
    keys = [f"name={'smoke' if small else 'gpu'}", f"records={out}", f"runs={out / 'runs'}", "at_once=1"]
    done = subprocess.run([sys.executable, "scripts/race.py", "run", *keys], cwd=ROOT)
    if done.returncode:
        raise UserError(f"the race failed; its record: {out}")


def check_exact(out: Path, small: bool) -> None:
    run_tests(out, "exact", "-m", "gpu", "tests/test_gpu.py")


def check_several(out: Path, small: bool) -> None:
    if (found := torch.cuda.device_count()) < 2 and not small:
        print(f"left out: {found} GPU found; needed: 2")
        return
    chosen = "two_processes or signal_to_one_process or drift_apart or another_number or bad_gradient"
    run_tests(out, "several", "-k", chosen, "tests/test_processes.py")


CHECKS = {"step": check_step, "race": check_race, "exact": check_exact, "several": check_several}


def main(arguments: list[str]) -> None:
    name, *others = arguments or [""]
    options = dict(argument.partition("=")[::2] for argument in others)
    if name not in CHECKS or options.keys() - {"--small", "out"}:
        raise UserError(f"found: {' '.join(arguments)}; needed: {', '.join(CHECKS)}, then --small, out=FOLDER")
    small, out = "--small" in options, Path(options.get("out", "runs/gpu_check")).absolute()
    if not (small or torch.cuda.is_available()):
        raise UserError("no GPU; needed: one that CUDA finds, or --small")
    out.mkdir(parents=True, exist_ok=True)
    CHECKS[name](out, small)


if __name__ == "__main__":
    cli.command(main, __doc__)
