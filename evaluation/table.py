"""Rows of scores: a table on the terminal; scores.csv for several rows; scores.png for several training steps."""

import csv
import math
from pathlib import Path

SETTINGS = ("run", "step", "weights", "guidance", "images", "n")
SCORES = ("fid", "fd_", "sfid", "sfd_", "inception_score", "precision", "recall", "kid", "class_accuracy")  # prefixes
COSTS = ("network_calls", "gmacs_per_image", "images_per_s")


def show(rows: list[dict], folder: Path) -> None:
    """rows: the contents of metrics.json, with "folder", and with "run" and "guidance" where a run was scored."""
    scores = list(dict.fromkeys(name for row in rows for name in row if name.startswith(SCORES)))
    columns = [name for name in (*SETTINGS, *scores, *COSTS) if any(name in row for row in rows)]
    shown = [[_text(row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *shown)]
    for cells in (columns, *shown):
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths)).rstrip())
    if len(rows) == 1:
        print(Path(rows[0]["folder"]) / "metrics.json")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "scores.csv", "w", newline="") as file:
        table = csv.DictWriter(file, [*columns, "folder"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    print(folder / "scores.csv")
    if len({row.get("step") for row in rows}) > 1:
        plot(rows, scores[0], folder / "scores.png")
        print(folder / "scores.png")


def plot(rows: list[dict], score: str, path: Path) -> None:
    """`score` against the training step, one line per run, kind of weights and guidance."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="training step", ylabel=score)
    lines = {}
    for row in rows:
        lines.setdefault((row["run"], row["weights"], row["guidance"]), []).append((row["step"], row[score]))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points)), marker="o", label=" ".join(label))
    axes.set_yscale("log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def _text(value) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finite(value):
    """JSON has no infinity: S_max=inf becomes "inf"."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
