"""Figures without a display: their axes, and lines that are told apart in grey and by the colour-blind."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter

LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = "os^DvPX<>*p"


def canvas(size: tuple[float, float], rows: int, columns: int, widths: Sequence[float] | None = None) -> tuple:
    """(a figure of so many inches, its axes row by row). widths: of the columns, relative to each other."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, width_ratios=widths).flatten()


def styles(count: int) -> list[dict]:
    """Of so many lines: blue and orange in turn, for the colour-blind, and ever lighter, for print in grey."""
    ramps = [colormaps[name](np.linspace(0, 1, 256)) for name in ("Blues_r", "Oranges_r")]
    looks = []
    for i, grey in enumerate(np.linspace(0.2, 0.7, count)):
        ramp = ramps[i % 2]
        shade = ramp[np.abs(ramp[:, :3] @ (0.299, 0.587, 0.114) - grey).argmin()]
        looks.append({"color": shade, "linestyle": LINES[i % len(LINES)], "marker": MARKERS[i % len(MARKERS)]})
    return looks


def logarithmic(axis: Axes) -> None:
    """Makes the vertical axis, which has its data, logarithmic, with plain numbers at no fewer than three ticks."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    for subs in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [sub * 10.0**power for power in range(-20, 20) for sub in subs if low <= sub * 10.0**power <= high]
        if len(ticks) > 2:
            break
    axis.yaxis.set_major_locator(FixedLocator(ticks) if len(ticks) > 2 else MaxNLocator(5))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
