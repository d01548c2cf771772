"""Races: networks trained side by side under one rule, with several seeds, and compared in a record that stays.

python scripts/race.py run name=smoke     trains and scores what is not finished yet, then as `show`
python scripts/race.py show name=smoke    statistics.md, table.md and figure.png, from the record's logs alone

A race is a file of configs/race/, which holds the rule before the first run: who takes part, when a run ends, what is
scored. Its record is records/<date>_<name>/, with a folder for each run: its config, its log, its scores, the machine.

Seconds are CPU time: the number of steps times the cost of a step, which is the median over the steps of a run and
then over the runs of a contestant. Compiling, saving, validation and scoring are not counted; other load on the machine
still shows. A run ends by its own median.
"""

import datetime
import json
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

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoints.run_folder import complete_checkpoints, step_of  # noqa: E402
from scripts.records import LOG_EVERY, Race, as_yaml, read_steps, run_names, show, step_seconds  # noqa: E402
from system import UserError, cli  # noqa: E402
from system.files import write_text_atomic  # noqa: E402
from system.launchers import end_with_parent, usable_cpus  # noqa: E402

SCORE = "score."  # how a contestant's overrides of `fid.py calc` start; all others are train.py's
POLL_S = 0.5


def main(argv: list[str]) -> None:
    verb, overrides = cli.verb(argv, __doc__, ("run", "show"))
    cfg = cli.load_config("race", overrides)
    race = load_race(cfg.name)
    folder = record_folder(Path(cfg.records), cfg.name, race)
    if verb == "run":
        check(cfg, race)
        run(cfg, race, folder)
    elif not folder.is_dir():
        raise UserError(f"{cfg.records} has no record of {cfg.name}; needed: python scripts/race.py run")
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


def check(cfg: DictConfig, race: Race) -> None:
    """Raises UserError for what cannot be run, before the first run."""
    if unknown := set(cfg.only or ()) - set(race.contestants):
        raise UserError(f"only={sorted(unknown)}; needed: of {', '.join(race.contestants)}")
    if cfg.at_once * race.cores > usable_cpus():
        raise UserError(f"at_once={cfg.at_once} runs of {race.cores} cores; found {usable_cpus()} cores")
    for contestant in race.contestants:
        cli.load_config("config", training_overrides(race, contestant))
        cli.load_config("fid", ["ckpt=run", *scoring_overrides(race, contestant)])


def run(cfg: DictConfig, race: Race, folder: Path) -> None:
    """Trains and scores all runs that the record lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / "race.yaml", as_yaml(race))
    cores = sorted(os.sched_getaffinity(0))
    training = {name: threading.Lock() for name in run_names(race)}
    places = queue.SimpleQueue()
    for i in range(cfg.at_once):
        places.put(cores[i * race.cores : (i + 1) * race.cores])

    def work(name: str) -> None:
        mine = places.get()
        os.sched_setaffinity(0, mine)  # of this thread, and of the processes that it starts
        try:
            contestant, seed = run_names(race)[name]
            trained = f"{trains_for(race, contestant)}-{seed}"
            run_folder = Path(cfg.runs) / folder.name / trained
            with training[trained]:
                train(race, contestant, seed, run_folder)
            scores = run_folder / f"scores-{contestant}"
            score(race, contestant, run_folder, scores)
            keep(run_folder, scores, folder / name)
            print(f"{name}: finished", flush=True)
        finally:
            places.put(mine)

    names = [name for name in missing_runs(race, folder) if run_names(race)[name][0] in (cfg.only or race.contestants)]
    with ThreadPoolExecutor(cfg.at_once) as pool:
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
    with open(f"{run_folder}.log", "a") as log:
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
    wanted = {step for step in saved if step % race.keep_every == 0} | {max(saved)}
    left = [saved[step] for step in sorted(wanted - done)]
    if not left:
        return
    command = [sys.executable, str(ROOT / "fid.py"), "calc", f"ckpt={','.join(map(str, left))}"]
    command += [f"out={scores}", *scoring_overrides(race, contestant)]
    if code := start(command, race.cores, run_folder).wait():
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


if __name__ == "__main__":
    cli.command(main, __doc__)
