"""A run of training for every combination of comma-separated values, one after another, or each as a job of SLURM.

python scripts/sweep.py model=dit,tread train.lr=1e-3,2e-3
python scripts/sweep.py model=dit,tread launch="accelerate launch --num_processes 8"
python scripts/sweep.py model=dit,tread launch="sbatch --gpus-per-node 8 --time 12:00:00"    by scripts/slurm.sbatch

launch: what stands before train.py. The runs are in <results_dir>/<run_name, or multirun>/, named after the values that
are swept, as by `train.py -m`. The same command, given again, goes on where it stopped: finished runs are left as they
are. A run that stops with exit code 75 is started again; one that fails is reported, and the others are trained.

Exit codes: 0 = all runs are finished, or in SLURM's queue; 1 = some have failed; 2 = nothing was started; 75 = stopped.
"""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoints.config import Settings
from checkpoints.naming import sweep_name
from checkpoints.resuming import HARMLESS, differences
from checkpoints.run_folder import START_AGAIN, latest_checkpoint, read_config, step_of
from system import UserError, cli
from system.files import reserve, write_text_atomic
from system.launchers import end_with_parent
from system.settings import parse
from training.stopping import EXIT_START_AGAIN

SLURM_JOB = "slurm_job"  # in the run folder: the id of the job that trains it
CHOSEN_BY_MACHINE = (*HARMLESS, "train.precision", "optimizer.ns_precision", "train.compile")
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A signal has come."""


@dataclass
class Job:
    """One combination of values."""

    overrides: list[str]
    folder: Path
    last_step: int

    def finished(self) -> bool:
        """Trained to the last step, and not stopped in the evaluation after it."""
        newest = latest_checkpoint(self.folder)
        trained = newest is not None and step_of(newest) >= self.last_step
        return trained and not (self.folder / START_AGAIN).exists()


def main(arguments: Sequence[str]) -> int:
    if not arguments:
        raise UserError("needed: keys with several values, as in model=dit,tread; --help says more")
    launches = [argument.removeprefix("launch=") for argument in arguments if argument.startswith("launch=")]
    launch = shlex.split(launches[-1]) if launches else [sys.executable]
    if not launch or shutil.which(launch[0]) is None:
        raise UserError(f"launch={' '.join(launch)}; needed: a command, such as accelerate launch, torchrun or sbatch")
    jobs = plan([argument for argument in arguments if not argument.startswith("launch=")])
    for number in STOP:
        signal.signal(number, stop)
    failed = 0
    for i, job in enumerate(jobs, 1):
        title = f"sweep {i}/{len(jobs)}  {job.folder}: "
        if job.finished():
            print(f"{title}finished before", flush=True)
            continue
        print(f"{title}{' '.join(job.overrides)}", flush=True)
        try:
            code, what = submit(job, launch) if Path(launch[0]).name == "sbatch" else train(job, launch)
        except Stopped:
            print(f"{title}stopped; the same command goes on", flush=True)
            return EXIT_START_AGAIN
        failed += code != 0
        print(f"{title}{what}", flush=True)
    print(f"sweep: {len(jobs) - failed} of {len(jobs)} runs without a failure", flush=True)
    return 1 if failed else 0


def plan(overrides: Sequence[str]) -> list[Job]:
    """Raises UserError for what could not be trained, before the first run."""
    names = [override for override in overrides if override.startswith("run_name=")]
    given = [override for override in overrides if not override.startswith("run_name=")]
    rows = cli.combinations(given)
    if len({tuple(row) for row in rows}) < len(rows):
        raise UserError("a value is given twice")
    swept = [i for i, values in enumerate(zip(*rows)) if len(set(values)) > 1]
    if not swept:
        raise UserError("nothing is swept; needed: a key with several values, as in model=dit,tread")
    parent = names[-1].removeprefix("run_name=") if names else "multirun"
    jobs = []
    for row in rows:
        name = f"run_name={parent}/{sweep_name([row[i] for i in swept])}"
        row = [*(row[i] if i in swept else given[i] for i in range(len(given))), name]
        settings = parse(Settings, cli.load_config("config", row))
        folder = Path(settings.results_dir) / settings.run_name
        jobs.append(Job(row, folder, settings.train.max_steps))
        if (folder / "config.yaml").is_file() and differences(read_config(folder), settings, CHOSEN_BY_MACHINE):
            raise UserError(f"{folder} is a run of other settings; needed: another run_name, for this sweep's folder")
    return jobs


def train(job: Job, launch: Sequence[str]) -> tuple[int, str]:
    """(exit code, what became of it). Until it ends otherwise than with the wish to be started again."""
    wish = job.folder / START_AGAIN  # no launcher hands the exit code on
    while True:
        wait_until_free(job.folder)
        before = wish.stat().st_mtime_ns if wish.exists() else None
        code = run([*launch, str(ROOT / "train.py"), *job.overrides])
        wait_until_free(job.folder)  # some launchers are back before the save is
        if code != EXIT_START_AGAIN and not (wish.exists() and wish.stat().st_mtime_ns != before):
            return code, "finished" if code == 0 else f"failed with exit code {code}"


def run(command: Sequence[str]) -> int:
    """The exit code of a command that ends, after a save, with this process. Raises Stopped."""
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)
    try:
        return process.wait()
    except Stopped:
        process.terminate()
        process.wait()
        raise


def wait_until_free(folder: Path) -> None:
    """Until no process trains the run any more: one may still be saving."""
    told = False
    while folder.is_dir():
        try:
            reserve(folder).close()
            return
        except UserError as error:
            if not told:
                print(f"waiting: {cli.one_line(error).partition(';')[0]}", flush=True)
            told = True
            time.sleep(0.5)


def stop(number: int, frame) -> None:
    raise Stopped


def submit(job: Job, launch: Sequence[str]) -> tuple[int, str]:
    """(exit code, what became of it). A run whose job waits or runs is not submitted twice."""
    note = job.folder / SLURM_JOB
    if note.is_file():
        number = note.read_text().strip()
        if subprocess.run(["squeue", "-h", "-j", number], capture_output=True, text=True).stdout.strip():
            return 0, f"job {number} is waiting or running"
    job.folder.mkdir(parents=True, exist_ok=True)
    name = f"--job-name={job.overrides[-1].removeprefix('run_name=')}"
    own = ["--parsable", name, f"--output={job.folder / 'slurm-%j.out'}"]
    command = [launch[0], *own, *launch[1:], str(ROOT / "scripts" / "slurm.sbatch"), str(ROOT / "train.py")]
    done = subprocess.run([*command, *job.overrides], capture_output=True, text=True)
    if done.returncode:
        return done.returncode, f"not submitted: {done.stderr.strip()}"
    number = done.stdout.strip().partition(";")[0]  # <id>;<cluster>
    write_text_atomic(note, f"{number}\n")
    return 0, f"job {number}"


if __name__ == "__main__":
    cli.command(main, __doc__)
