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
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from scipy.stats import ttest_ind

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoints.config import Positive, Settings, Train
from checkpoints.curves import read_log
from checkpoints.load import Network
from checkpoints.run_folder import complete_checkpoints, step_of
from cost import mean_macs, training_flops
from evaluation.drawing import canvas, logarithmic, styles
from fid import Calc
from scripts.plot import markdown
from scripts.retrieval import Retrieval
from system import UserError, cli
from system.building import build
from system.files import atomic_file, commit, fresh_folder, json_object, own, read_small, write_text_atomic
from system.launchers import end_with_parent, usable_cpus
from system.settings import convert, parse, parse_known, read_yaml, refuse_layers

SCORE = "score."  # how a contestant's overrides of `fid.py calc` start; all others are train.py's
POLL_S = 0.5
SCORERS = {"fid": (Calc, "fid.py", "calc"), "retrieval": (Retrieval, "scripts/retrieval.py")}
LOG_EVERY = 10  # steps from one line of a run's log to the next
# Scores beside the two that a race names, where all runs have them.
ALSO = ("precision", "recall", "top5_seen", "top1_tone", "top5_tone", "top1_pair", "top5_pair")
LOSS = "val/loss_dense"  # of the log


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
    seeds: tuple[int, ...] | None = None


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
    if unknown := set(command.seeds or ()) - set(race.seeds):
        raise UserError(f"seeds={sorted(unknown)}; needed: of {', '.join(map(str, race.seeds))}")
    rule, wanted = as_yaml(race), command.seeds or race.seeds
    race = dataclasses.replace(race, seeds=[seed for seed in race.seeds if seed in wanted])
    if verb == "run":
        check(command, race)
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / "race.yaml", rule)
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
    if found and read_small(found[-1] / "race.yaml") != as_yaml(race).encode():
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
    cores = sorted(os.sched_getaffinity(0))
    places = [cores[i * race.cores : (i + 1) * race.cores] for i in range(command.at_once)]
    training, failed = {name: threading.Lock() for name in run_names(race)}, threading.Event()

    def take_place() -> None:
        os.sched_setaffinity(0, places.pop())  # of this thread, and of the processes that it starts

    def work(name: str) -> None:
        if failed.is_set():  # after an error, no other run begins
            return
        contestant, seed = run_names(race)[name]
        trained = f"{trains_for(race, contestant)}-{seed}"
        run_folder = Path(command.runs) / folder.name / trained
        scores = run_folder / f"scores-{contestant}"
        try:
            with training[trained]:
                train(race, contestant, seed, run_folder)
            score(race, contestant, run_folder, scores)
            keep(run_folder, scores, folder / name)
        except BaseException:
            failed.set()
            raise
        print(f"{name}: finished", flush=True)

    wanted = command.only or race.contestants
    names = [name for name in missing_runs(race, folder) if run_names(race)[name][0] in wanted]
    with ThreadPoolExecutor(command.at_once, initializer=take_place) as pool:
        list(pool.map(work, names))


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
            return step % race.keep_every > 0 or LOSS in line  # the validation comes after the step's line
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
    left_out, lines = ("config", "checkpoint", "seconds", "images_per_s", "machine"), []
    for found in sorted(read_scores(scores), key=lambda found: found["step"]):
        lines.append(json.dumps({key: value for key, value in found.items() if key not in left_out}))
    config = (run_folder / "config.yaml").read_text()
    with fresh_folder(record) as part:
        (part / "config.yaml").write_text(config.replace(str(run_folder.parent.parent), "runs/race"))  # no machine's
        shutil.copyfile(run_folder / "metrics.jsonl", part / "metrics.jsonl")
        (part / "scores.jsonl").write_text("\n".join(lines) + "\n")
        (part / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")


def read_scores(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in folder.rglob("metrics.json")]


def machine() -> dict:
    """What a run ran on."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split("\t: ") for line in info.read_text().splitlines() if "\t: " in line)
        cpu = " ".join(fields.get(name, "") for name in ("model name", "cpu family", "model")).strip()
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy", "scipy")}
    return {"cpu": cpu, "cores": os.cpu_count(), **versions, "commit": commit()}


# The record: what compares the runs is made from their logs and configs alone


@dataclasses.dataclass
class Scored:
    """A finished run, from its record."""

    step_seconds: float
    steps: np.ndarray  # of its scores
    macs: np.ndarray  # multiply-adds of the training until then
    columns: dict[str, list[float]]  # there: scores, the metric first, and validation loss, which the end may lack

    def spent(self, unit: str) -> np.ndarray:
        """How much training each score was after: steps, multiply-adds or seconds."""
        return {"steps": self.steps, "multiply-adds": self.macs, "seconds": self.steps * self.step_seconds}[unit]


Runs = dict[str, list[Scored]]  # of each contestant, a run for each seed


def show(race: Race, folder: Path) -> None:
    """Writes statistics.md, table.md, figure.png. Raises UserError where a run, a log line or a score is missing."""
    read: Runs = {contestant: [] for contestant in race.contestants}
    for name, (contestant, _) in run_names(race).items():
        read[contestant].append(read_run(race, folder / name))
    runs = {contestant: at_one_pace(those) for contestant, those in read.items()}
    if race.seconds is not None and common(runs, "seconds") is None:
        raise UserError(f"{folder}: no time at which all runs have a score; needed: a smaller keep_every")
    write_text_atomic(folder / "statistics.md", statistics(race, runs, read))
    write_text_atomic(folder / "table.md", table(race, runs))
    draw(race, runs, folder / "figure.png")


def every(runs: Runs) -> list[Scored]:
    return [run for those in runs.values() for run in those]


def common(runs: Runs, unit: str) -> float | None:
    """The most training that every run has had; None where some have no score until then."""
    spent = [run.spent(unit) for run in every(runs)]
    most = min(each[-1] for each in spent)
    return most if most >= max(each[0] for each in spent) else None


def apart(runs: Runs, unit: str) -> bool:
    """Whether a step costs some contestants more than others."""
    return len({f"{run.spent(unit)[-1] / run.steps[-1]:.9g}" for run in every(runs)}) > 1


def moments(race: Race, runs: Runs) -> dict[str, float]:
    """{unit: after how much of it the contestants are compared}: always after steps that all were scored at."""
    found = {"steps": min(run.steps[-1] for run in every(runs)) // race.keep_every * race.keep_every}
    for unit in ("multiply-adds", "seconds") if race.seconds is None else ("seconds",):
        if apart(runs, unit) and (most := common(runs, unit)) is not None:
            found[unit] = most
    return found


def after(unit: str, x: float) -> str:
    return {
        "steps": f"after {x:,.0f} steps", "seconds": f"after {x:,.0f} s",
        "multiply-adds": f"after {float(f'{x / 1e12:.3g}'):,g} trillion multiply-adds",
    }[unit]  # fmt: skip


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
    needed = (range(every, max(steps) + 1, every) for every in (LOG_EVERY, race.keep_every))
    if lost := [step for step in (next((s for s in each if s not in steps), None) for each in needed) if step]:
        raise UserError(f"{folder / 'metrics.jsonl'} has no line of step {min(lost)}")
    kept = [*range(race.keep_every, max(steps) + 1, race.keep_every)]
    if lost := [step for step in kept if steps[step].get(LOSS) is None]:
        raise UserError(f"{folder / 'metrics.jsonl'} has no validation of step {lost[0]}")
    path = folder / "scores.jsonl"
    scores = [json_object(line, path) for line in read_small(path).splitlines()]
    scored = sorted({*kept, max(steps)})
    if (found := [score.get("step") for score in scores]) != scored:
        raise UserError(f"{path} has steps {found}; needed: {scored}")
    keys = [race.metric, race.accuracy, *(key for key in ALSO if all(key in score for score in scores))]
    columns = {key: [convert(score.get(key), float, f"{path}: {key}") for score in scores] for key in keys}
    columns |= {LOSS: [steps[step][LOSS] for step in kept]}
    return Scored(step_seconds(race, steps), np.array(scored), training_macs(folder / "config.yaml", scored), columns)


def training_macs(path: Path, steps: list[int]) -> np.ndarray:
    """Multiply-adds of a run's training until each of the steps, counted as cost.py does. path: of its config.

    A record's config may be older than today's settings; of these, the network and the section `train` are used.
    """
    config = read_yaml(read_small(path), str(path))
    if not isinstance(config, dict) or not isinstance(config.get("train"), dict) or "model" not in config:
        raise UserError(f"{path} is damaged; needed: the sections model and train")
    refuse_layers(config["model"], str(path))
    train = parse_known(Train, config["train"], path)
    with torch.device("meta"):  # shapes without memory
        model = build(config["model"], Network, "model")
    flops = [training_flops(mean_macs(model, train, 0, step), train.global_batch_size * step) for step in steps]
    return np.array(flops) / 2


def read_steps(run_folder: Path) -> dict[int, dict]:
    """{step: what the log says of it}, of the steps with a line on training. Raises UserError where there are none."""
    return {values["step"]: values for values in read_log(run_folder) if "train/loss" in values}


def step_seconds(race: Race, steps: dict[int, dict]) -> float:
    """The median time of a step: CPU time, shared by the run's cores; on a GPU, the time that has passed."""
    on_gpu = any("perf/host_s" in line for line in steps.values())
    key, cores = ("perf/step_s", 1) if on_gpu else ("perf/cpu_s", race.cores)
    times = [line.get(key) for line in steps.values()]
    if None in times:
        raise UserError(f"the log has no {key} of step {[*steps][times.index(None)]}; needed: one of each")
    return float(np.median(times)) / cores


def values_at(runs: list[Scored], column: str, unit: str, x: float) -> np.ndarray:
    """A column of each run after so much training, between two scores on the straight line through them."""
    parts = [(run.spent(unit), run.columns[column]) for run in runs]
    return np.array([np.interp(x, spent[: len(values)], values) for spent, values in parts])


def statistics(race: Race, runs: Runs, read: Runs) -> str:
    """Every contestant against the first: means over seeds, sample standard deviations, and Welch's test.

    read: the runs, each with the time per step of its own log.
    """
    text, number, accuracy = f"# {race.question}\n\n", 0, race.accuracy.replace("_", " ")
    where = [(after(unit, x), runs, unit, x) for unit, x in moments(race, runs).items()]
    if where[-1][2] == "seconds" and (own := common(read, "seconds")) is not None:
        where.append((f"{after('seconds', own)}, by each run's own time per step", read, "seconds", own))
    names = {race.metric: race.metric, race.accuracy: accuracy, **{key: key for key in shared(runs, ALSO)}}
    for key, name in (names | {LOSS: "validation loss (EMA, without routing)"}).items():
        for title, compared, unit, x in [moment for moment in where if key != LOSS or moment[2] == "steps"]:
            values = {contestant: values_at(those, key, unit, x) for contestant, those in compared.items()}
            head, rows = compare(values, "less" if key in (race.metric, LOSS) else "greater")
            text += f"## {name} {title}\n\n{markdown(head, rows)}\n"
            number += sum(bool(row[-1]) for row in rows)
    rows = []
    for step in range(race.keep_every, where[0][3] + 1, race.keep_every):
        pair = lambda those: [values_at(those, key, "steps", step).mean() for key in (race.metric, race.accuracy)]
        rows.append([f"{step:,}", *("{:.4g}, {:.3f}".format(*pair(those)) for those in runs.values())])
    text += f"## {race.metric}, {accuracy} by steps\n\n{markdown(['steps', *runs], rows)}\n"
    text += "Standard deviations are those of the sample; p is Welch's, one-sided. A value between two scores lies on "
    text += "the straight line through them.\n\n"
    if len(race.seeds) == 1:
        return f"{text}There is no test of single runs.\n"
    text += f"None of the {number} p-values is corrected for their number: without any difference, about one in twenty "
    return f"{text}would lie below 0.05. The intervals are Welch's, two-sided.\n"


def shared(runs: Runs, keys: Sequence[str]) -> list[str]:
    """Those of the columns that every run has."""
    return [key for key in keys if all(key in run.columns for run in every(runs))]


def compare(values: dict[str, np.ndarray], better: str) -> tuple[list[str], list[list]]:
    """Head and rows of a table of the contestants' values, one a seed. better: less or greater."""
    (baseline, base), *_ = values.items()
    head, rows = ["", "n", "mean", "standard deviation", f"difference to {baseline}"], []
    head += ["95% interval", f"p ({better} than {baseline})"]
    for contestant, mine in values.items():
        rows.append([contestant, len(mine), f"{mine.mean():.4g}", f"{spread(mine):.2g}".replace("nan", ""), "", "", ""])
        if contestant != baseline:
            rows[-1][4] = f"{mine.mean() - base.mean():+.4g}"
            if spread(mine) + spread(base) > 0:  # there is no test of single values, nor of values that are all equal
                p = ttest_ind(mine, base, equal_var=False, alternative=better).pvalue
                interval = ttest_ind(mine, base, equal_var=False).confidence_interval()
                rows[-1][5:] = f"{interval.low:+.3g} to {interval.high:+.3g}", f"{p:.2g}"
    return head, rows


def spread(values: np.ndarray) -> float:
    """The sample standard deviation; nan of a single value."""
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def table(race: Race, runs: Runs) -> str:
    """One row a contestant: mean over seeds, plus or minus the sample standard deviation."""
    compared, also, rows = moments(race, runs), shared(runs, ALSO), []
    seconds, places = compared.get("seconds"), {race.metric: 1 if race.scorer == "fid" else 3, race.accuracy: 3}
    head = ["", "s a step", *([] if seconds is None else [f"steps in {seconds:,.0f} s"])]
    where = {unit: compared[unit] for unit in ("seconds", "steps") if unit in compared}
    for unit, x in where.items():
        head += [f"{race.metric} {after(unit, x) if unit == 'steps' else 'then'}"]
        head += [f"{race.accuracy.replace('_', ' ')} then", *([f"{', '.join(also)} then"] if also else [])]
    for contestant, those in runs.items():
        pace = those[0].step_seconds
        rows.append([contestant, f"{pace:.3f}", *([] if seconds is None else [f"{seconds / pace:,.0f}"])])
        for unit, x in where.items():
            values = {key: values_at(those, key, unit, x) for key in (*places, *also)}
            means = [f"{v.mean():.{places.get(key, 2)}f}" for key, v in values.items()]
            spreads = [f" ± {spread(values[key]):.{places[key]}f}".removesuffix(" ± nan") for key in places]
            rows[-1] += [*map("".join, zip(means, spreads)), *([", ".join(means[2:])] if also else [])]
    return markdown(head, rows)


def draw(race: Race, runs: Runs, path: Path) -> None:
    """The metric against steps, multiply-adds where a step's differ, and seconds where they are the rule; and by name.

    Measured points alone. Means and bands are those of logarithms, unless there are values of 0.
    """
    log, seeds = min(min(run.columns[race.metric]) for run in every(runs)) > 0, len(race.seeds)
    units = ["steps", *["multiply-adds"] * apart(runs, "multiply-adds"), *["seconds"] * (race.seconds is not None)]
    units = units if any(len(run.steps) > 1 for run in every(runs)) else []
    widths = [3.0] * len(units) + [0.6 + max(0.4 * len(runs), 1.2)]
    wide = 0.8 + sum(widths)  # inches
    figure, axes = canvas((wide, 4.6), 1, len(widths), widths)
    *curves, names = axes
    ends = [[run.columns[race.metric][-1] for run in those] for those in runs.values()]  # of each contestant and seed
    names.plot(ends, color="0.6", linewidth=0.7)
    for i, (look, (contestant, those)) in enumerate(zip(styles(len(runs)), runs.items())):
        for axis, unit in zip(curves, units):
            x, values = measured(those, unit, race.metric)
            means = shade(axis, x.mean(0), values, look["color"], log)
            axis.plot(x.mean(0), means, label=contestant, markersize=5, **look)
            for run in those:
                axis.plot(run.spent(unit), run.columns[race.metric], color=look["color"], linewidth=0.5)
        across = np.array([i - 0.3, i + 0.3])
        names.plot(across, shade(names, across, np.array([ends[i]] * 2).T, look["color"], log), color=look["color"])
        names.plot([i] * seeds, ends[i], **look | {"linestyle": ""}, markersize=5)
    for axis, unit in zip(curves, units):
        macs = unit == "multiply-adds"
        axis.set_xlabel(f"{'trillion ' * macs}{unit} of training")
        axis.xaxis.set_major_formatter((lambda x, _: f"{x / 1e12:,g}") if macs else "{x:,g}")
        axis.set_xlim(0, 1.05 * axis.dataLim.x1)
        axis.locator_params("x", nbins=6)
    names.set_xticks(range(len(runs)), list(runs), rotation=45, ha="right", rotation_mode="anchor")
    names.set_title(after("steps", race.steps) if race.steps else after("seconds", race.seconds), fontsize=10)
    for axis in axes:
        axis.grid(alpha=0.3)
    for axis in axes[1:]:
        axis.sharey(axes[0])
        axis.tick_params(labelleft=False)
    axes[0].set_ylabel(f"{race.metric} (lower is better)")
    if log:
        logarithmic(axes[0])  # and those that share it
    mean, logs = ("geometric mean", ", of logarithms") if log else ("mean", "")
    note = (
        f"Measured points. Thick: {mean} of {seeds} seeds; shaded: one standard deviation{logs}; thin: each seed; grey "
    )
    note = f"{note}joins runs of one seed." if seeds > 1 else "Measured points of one seed."
    figure.supxlabel(textwrap.fill(note, round(17 * wide)), fontsize=8, x=0.01, ha="left")
    if units:
        figure.legend(
            *curves[0].get_legend_handles_labels(), loc="outside upper left", ncols=round(wide / 1.8), frameon=False
        )
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, metadata={"Software": None})


def measured(runs: list[Scored], unit: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(how much training, column), (runs, points) each, where all runs were scored; last, at the end of each."""
    ends = {run.steps[-1] for run in runs}
    shared = set.intersection(*(set(run.steps) for run in runs)) - ends
    rows = [[*np.flatnonzero(np.isin(run.steps, [*shared])), -1] for run in runs]
    spent = [run.spent(unit)[row] for run, row in zip(runs, rows)]
    return np.array(spent), np.array([np.array(run.columns[column])[row] for run, row in zip(runs, rows)])


def shade(axis: Axes, x: np.ndarray, values: np.ndarray, color, log: bool) -> np.ndarray:
    """Draws a band of one standard deviation of values (runs, points) -> their means (points,), perhaps geometric."""
    to, back = (np.log, np.exp) if log else (np.asarray, np.asarray)
    mean, deviation = to(values).mean(0), to(values).std(0, ddof=1) if len(values) > 1 else 0.0
    axis.fill_between(x, back(mean - deviation), back(mean + deviation), color=color, alpha=0.15, linewidth=0)
    return back(mean)


if __name__ == "__main__":
    cli.command(main, __doc__)
