"""Runs side by side, as curves.png and previews.png; or one run as a small table.

    python scripts/plot.py RUN [RUN...] [x=steps|seconds|images] [out=FOLDER]
    python scripts/plot.py summary RUN

curves.png: loss, validation (EMA, dense), learning rate, gradient norm, images/s, and the scores in RUN/eval that were
computed at two steps or more, one panel for each score and setting; by name, where each run has one value. Seconds are
those of training: without saves, validation, scores and previews. previews.png: the grids in RUN/samples, a column for
each run, from early to late.
out: where the pictures go, by default the run's folder, or the one that several have in common.
"""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from matplotlib.ticker import EngFormatter

from checkpoints.curves import read_log
from checkpoints.gallery import save_grid
from evaluation.drawing import canvas, logarithmic, styles
from evaluation.table import SCORES
from system import UserError, cli
from system.files import atomic_file, read_json, read_small
from system.limits import MEMBER_BYTES
from system.pictures import decode
from system.settings import convert

X = {"steps": "step", "seconds": "seconds", "images": "images"}  # names in the log
PANELS = {
    "train/loss": "training loss", "val/loss_dense": "validation loss (EMA, dense)", "train/grad_norm": "gradient norm",
    "train/lr": "learning rate", "perf/img_per_s": "images/s",
}  # fmt: skip
LOGARITHMIC = ("train/loss", "val/loss_dense", "train/grad_norm", "fid", "fd_", "sfid", "sfd_")  # starts of names
USAGE = "needed: python scripts/plot.py RUN [RUN...] [x=steps|seconds|images] [out=FOLDER], or summary RUN"
MOST_GRIDS = 6

Curves = dict[str, tuple[list[float], list[float]]]  # {panel: (x, y)}


def main(arguments: Sequence[str]) -> None:
    options = dict(argument.split("=", 1) for argument in arguments if argument.startswith(("x=", "out=")))
    words = [argument for argument in arguments if not argument.startswith(("x=", "out="))]
    runs, x = [Path(word) for word in words if word != "summary"], options.get("x", "steps")
    if not runs or "summary" in words[1:]:
        raise UserError(USAGE)
    if x not in X:
        raise UserError(f"x={x}; needed: one of {', '.join(X)}")
    if words[0] == "summary":
        for run in runs:
            summarize(run)
        return
    curves = {name: read_curves(run, X[x]) for name, run in named(runs).items()}
    grids = {name: found for name, run in named(runs).items() if (found := previews(run))}
    common = runs[0] if len(runs) == 1 else Path(os.path.commonpath([run.absolute().parent for run in runs]))
    out = Path(options.get("out") or common)
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(curves, x, out / "curves.png")
    print(out / "curves.png")
    if grids:
        draw_previews(grids, out / "previews.png")
        print(out / "previews.png")


def summarize(run: Path) -> None:
    """Prints steps, seconds and images/s of a run, its newest score and where its newest samples are."""
    trained = [values for values in read_log(run) if "perf/step_s" in values]
    rows = {"steps": f"{trained[-1]['step']:,}", "seconds of training": f"{trained[-1]['seconds']:,.0f}"}
    rows["images/s (median)"] = f"{sorted(line['perf/img_per_s'] for line in trained)[len(trained) // 2]:,.0f}"
    if found := newest(run.glob("eval/*/metrics.json")):
        score = read_json(found)
        names = [name for name in score if name.startswith(SCORES) and not name.endswith("_std")]
        told = {name: (name.replace("class_", "class "), ".3g") for name in names}
        told |= {"n": ("samples scored", ",.0f"), "network_calls": ("network calls an image", ",.0f")}
        for key, (name, form) in told.items():
            rows[name] = format(convert(score.get(key), float, f"{found}: {key}"), form)
    width = max(map(len, rows))
    print("\n".join(f"  {name:<{width}}  {value:>10}" for name, value in rows.items()))
    if grid := newest(run.glob("samples/*/grid.png")):
        print(f"  samples: {grid}")


def newest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def markdown(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table in Markdown."""
    first, *lines = (f"| {' | '.join(map(str, cells))} |\n" for cells in (head, *rows))
    return "".join([first.replace("|  |", "| |"), "|---" * len(head), "|\n", *lines])


def named(runs: Sequence[Path]) -> dict[str, Path]:
    """Runs by name, or by path where two have the same name."""
    found = {run.resolve().name: run for run in runs}
    return found if len(found) == len(runs) else {str(run): run for run in runs}


def read_curves(run: Path, x: str) -> Curves:
    """Raises UserError for what is no run."""
    log, curves = read_log(run), {}
    for name in PANELS:
        points = [(values[x], values[name]) for values in log if values.get(name) is not None]
        if points:
            curves[name] = tuple(zip(*points))
    scores: dict[str, list[tuple]] = {}
    for path in sorted(run.glob("eval/*/metrics.json")):  # <step>-<settings>
        result, (_, _, settings) = read_json(path), path.parent.name.partition("-")
        for name in result:
            if name.startswith(SCORES) and not name.endswith("_std"):
                point = (convert(result.get(key), float, f"{path}: {key}") for key in ("step", name))
                scores.setdefault(f"{name}\n{settings}", []).append(tuple(point))
    at = [values["step"] for values in log], [values[x] for values in log]
    for name, points in scores.items():
        if len(points) > 1:
            steps, values = zip(*sorted(points))
            curves[name] = np.interp(steps, *at).tolist(), values
    return curves


def draw_curves(runs: dict[str, Curves], x: str, path: Path) -> None:
    panels = [name for name in PANELS if any(name in curves for curves in runs.values())]
    panels += dict.fromkeys(name for curves in runs.values() for name in curves if name not in PANELS)
    rows = -(-len(panels) // 3)
    figure, axes = canvas((13, 0.5 + 3.1 * rows), rows, 3)
    for axis, panel in zip(axes, panels):
        by_name = all(len(curves[panel][0]) == 1 for curves in runs.values() if panel in curves)
        for look, (name, curves) in zip(styles(len(runs)), runs.items()):
            if panel in curves:
                at, values = curves[panel]
                look |= {} if len(at) <= 20 else {"marker": None}
                axis.plot([name] if by_name else at, values, label=name, markersize=3, **look)
        axis.set_title(PANELS.get(panel, panel), fontsize=10 if panel in PANELS else 8)
        if by_name:
            axis.tick_params("x", labelsize=7, labelrotation=15)
        else:
            axis.set_xlabel("seconds of training" if x == "seconds" else x)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250, 1.5k, 20M
            axis.set_xlim(left=0)
        if panel.startswith(LOGARITHMIC):
            logarithmic(axis)
        if panel in ("train/lr", "perf/img_per_s"):
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False, handlelength=4
    )
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120)


def previews(run: Path) -> dict[int, Path]:
    """{step: grid} of a run."""
    found = ((re.fullmatch(r"step_(\d{1,18})", path.stem), path) for path in sorted(run.glob("samples/step_*.png")))
    return {int(match[1]): path for match, path in found if match}


def draw_previews(found: dict[str, dict[int, Path]], path: Path) -> None:
    """A contact sheet: columns are runs, rows are at most MOST_GRIDS steps, evenly chosen, the last one among them."""
    steps = sorted({step for grids in found.values() for step in grids})
    chosen = np.linspace(len(steps) - 1, 0, min(MOST_GRIDS, len(steps))).round().astype(int)
    cells = [(name, steps[i]) for i in sorted(chosen) for name in found]
    files = {i: found[name][step] for i, (name, step) in enumerate(cells) if step in found[name]}
    grids = {
        i: np.asarray(decode(read_small(file, MEMBER_BYTES), str(file)).convert("RGB")) for i, file in files.items()
    }
    sheet = np.zeros((len(cells), *map(max, zip(*(grid.shape for grid in grids.values())))), np.uint8)  # (n, H, W, 3)
    for i, grid in grids.items():
        sheet[i, : grid.shape[0], : grid.shape[1]] = grid
    labels = [f"{name}, step {step:,}" for name, step in cells]
    save_grid(torch.from_numpy(sheet).permute(0, 3, 1, 2), path, len(found), labels)


if __name__ == "__main__":
    cli.command(main, __doc__)
