"""The record of a race: a folder with race.yaml, the rule, and one folder for each run.

What compares the runs (statistics.md, table.md, figure.png) is made from their logs alone.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from omegaconf import OmegaConf
from scipy.stats import ttest_ind

from scripts.plot import LINES, canvas, logarithmic, markdown
from system import UserError
from system.files import write_text_atomic
from training.curves import read_log

LOG_EVERY = 10  # steps from one line of a run's log to the next


@dataclasses.dataclass
class Race:
    """A file of configs/race/: the rule of a race."""

    question: str
    contestants: dict[str, list[str]]  # overrides of train.py and, after "score.", of fid.py; the first is the baseline
    common: list[str]  # of all contestants
    seeds: list[int]
    score: list[str]  # overrides of `fid.py calc`
    keep_every: int  # steps from one score to the next
    steps: int | None = None  # a run ends after so many,
    seconds: float | None = None  # or with the first log line at which it has computed for so long
    metric: str = "fd_mnist"  # of metrics.json; lower is better
    cores: int = 1  # of each run
    save_every: int | None = None  # steps from one checkpoint to the next; None = keep_every


def as_yaml(race: Race) -> str:
    return OmegaConf.to_yaml(dataclasses.asdict(race))


def run_names(race: Race) -> dict[str, tuple[str, int]]:
    """{folder of a run: (contestant, seed)}, in the order of running: the contestants of a seed side by side."""
    return {f"{contestant}-{seed}": (contestant, seed) for seed in race.seeds for contestant in race.contestants}


@dataclasses.dataclass
class Scored:
    """A finished run, from its record."""

    step_seconds: float
    steps: list[int]  # of its scores
    columns: tuple[list[float], ...]  # there: the metric, class accuracy and, without the last step's, validation loss

    def at_step(self, step: float) -> list[float]:
        """Each column after a step, between two scores on the straight line through them."""
        return [float(np.interp(step, self.steps[: len(values)], values)) for values in self.columns]


def show(race: Race, folder: Path) -> None:
    """Writes statistics.md, table.md, figure.png. Raises UserError where a run, a log line or a score is missing."""
    read: dict[str, list[Scored]] = {contestant: [] for contestant in race.contestants}
    for name, (contestant, _) in run_names(race).items():
        read[contestant].append(read_run(race, folder / name))
    runs = {contestant: at_one_pace(those) for contestant, those in read.items()}
    every = [run for those in runs.values() for run in those]
    step = min(run.steps[-1] // race.keep_every * race.keep_every for run in every)
    seconds: float | None = common_seconds(runs)
    if seconds < max(run.steps[0] * run.step_seconds for run in every):
        if race.seconds is not None:
            raise UserError(f"{folder}: no time at which all runs have a score; needed: a smaller keep_every")
        seconds = None  # as where each run is scored once: the race compares its steps alone
    if len({run.step_seconds for run in every}) == 1:
        seconds = None  # the contestants share their runs
    write_text_atomic(folder / "statistics.md", statistics(race, runs, read, step, seconds))
    write_text_atomic(folder / "table.md", table(race, runs, step, seconds))
    draw(race, runs, seconds, folder / "figure.png")


def common_seconds(runs: dict[str, list[Scored]]) -> float:
    """The longest time that every run was trained for."""
    return min(run.steps[-1] * run.step_seconds for those in runs.values() for run in those)


def at_one_pace(runs: list[Scored]) -> list[Scored]:
    """The runs of one contestant, each with the median step time of all of them.

    They train the same network, so that differences in step time are those of the machine's other load.
    """
    pace = float(np.median([run.step_seconds for run in runs]))
    return [dataclasses.replace(run, step_seconds=pace) for run in runs]


def read_run(race: Race, folder: Path) -> Scored:
    """Raises UserError where a file, a line of the log or a score is missing."""
    for name in ("config.yaml", "metrics.jsonl", "scores.jsonl", "machine.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} does not exist; needed: a finished run, by `race.py run`")
    steps = read_steps(folder)
    kept = [*range(race.keep_every, max(steps) + 1, race.keep_every)]
    if lost := {*range(LOG_EVERY, max(steps) + 1, LOG_EVERY), *kept} - set(steps):
        raise UserError(f"{folder / 'metrics.jsonl'} has no line of step {min(lost)}")
    if lost := [step for step in kept if "val/loss_dense" not in steps[step]]:
        raise UserError(f"{folder / 'metrics.jsonl'} has no validation of step {lost[0]}")
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    scored = sorted({*kept, max(steps)})
    if [score["step"] for score in scores] != scored:
        raise UserError(f"{folder / 'scores.jsonl'} has steps {[s['step'] for s in scores]}; needed: {scored}")
    columns = ([s[race.metric] for s in scores], [s["class_accuracy"] for s in scores])
    return Scored(step_seconds(race, steps), scored, (*columns, [steps[step]["val/loss_dense"] for step in kept]))


def read_steps(run_folder: Path) -> dict[int, dict]:
    """{step: what the log says of it}, of the steps with a line on training. Raises UserError where there are none."""
    return {values["step"]: values for values in read_log(run_folder) if "train/loss" in values}


def step_seconds(race: Race, steps: dict[int, dict]) -> float:
    """The median time of a step: CPU time, shared by the run's cores."""
    return float(np.median([line["perf/cpu_s"] for line in steps.values()])) / race.cores


def values_at(runs: list[Scored], step: float | None = None, seconds: float | None = None) -> np.ndarray:
    """(metric, class accuracy, validation loss) of each run after a step or a time: (runs, 3)."""
    return np.array([run.at_step(seconds / run.step_seconds if step is None else step) for run in runs])


def statistics(
    race: Race, runs: dict[str, list[Scored]], read: dict[str, list[Scored]], step: int, seconds: float | None
) -> str:
    """Every contestant against the first: means over seeds, sample standard deviations, and Welch's test.

    read: the runs, each with the time per step of its own log.
    """
    baseline, text = next(iter(runs)), f"# {race.question}\n\n"
    moments = [(f"after {step:,} steps", runs, {"step": step})]
    if seconds is not None:
        own = common_seconds(read)
        moments.append((f"after {seconds:,.0f} s", runs, {"seconds": seconds}))
        moments.append((f"after {own:,.0f} s, by each run's own time per step", read, {"seconds": own}))
    better = {race.metric: "less", "class accuracy": "greater", "validation loss (EMA, without routing)": "less"}
    for column, (name, alternative) in enumerate(better.items()):
        head = ["", "n", "mean", "standard deviation", f"difference to {baseline}"]
        head.append(f"p ({alternative} than {baseline})")
        for title, compared, at in moments[: 1 if column == 2 else None]:
            values = {contestant: values_at(those, **at)[:, column] for contestant, those in compared.items()}
            rows, base = [], values[baseline]
            for contestant, mine in values.items():
                rows.append([contestant, len(mine), f"{mine.mean():.4g}", f"{spread(mine):.2g}", "", ""])
                if contestant != baseline:
                    differ = spread(mine) or spread(base)  # there is no test of values that are all equal
                    p = ttest_ind(mine, base, equal_var=False, alternative=alternative).pvalue if differ else math.nan
                    rows[-1][-2:] = f"{mine.mean() - base.mean():+.4g}", f"{p:.2g}"
            text += f"## {name} {title}\n\n{markdown(head, rows)}\n"
    rows = []
    for at in range(race.keep_every, step + 1, race.keep_every):
        means = [values_at(those, step=at).mean(0) for those in runs.values()]
        rows.append([f"{at:,}", *(f"{mean[0]:.4g}, {mean[1]:.3f}" for mean in means)])
    text += f"## {race.metric}, class accuracy by steps\n\n{markdown(['steps', *runs], rows)}\n"
    text += "Standard deviations are those of the sample; p is Welch's, one-sided. A value between two scores lies on "
    return text + "the straight line through them.\n"


def spread(values: np.ndarray) -> float:
    """The sample standard deviation; nan of a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def table(race: Race, runs: dict[str, list[Scored]], step: int, seconds: float | None) -> str:
    """One row a contestant: mean over seeds, plus or minus the sample standard deviation."""
    head, moments, rows = ["", "s a step"], [(f"after {step:,} steps", {"step": step})], []
    if seconds is not None:
        head.append(f"steps in {seconds:,.0f} s")
        moments.insert(0, ("then", {"seconds": seconds}))
    for title, _ in moments:
        head += [f"{race.metric} {title}", "class accuracy then"]
    for contestant, those in runs.items():
        pace = those[0].step_seconds
        rows.append([contestant, f"{pace:.3f}", *([] if seconds is None else [f"{seconds / pace:,.0f}"])])
        for _, at in moments:
            score, accuracy, _ = values_at(those, **at).T
            rows[-1] += [f"{score.mean():.1f} ± {spread(score):.1f}", f"{accuracy.mean():.3f} ± {spread(accuracy):.3f}"]
    return markdown(head, rows)


def draw(race: Race, runs: dict[str, list[Scored]], seconds: float | None, path: Path) -> None:
    """The metric against seconds and against steps: a line through the means, a band of one standard deviation.

    Without a common time, each contestant's line ends where its runs do.
    """
    figure, axes = canvas((10, 4), 1, 2)
    axes[1].sharey(axes[0])
    axes[1].tick_params(labelleft=False)
    markers = ("o", "s", "^", "D", "v", "P", "X")
    shades = colormaps["viridis"](np.linspace(0, 0.8, len(runs)))  # still apart in grey
    for i, (contestant, those) in enumerate(runs.items()):
        last = min(run.steps[-1] for run in those)
        steps = np.array(sorted({*range(race.keep_every, last + 1, race.keep_every), last}))
        pace = those[0].step_seconds
        end = last * pace if seconds is None else seconds
        times = np.array([*(steps * pace)[steps * pace < end], end])
        for axis, moment, x in zip(axes, ("seconds", "step"), (times, steps)):
            values = [values_at(those, **{moment: at})[:, 0] for at in x]
            mean, deviation = np.mean(values, 1), np.nan_to_num([spread(v) for v in values])
            line, marker = LINES[i % len(LINES)], markers[i % len(markers)]
            axis.plot(x, mean, color=shades[i], linestyle=line, marker=marker, markersize=5, label=contestant)
            if len(x) > 1:
                axis.fill_between(x, mean - deviation, mean + deviation, color=shades[i], alpha=0.2, linewidth=0)
            else:
                axis.errorbar(x, mean, deviation, color=shades[i], capsize=4)
    for ax, label in zip(axes, ("seconds of training", "steps")):
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
        ax.set_xlim(0, 1.05 * ax.dataLim.x1)
    axes[0].set_ylabel(race.metric)
    logarithmic(axes[0])  # and the other, which shares it
    axes[1].legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
