"""Races: networks trained side by side under one rule, with several seeds, and compared in a record that stays.

python scripts/race.py run name=smoke     trains and scores what is not finished yet, then as `show`
python scripts/race.py show name=smoke    statistics.md, table.md and figure.png, from the record's logs alone

A race is a file of configs/race/, which holds the rule before the first run: who takes part, when a run ends, what is
scored. Its record is records/<date>_<name>/, with a folder for each run: its config, its log, its scores, the machine.

Seconds are CPU time: the number of steps times the cost of a step, which is the median over the steps of a run and
then over the runs of a contestant. Compiling, saving, validation and scoring are not counted; other load on the machine
still shows. A run ends by its own median.
"""

import dataclasses
import datetime
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from scipy.stats import ttest_ind

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoints.config import Positive, Settings
from checkpoints.curves import read_log
from checkpoints.run_folder import complete_checkpoints, step_of
from fid import Calc
from scripts.plot import LINES, canvas, logarithmic, markdown
from scripts.retrieval import Retrieval
from system import UserError, cli
from system.files import own, write_text_atomic
from system.launchers import end_with_parent, usable_cpus
from system.settings import parse

SCORE = "score."  # how a contestant's overrides of `fid.py calc` start; all others are train.py's
POLL_S = 0.5
SCORERS = {"fid": (Calc, "fid.py", "calc"), "retrieval": (Retrieval, "scripts/retrieval.py")}
LOG_EVERY = 10  # steps from one line of a run's log to the next


@dataclasses.dataclass
class Race:
    """A file of configs/race/: the rule of a race."""

    question: str
    contestants: dict[str, list[str]]  # overrides of train.py and, after "score.", the scorer's; first the baseline
    common: list[str]  # of all contestants
    seeds: list[int]
    score: list[str]  # overrides of the scorer
    keep_every: int  # steps from one score to the next
    steps: int | None = None  # a run ends after so many,
    seconds: float | None = None  # or with the first log line at which it has computed for so long
    scorer: str = "fid"  # or retrieval
    metric: str = "fd_mnist"  # of metrics.json; lower is better
    accuracy: str = "class_accuracy"  # of metrics.json; higher is better
    cores: int = 1  # of each run
    save_every: int | None = None  # steps from one checkpoint to the next; None = keep_every
    last: list[str] = dataclasses.field(default_factory=list)  # more overrides of the scorer, for the last step's


@dataclasses.dataclass(frozen=True)
class Command:
    """The keys of configs/race.yaml."""

    name: str
    records: str = "records"
    runs: str = "runs/race"
    at_once: Positive = 2
    only: tuple[str, ...] | None = None


def as_yaml(race: Race) -> str:
    rule = dataclasses.asdict(race)
    unsaid = {"last": [], "scorer": "fid", "accuracy": "class_accuracy"}  # as in records from before there was a choice
    return OmegaConf.to_yaml({key: value for key, value in rule.items() if key not in unsaid or value != unsaid[key]})


def run_names(race: Race) -> dict[str, tuple[str, int]]:
    """{folder of a run: (contestant, seed)}, in the order of running: the contestants of a seed side by side."""
    return {f"{contestant}-{seed}": (contestant, seed) for seed in race.seeds for contestant in race.contestants}


def main(argv: list[str]) -> None:
    verb, overrides = cli.verb(argv, __doc__, ("run", "show"))
    command = parse(Command, cli.load_config("race", overrides))
    race = load_race(command.name)
    folder = record_folder(Path(command.records), command.name, race)
    if verb == "run":
        check(command, race)
        run(command, race, folder)
    elif not folder.is_dir():
        raise UserError(f"{command.records} has no record of {command.name}; needed: python scripts/race.py run")
    if verb == "show" or not missing_runs(race, folder):
        show(race, folder)
        print((folder / "table.md").read_text(), end="")
    else:
        print(f"{folder}: still to be run: {', '.join(missing_runs(race, folder))}")


def load_race(name: str) -> Race:
    """Raises UserError where the file does not exist or is no race."""
    path = cli.CONFIG_DIR / "race" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"name={name}; needed: one of {', '.join(sorted(p.stem for p in path.parent.glob('*.yaml')))}")
    try:
        race = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Race), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {cli.one_line(error)}") from error
    if race.scorer not in SCORERS:
        raise UserError(f"{path}: scorer {race.scorer}; needed: {' or '.join(SCORERS)}")
    if (race.steps is None) == (race.seconds is None):
        raise UserError(f"{path}: needed: steps or seconds, one of the two")
    if race.save_every and race.keep_every % race.save_every:
        raise UserError(f"{path}: keep_every {race.keep_every}; needed: a multiple of save_every {race.save_every}")
    if odd := [contestant for contestant in race.contestants if not re.fullmatch(r"[\w.+-]*\w", contestant)]:
        raise UserError(f"{path}: the contestant {odd[0]!r}; needed: a name of letters, digits and _ . + -")
    return race


def record_folder(records: Path, name: str, race: Race) -> Path:
    """The race's record, or where one that is begun today belongs. Raises UserError where another config made it."""
    found = sorted(path.parent for path in records.glob(f"*_{name}/race.yaml") if path.parent.name[11:] == name)
    if found and (found[-1] / "race.yaml").read_text() != as_yaml(race):
        raise UserError(f"{found[-1]} was made by another config than configs/race/{name}.yaml; needed: another name")
    return found[-1] if found else records / f"{datetime.date.today()}_{name}"


def missing_runs(race: Race, folder: Path) -> list[str]:
    return [name for name in run_names(race) if not (folder / name).is_dir()]


# Running


def check(command: Command, race: Race) -> None:
    """Raises UserError for what cannot be run, before the first run."""
    if unknown := set(command.only or ()) - set(race.contestants):
        raise UserError(f"only={sorted(unknown)}; needed: of {', '.join(race.contestants)}")
    if command.at_once * race.cores > usable_cpus():
        raise UserError(f"at_once={command.at_once} runs of {race.cores} cores; found {usable_cpus()} cores")
    for contestant in race.contestants:
        parse(Settings, cli.load_config("config", training_overrides(race, contestant)))
        asked = ["ckpt=run", *scoring_overrides(race, contestant), *race.last]
        parse(SCORERS[race.scorer][0], cli.load_config(race.scorer, asked))


def run(command: Command, race: Race, folder: Path) -> None:
    """Trains and scores all runs that the record lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / "race.yaml", as_yaml(race))
    cores = sorted(os.sched_getaffinity(0))
    training = {name: threading.Lock() for name in run_names(race)}
    places = queue.SimpleQueue()
    for i in range(command.at_once):
        places.put(cores[i * race.cores : (i + 1) * race.cores])

    def work(name: str) -> None:
        mine = places.get()
        os.sched_setaffinity(0, mine)  # of this thread, and of the processes that it starts
        try:
            contestant, seed = run_names(race)[name]
            trained = f"{trains_for(race, contestant)}-{seed}"
            run_folder = Path(command.runs) / folder.name / trained
            with training[trained]:
                train(race, contestant, seed, run_folder)
            scores = run_folder / f"scores-{contestant}"
            score(race, contestant, run_folder, scores)
            keep(run_folder, scores, folder / name)
            print(f"{name}: finished", flush=True)
        finally:
            places.put(mine)

    wanted = command.only or race.contestants
    names = [name for name in missing_runs(race, folder) if run_names(race)[name][0] in wanted]
    with ThreadPoolExecutor(command.at_once) as pool:
        runs = [pool.submit(work, name) for name in names]
        try:
            for one in runs:
                one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def training_overrides(race: Race, contestant: str) -> list[str]:
    return [*race.common, *(o for o in race.contestants[contestant] if not o.startswith(SCORE))]


def trains_for(race: Race, contestant: str) -> str:
    """The first contestant that is trained in the same way: those that differ in their scoring alone share its runs."""
    wanted = training_overrides(race, contestant)
    return next(name for name in race.contestants if training_overrides(race, name) == wanted)


def scoring_overrides(race: Race, contestant: str) -> list[str]:
    own = race.contestants[contestant]
    return [*race.score, *(o.removeprefix(SCORE) for o in own if o.startswith(SCORE))]


def train(race: Race, contestant: str, seed: int, run_folder: Path) -> None:
    """Trains one run until the race's rule ends it; one that was interrupted goes on."""
    if ended(race, run_folder):
        return
    save_every = race.save_every or race.keep_every
    command = [
        sys.executable, str(ROOT / "train.py"), *training_overrides(race, contestant), f"seed={seed}",
        f"results_dir={run_folder.parent}", f"run_name={run_folder.name}",
        f"train.max_steps={race.steps or 10**7}", f"train.save_every={save_every}",
        f"train.keep_every={save_every}", "train.keep_last=1", f"train.val_every={race.keep_every}",
        f"train.log_every={LOG_EVERY}", "preview.every=0",
    ]  # fmt: skip
    process = start(command, race.cores, run_folder)
    while process.poll() is None:
        time.sleep(POLL_S)
        if race.seconds is not None and ended(race, run_folder):
            process.send_signal(signal.SIGTERM)  # saves and leaves
            process.wait()
    if not ended(race, run_folder):
        raise RuntimeError(f"{run_folder.name} ended with exit code {process.returncode}: {run_folder}.log")


def start(command: list[str], cores: int, run_folder: Path) -> subprocess.Popen:
    """A process that ends with this one; what it prints goes to <run folder>.log."""
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(cores)}
    with open(f"{run_folder}.log", "a", opener=own) as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=end_with_parent,
        )  # fmt: skip


def ended(race: Race, run_folder: Path) -> bool:
    try:
        steps = read_steps(run_folder)
    except UserError:  # not begun
        return False
    seen: dict[int, dict] = {}
    for step, line in steps.items():  # a later line can lower the median, but what has ended stays so
        seen[step] = line
        over = step >= race.steps if race.seconds is None else step * step_seconds(race, seen) >= race.seconds
        if over:
            return step % race.keep_every > 0 or "val/loss_dense" in line  # the validation comes after the step's line
    return False


def score(race: Race, contestant: str, run_folder: Path, scores: Path) -> None:
    """Scores every `keep_every`-th step and the last one, those that have no score yet."""
    done = {found["step"] for found in read_scores(scores)}
    saved = {step_of(path): path for path in complete_checkpoints(run_folder)}
    before = {step for step in saved if step % race.keep_every == 0} - {max(saved)}
    for part, steps, more in (("before", before, ()), ("last", {max(saved)}, race.last)):
        if left := [str(saved[step]) for step in sorted(steps - done)]:
            _, script, *verb = SCORERS[race.scorer]
            command = [sys.executable, str(ROOT / script), *verb, f"ckpt={','.join(left)}", f"out={scores / part}"]
            if code := start([*command, *scoring_overrides(race, contestant), *more], race.cores, run_folder).wait():
                raise RuntimeError(f"the scores of {run_folder.name} ended with exit code {code}: {run_folder}.log")


def keep(run_folder: Path, scores: Path, record: Path) -> None:
    """Copies what the record needs of a finished run; its folder appears whole or not at all."""
    part = record.with_name(f".{record.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    config = (run_folder / "config.yaml").read_text()
    (part / "config.yaml").write_text(config.replace(str(run_folder.parent.parent), "runs/race"))  # no machine's paths
    shutil.copyfile(run_folder / "metrics.jsonl", part / "metrics.jsonl")
    lines = []
    for found in sorted(read_scores(scores), key=lambda found: found["step"]):
        left_out = ("config", "checkpoint", "seconds", "images_per_s", "machine")
        lines.append(json.dumps({key: value for key, value in found.items() if key not in left_out}))
    (part / "scores.jsonl").write_text("\n".join(lines) + "\n")
    (part / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")
    part.rename(record)


def read_scores(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in folder.rglob("metrics.json")]


def machine() -> dict:
    """What a run ran on."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split("\t: ") for line in info.read_text().splitlines() if "\t: " in line)
        cpu = " ".join(fields.get(name, "") for name in ("model name", "cpu family", "model")).strip()
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    commit, changed = git("rev-parse", "HEAD") or None, bool(git("status", "--porcelain", "--untracked-files=no"))
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy", "scipy")}
    return {"cpu": cpu, "cores": os.cpu_count(), **versions, "commit": commit, "uncommitted_changes": changed}


# The record: what compares the runs is made from their logs alone


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
    columns = ([s[race.metric] for s in scores], [s[race.accuracy] for s in scores])
    return Scored(step_seconds(race, steps), scored, (*columns, [steps[step]["val/loss_dense"] for step in kept]))


def read_steps(run_folder: Path) -> dict[int, dict]:
    """{step: what the log says of it}, of the steps with a line on training. Raises UserError where there are none."""
    return {values["step"]: values for values in read_log(run_folder) if "train/loss" in values}


def step_seconds(race: Race, steps: dict[int, dict]) -> float:
    """The median time of a step: CPU time, shared by the run's cores; on a GPU, the time that has passed."""
    on_gpu = any("perf/host_s" in line for line in steps.values())
    key, cores = ("perf/step_s", 1) if on_gpu else ("perf/cpu_s", race.cores)
    return float(np.median([line[key] for line in steps.values()])) / cores


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
    accuracy = race.accuracy.replace("_", " ")
    better = {race.metric: "less", accuracy: "greater", "validation loss (EMA, without routing)": "less"}
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
    text += f"## {race.metric}, {accuracy} by steps\n\n{markdown(['steps', *runs], rows)}\n"
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
        head += [f"{race.metric} {title}", f"{race.accuracy.replace('_', ' ')} then"]
    for contestant, those in runs.items():
        pace = those[0].step_seconds
        rows.append([contestant, f"{pace:.3f}", *([] if seconds is None else [f"{seconds / pace:,.0f}"])])
        for _, at in moments:
            score, accuracy, _ = values_at(those, **at).T
            columns = (score, 1 if race.scorer == "fid" else 3), (accuracy, 3)
            rows[-1] += [f"{values.mean():.{digits}f} ± {spread(values):.{digits}f}" for values, digits in columns]
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


if __name__ == "__main__":
    cli.command(main, __doc__)
