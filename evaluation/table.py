"""Rows of scores: a table on the terminal; scores.csv for several rows; scores.png for several training steps, and
widths.png for several widths of the average."""

import csv
import math
import textwrap
from pathlib import Path

from system import printable
from system.files import atomic_file, own

SETTINGS = ("run", "step", "weights", "ema_width", "guidance", "images", "n")
AXES = {"step": ("training step", "scores.png"), "ema_width": ("relative width of the average", "widths.png")}
# Of scores, and of those that are better when lower, the names' beginnings.
SCORES = tuple("fid fd_ sfid sfd_ inception_score precision recall kid clip_score class_accuracy".split())
LOWER = ("fid", "fd_", "sfid", "sfd_", "kid")
COSTS = ("network_calls", "gmacs_per_image", "images_per_s")
ARROWS = "↓ lower is better, ↑ higher is better"
WIDTH = 80


def show(rows: list[dict], folder: Path) -> None:
    """rows: the contents of metrics.json, with "folder", and with "run" and "guidance" where a run was scored."""
    scores = list(dict.fromkeys(name for row in rows for name in row if name.startswith(SCORES)))
    columns = [name for name in (*SETTINGS, *scores, *COSTS) if any(name in row for row in rows)]
    print(printable(as_text(rows, columns)))
    if len(rows) == 1:
        print(Path(rows[0]["folder"]) / "metrics.json")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "scores.csv", "w", newline="", opener=own) as file:
        table = csv.DictWriter(file, [*columns, "folder"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    print(folder / "scores.csv")
    for axis, (_, name) in AXES.items():
        if len({row.get(axis) for row in rows}) > 1:
            plot(rows, scores[0], axis, folder / name)
            print(folder / name)


def as_text(rows: list[dict], columns: list[str]) -> str:
    """The columns, WIDTH characters wide: first the settings that all rows share, then those that tell them apart
    beside as many scores as fit, the others below. Arrows say which way is better."""
    alike = [name for name in columns if name in SETTINGS and len({_text(row.get(name)) for row in rows}) == 1]
    lines = textwrap.wrap(", ".join(f"{name} {_text(rows[0].get(name))}" for name in alike), WIDTH)
    cells = {name: [_head(name), *(_text(row.get(name)) for row in rows)] for name in columns if name not in alike}
    cells = {name: [cell.rjust(max(map(len, column))) for cell in column] for name, column in cells.items()}
    known, block = [cells.pop(name) for name in SETTINGS if name in cells], []
    for column in (*cells.values(), None):
        if column is None or block and sum(2 + len(part[0]) for part in (*known, *block, column)) > WIDTH + 2:
            lines += ["", *("  ".join(row) for row in zip(*known, *block))]
            block = []
        block.append(column)
    return "\n".join([*lines, "", ARROWS])


def _head(name: str) -> str:
    if not name.startswith(SCORES) or name.endswith("_std"):
        return name
    return f"{name} {'↓' if name.startswith(LOWER) else '↑'}"


def plot(rows: list[dict], score: str, axis: str, path: Path) -> None:
    """`score` against one of AXES, one line per run, kind of weights, guidance and value of the other axis."""
    from evaluation.drawing import canvas, logarithmic, styles  # slow to import

    figure, (axes,) = canvas((6, 4), 1, 1)
    axes.set(xlabel=AXES[axis][0], ylabel=_head(score))
    names = ("run", "weights", "guidance", *(name for name in AXES if name != axis))
    lines: dict[tuple, list[tuple]] = {}
    for row in rows:
        lines.setdefault(tuple(row.get(name) for name in names), []).append((row.get(axis), row[score]))
    for look, (values, points) in zip(styles(len(lines)), lines.items()):
        label = " ".join(str(value) for value in values if value is not None)
        curve = sorted(point for point in points if point[0] is not None)
        axes.plot([x for x, _ in curve], [y for _, y in curve], label=label, **look)
        for level in (y for x, y in points if x is None):  # the run's own EMA, beside averages of several widths
            axes.axhline(level, color=look["color"], linewidth=0.8, label=f"{label}, own EMA")
    logarithmic(axes)
    axes.xaxis.get_major_locator().set_params(integer=axis == "step")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as file:
        figure.savefig(file, dpi=150)


def _text(value) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def finite(value):
    """JSON has no infinity: S_max=inf becomes "inf"."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
