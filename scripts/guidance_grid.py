"""Guidance methods compared on the embedded digits, with their cost.

    python scripts/guidance_grid.py picture   rows = methods and scales, columns = the same seeds: grid.png
    python scripts/guidance_grid.py table     fd_mnist, class accuracy over several sets of seeds: table.md, table.json
    python scripts/guidance_grid.py map       fd_mnist over gamma_strong and gamma_weak at one scale: map.png, map.json

Keys: configs/guidance_grid.yaml. GMACs are multiply-adds, which papers call GFLOPs. Interrupted scoring continues.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conditions
import sample
from checkpoints.config import Guidance, Positive, Scoring, Seeds, Share, Weights, parse_seeds
from checkpoints.gallery import save_grid
from checkpoints.generate import count_calls, generate
from checkpoints.load import Run
from evaluation.drawing import canvas
from evaluation.evaluate import evaluate
from evaluation.features import load_extractor
from evaluation.reference import shipped_reference
from scripts.plot import markdown
from system import cli
from system.files import atomic_file
from system.settings import at_least, parse

METHODS = {
    "CFG": {},
    "independent condition": {"weak_label": "random"},
    "sparse 0.2/0.7": {"gamma_strong": 0.2, "gamma_weak": 0.7, "weak_label": "same"},
    "sparse 0.5/0.9": {"gamma_strong": 0.5, "gamma_weak": 0.9, "weak_label": "same"},
    "sparse 0.2/0.7 + CFG": {"gamma_strong": 0.2, "gamma_weak": 0.7},
}


@dataclass(frozen=True)
class Grid:
    """The keys of configs/guidance_grid.yaml."""

    ckpt: str | None = None
    weights: Weights = "ema"
    scales: tuple[Annotated[float, at_least(0)], ...] = (1.5, 2.0, 3.0)
    seeds: Seeds = "0-19"
    gammas: tuple[Share, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
    scale: Annotated[float, at_least(0)] = 1.5
    n: Positive = 1000
    repeats: Positive = 3
    steps: Positive | None = None
    batch_size: Positive = 100
    precision: Literal["fp32", "bf16"] = "fp32"
    digits: str = "datasets/mnist"
    out: str | None = None


def rows(grid: Grid) -> Iterator[tuple[str, Guidance]]:
    """(method, settings): unguided, then each method at each scale."""
    yield "none", Guidance()
    for method, settings in METHODS.items():
        for scale in grid.scales:
            yield method, Guidance(scale=scale, **settings)


def picture(run: Run, grid: Grid, out: Path) -> None:
    seeds, images, names = parse_seeds(grid.seeds), [], []
    labels = conditions.choose("balanced", seeds, run.pool)
    for method, guidance in rows(grid):
        images += generate(run, guidance, seeds, labels, grid.batch_size, steps=grid.steps)
        name = method if not guidance.on else f"{method}, scale {guidance.scale:g}"
        calls, macs = count_calls(run, guidance, grid.steps)
        names += [f"{name}: {calls} calls, {macs / 1e9:.1f} GMACs"] * len(seeds)
        print(names[-1], flush=True)
    save_grid(torch.cat(images), out / "grid.png", len(seeds), names)
    print(out / "grid.png")


def table(run: Run, grid: Grid, out: Path) -> None:
    score, results = scorer(run, grid, out), []
    for method, guidance in rows(grid):
        scores = [score(guidance, repeat) for repeat in range(grid.repeats)]
        calls, macs = count_calls(run, guidance, grid.steps)
        results.append({
            "method": method, **asdict(guidance), "network_calls": calls, "gmacs_per_image": macs / 1e9,
            "fd_mnist": [s["fd_mnist"] for s in scores], "class_accuracy": [s["class_accuracy"] for s in scores],
        })  # fmt: skip
        print(" | ".join(cells(results[-1])), flush=True)
    head = ("method", "scale", "calls", "GMACs", "fd_mnist", "class accuracy")
    (out / "table.md").write_text(markdown(head, map(cells, results)))
    found = {"settings": asdict(grid), "rows": results}
    (out / "table.json").write_text(json.dumps(found, indent=2) + "\n")
    print(out / "table.md")


def cells(row: dict) -> list[str]:
    """A line of the table: mean, and half of the range where there are several numbers."""

    def spread(values: list[float], digits: int) -> str:
        text = f"{statistics.mean(values):.{digits}f}"
        return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"

    known = [row["method"], f"{row['scale']:g}", str(row["network_calls"]), f"{row['gmacs_per_image']:.1f}"]
    return [*known, spread(row["fd_mnist"], 2), spread(row["class_accuracy"], 3)]


def heat_map(run: Run, grid: Grid, out: Path) -> None:
    gammas, score = grid.gammas, scorer(run, grid, out)
    values = torch.full((len(gammas), len(gammas)), torch.nan)
    for i, strong in enumerate(gammas):
        for j, weak in enumerate(gammas):
            if strong < weak:
                values[i, j] = score(Guidance(grid.scale, None, strong, weak, "same"), 0)["fd_mnist"]
                print(f"gamma_strong {strong:g}, gamma_weak {weak:g}: fd_mnist {values[i, j]:.2f}", flush=True)
    found = {"scale": grid.scale, "n": grid.n, "gammas": gammas, "fd_mnist": values.nan_to_num(-1).tolist()}
    (out / "map.json").write_text(json.dumps(found, indent=2) + "\n")
    figure, (axis,) = canvas((4.4, 3.6), 1, 1)
    image = axis.imshow(values.numpy(), origin="lower", cmap="Blues")
    for i, j in values.isfinite().nonzero().tolist():
        color = "white" if image.norm(values[i, j].item()) > 0.5 else "black"
        axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", color=color)
    title = f"fd_mnist (lower is better)\nsparse guidance at scale {grid.scale:g}, {grid.n} images"
    axis.set(xlabel="gamma_weak", ylabel="gamma_strong", title=title)
    axis.set_xticks(range(len(gammas)), gammas)
    axis.set_yticks(range(len(gammas)), gammas)
    with atomic_file(out / "map.png") as file:
        figure.savefig(file, dpi=150)
    print(out / "map.png")


def scorer(run: Run, grid: Grid, out: Path):
    """score(guidance, repeat) -> fd_mnist and class_accuracy of grid.n images, each repeat of other seeds."""
    extractor = load_extractor("mnist", device=run.device)
    reference = shipped_reference(extractor, grid.digits)

    def score(guidance: Guidance, repeat: int) -> dict:
        seeds = f"{repeat * grid.n}-{(repeat + 1) * grid.n - 1}"
        how = dict(seeds=seeds, labels="balanced", metrics=("fd",), steps=grid.steps, batch_size=grid.batch_size)
        return evaluate(run, Scoring(**asdict(guidance), **how), extractor, reference, out / "parts")

    return score


VERBS = {"picture": picture, "table": table, "map": heat_map}


def main(argv: list[str]) -> None:
    verb, overrides = cli.verb(argv or ["picture"], __doc__, tuple(VERBS))
    grid = parse(Grid, cli.load_config("guidance_grid", overrides))
    run = sample.load_given(grid.ckpt, "mnist-tread-rf", grid.weights, precision=grid.precision)
    out = Path(grid.out) if grid.out else run.place("guidance")
    out.mkdir(parents=True, exist_ok=True)
    print(f"{run.checkpoint}, {run.weights} weights of step {run.step}")
    VERBS[verb](run, grid, out)


if __name__ == "__main__":
    cli.command(main, __doc__)
