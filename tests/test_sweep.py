"""scripts/sweep.py and scripts/slurm.sbatch, with stand-ins for SLURM's commands."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints.run_folder import latest_checkpoint
from scripts.sweep import plan
from system import UserError
from tests.conftest import ROOT, assert_same_run, numbers

SLURM = {
    # flags, script, program, overrides => the next id; what it was given stands in given
    "sbatch": """
        printf '%s\\n' "$@" > "$SPOOL/given.$(ls "$SPOOL" | wc -l)"
        echo "10$(ls "$SPOOL" | wc -l);cluster"
    """,
    "squeue": """ [ "$3" = 101 ] && echo '101 RUNNING' || exit 1 """,
    "scontrol": """
        case $1 in show) echo 127.0.0.1; echo other ;; requeue) echo "$2" >> "$SPOOL/requeued" ;; esac
    """,
}
# One task a node; SIGUSR1 goes to every process of the step, and SIGTERM kills it, as srun and slurmstepd do it.
SRUN = """
import os, signal, subprocess, sys
from pathlib import Path

nodes = range(int(os.environ["SLURM_NNODES"]))
tasks = [subprocess.Popen(sys.argv[1:], env={**os.environ, "SLURM_NODEID": str(node)}) for node in nodes]

def below(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children] + [other for child in children for other in below(child)]

def hand_on(number, frame):
    for pid in below(os.getpid()):
        os.kill(pid, signal.SIGKILL if number == signal.SIGTERM else number)

signal.signal(signal.SIGUSR1, hand_on)
signal.signal(signal.SIGTERM, hand_on)
sys.exit(max(abs(task.wait()) for task in tasks))
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's commands on PATH -> the folder in which they note what they did."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "spool").mkdir()
    commands = {name: f"#!/bin/bash\n{text}" for name, text in SLURM.items()} | {"srun": f"#!{sys.executable}\n{SRUN}"}
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    python = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{python}:{os.environ['PATH']}")
    monkeypatch.setenv("SPOOL", str(tmp_path / "spool"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "spool"


def start(*arguments):
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def sweep(*arguments):
    """(exit code, the sweep's own lines, stderr)"""
    out, err = (job := start(*arguments)).communicate(timeout=240)
    return job.returncode, [line for line in out.splitlines() if line.startswith("sweep")], err


def launcher(tmp_path, text):
    """A program for launch=; $folder is the run's."""
    path = tmp_path / "launcher"
    path.write_text(f"#!/bin/bash\nfor a; do case $a in run_name=*) folder={tmp_path}/${{a#*=}} ;; esac; done\n{text}")
    path.chmod(0o755)
    return f"launch={path}"


@pytest.mark.slow
def test_a_sweep_that_is_killed_in_its_second_run_goes_on_with_it(run, tiny_overrides, tmp_path):
    own = ["run_name=four", "model=dit,tread", "train.lr=1e-3,2e-3", f"results_dir={tmp_path}", "train.max_steps=60"]
    keys = [*(key for key in tiny_overrides if key != "train.max_steps=7"), *own]
    # To be quick, the last two are not trained.
    keys.append(launcher(tmp_path, f'[[ $folder == *tread* ]] || exec {sys.executable} "$@"'))
    _, first = run("four/model-dit_train.lr-0.001", "model=dit", "train.lr=1e-3", "train.max_steps=60")
    second, before = tmp_path / "four" / "model-dit_train.lr-0.002", (first / "config.yaml").stat().st_mtime_ns
    job = start(*keys)
    wait_for(second / "metrics.jsonl", job)
    job.kill()
    job.communicate()

    code, lines, err = sweep(*keys)
    assert code == 0, err
    assert lines[0] == f"sweep 1/4  {first}: finished before"
    assert [line.split()[1] for line in lines if line.endswith(": finished")] == ["2/4", "3/4", "4/4"]
    assert (first / "config.yaml").stat().st_mtime_ns == before
    _, undisturbed = run("undisturbed", "model=dit", "train.lr=2e-3", "train.max_steps=60")
    assert_same_run(second, undisturbed)

    with pytest.raises(UserError, match=f"{first} is a run of other settings; needed: another run_name"):
        plan([*keys[:-1], "seed=1"])


def wait_for(path, job):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.02)


def test_75_starts_a_run_again_and_a_failure_does_not_stop_the_others(tmp_path):
    keys = [f"results_dir={tmp_path}", "run_name=s", "seed=1,2,3"]
    text = """
        mkdir -p "$folder"
        echo >> "$folder/starts"
        starts=$(wc -l < "$folder/starts")
        case $folder/$starts in
            */seed-1/1) exit 75 ;;
            */seed-1/2) echo SIGTERM > "$folder/start_again"; exit 1 ;;   # as through torchrun
            */seed-2/1) echo an old wish > "$folder/start_again"; touch -d 2020-01-01 "$folder/start_again"; exit 75 ;;
            */seed-2/2) exit 3 ;;
        esac
    """
    code, lines, err = sweep(launcher(tmp_path, text), *keys)
    assert code == 1, err
    ends = [line.partition(": ")[2] for line in lines[1::2]]
    assert ends == ["finished", "failed with exit code 3", "finished"]
    assert lines[-1] == "sweep: 2 of 3 runs without a failure"
    assert [(tmp_path / "s" / f"seed-{i}" / "starts").read_text().count("\n") for i in (1, 2, 3)] == [3, 2, 1]


def test_a_signal_to_a_sweep_saves_the_run_and_ends(tiny_overrides, tmp_path):
    keys = [*tiny_overrides[:-1], f"results_dir={tmp_path}", "run_name=s", "seed=1,2"]
    keys = [key.replace("train.max_steps=7", "train.max_steps=100000") for key in keys]
    job = start(*keys)
    log = tmp_path / "s" / "seed-1" / "metrics.jsonl"
    wait_for(log, job)
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 75 and "seed-1: stopped; the same command goes on" in out, err
    assert latest_checkpoint(log.parent) is not None and (log.parent / "start_again").exists()
    assert not (tmp_path / "s" / "seed-2").exists()


MISTAKES = {
    "model=dit": "nothing is swept",
    "model=dit,tread train.max_step=3": "unknown key 'train.max_step'",
    "model=dit,tread seed=1,1": "a value is given twice",
    "model=dit,tread launch=nowhere": "launch=nowhere; needed: a command",
    "model=dit,nothing": "unknown model=nothing",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_any_combination_starts_none(mistake, tmp_path):
    code, lines, err = sweep(f"results_dir={tmp_path}", *mistake.split())
    assert code == 2 and not lines and MISTAKES[mistake] in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_one_job_of_slurm_for_each_run_and_none_twice(slurm, tmp_path):
    keys = [f"results_dir={tmp_path}", "run_name=s", "seed=1,2", "launch=sbatch --nodes 2 --time=1:00:00"]
    code, lines, err = sweep(*keys)
    assert code == 0 and [line.rpartition(": ")[2] for line in lines[1::2]] == ["job 101", "job 102"], err
    folder = tmp_path / "s" / "seed-1"
    assert (slurm / "given.0").read_text().splitlines() == [
        "--parsable", "--job-name=s/seed-1", f"--output={folder}/slurm-%j.out", "--nodes", "2", "--time=1:00:00",
        str(ROOT / "scripts" / "slurm.sbatch"), str(ROOT / "train.py"), f"results_dir={tmp_path}", "seed=1",
        "run_name=s/seed-1",
    ]  # fmt: skip
    code, lines, err = sweep(*keys)  # the first one's job runs, the other's is gone
    assert [line.rpartition(": ")[2] for line in lines[1::2]] == ["job 101 is waiting or running", "job 103"], err


def batch(slurm, *arguments, nodes=2, **environment):
    """scripts/slurm.sbatch as SLURM runs it."""
    settings = {"SLURM_JOB_ID": "4711", "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "node[1-2]", **environment}
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "slurm.sbatch"), "train.py", *arguments],
        cwd=ROOT, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_job_that_is_signalled_is_saved_and_requeued(slurm, few_latents, tiny_overrides, tmp_path):
    keys = [key.replace("train.max_steps=7", "train.max_steps=60") for key in tiny_overrides]
    keys += [f"results_dir={tmp_path}"]
    job = batch(slurm, *keys, "run_name=stopped", STAGE=str(tmp_path / "disk"))
    wait_for(tmp_path / "stopped" / "metrics.jsonl", job)
    job.send_signal(signal.SIGUSR1)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0 and (slurm / "requeued").read_text() == "4711\n", err
    assert "stopped by SIGUSR1 after step" in out and len(numbers(tmp_path / "stopped")) < 60
    for path in few_latents.iterdir():
        assert (tmp_path / "disk" / few_latents.name / path.name).stat().st_mtime_ns == path.stat().st_mtime_ns

    job = batch(slurm, *keys, "run_name=stopped")
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0 and latest_checkpoint(tmp_path / "stopped").name == "step_0000060", err
    assert (slurm / "requeued").read_text() == "4711\n" and not (tmp_path / "stopped" / "start_again").exists()


@pytest.mark.parametrize("keys, stage", [("seed=1", ""), ("run_name=a", "disk")])
def test_a_batch_script_without_what_it_needs_says_so(slurm, keys, stage):
    job = batch(slurm, *shlex.split(keys), STAGE=stage)
    assert "error: needed: train.py run_name=NAME" in job.communicate()[1] and job.returncode == 2


def test_a_failure_is_not_requeued(slurm, tmp_path):
    job = batch(slurm, f"results_dir={tmp_path}", "run_name=a", "train.max_step=1", nodes=1)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 1 and "unknown key" in err and not (slurm / "requeued").exists()
