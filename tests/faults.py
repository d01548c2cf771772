"""Faults that a run survives, as a table: `python -m tests.faults` (200 kills, a storm of 2,000 steps), or `--quick`.

A small run is trained once undisturbed (the golden run). Then it is killed, interrupted and damaged at random and
restarted by the same command, and must end with the golden run's weights, EMA, optimizer state and log, bit for bit.
docs/reliability.md has the table.
"""

import argparse
import contextlib
import errno
import fcntl
import functools
import json
import os
import pickle  # to plant one; nothing here reads it
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # a process that has used several OpenMP threads cannot be forked

import numpy as np
import torch
import yaml

import data
import sample
import train
from checkpoints.config import Settings
from checkpoints.run_folder import complete_checkpoints, latest_checkpoint, read_tensors, step_of, verify_checkpoint
from data.images import open_images
from evaluation.reference import read_reference
from system import UserError, cli
from system.files import sha256_of
from system.settings import parse
from tests import started
from tests.conftest import COMPARED, ROOT, TORCHRUN, Canary, failing_reads, numbers
from tests.made_runs import make_run
from training.stopping import EXIT_NOT_FINITE, EXIT_START_AGAIN

Rows = Iterator[tuple[str, str | float | None, bool]]  # what; what was found, in seconds where it is a number; is it so
SAVE_EVERY = 5
SMALL = [
    "model.size=DiT-XS/4", "model.depth=6", "model.hidden_size=32", "model.num_heads=2", "train.global_batch_size=16",
    "train.compile=off", "train.precision=fp32", "train.decay_steps=0", "train.log_every=1",
    f"train.save_every={SAVE_EVERY}", "train.val_every=0", "preview.every=0",
]  # fmt: skip
ROWS = {  # what: what is needed, or within how many seconds
    "R1 SIGKILLs survived": "all",
    "R1 torn checkpoints accepted": "0",
    "R1 steps lost, at most": f"<= {SAVE_EVERY}",
    "R1 a file system without locks": "trained, with a warning",
    "R2 max abs difference to the golden run": "0",
    "R2 going back to an older checkpoint: steps lost, later ones kept": "0, 30",
    "R3 signals answered by a save and exit code 75": "all",
    "R3 steps lost, at most": "0",
    "R3 from the signal to the exit, at most": 30,
    "R3 the launcher's SIGTERM on a slow disk: steps lost": "0",
    "R3 the launcher's SIGTERM on a slow disk: to the exit": 30,
    "R4 a dead process of two is named after": 10,
    "R4 a hung process of two is named after": 15,
    "R4 evaluations that fail on one of two: told, trained on": "once each",
    "R4 two processes with different newest checkpoints": "one line, with both",
    "R4 a dead node of two: the other one ends after": 30,
    "R4 a hung node of two: the other one ends after": 30,
    "R5 checkpoints from the first bad value on": f"0, exit code {EXIT_NOT_FINITE}",
    "R6 damaged shards detected": "all",
    "R6 samples after one EIO, and after lasting ones have ended": "all",
    "R7 hostile files and configs refused for what they hold": "all",
    "R7 planted code that ran": "0",
    "R8 from the command to the first new step": 15,
    "R9 goodput of the storm": ">= 0.90",
    "R9 max abs difference after the storm": "0",
    "R9 max abs difference after two lost nodes": "0",
    "R10 changed settings refused": "all",
}


class Job:
    """Runs of one config, each in a process of its own, forked to save the seconds of importing torch."""

    def __init__(self, results: Path, name: str, *overrides: str):
        self.folder = results / name
        places = [f"data.path={results / 'mnist'}", f"results_dir={results}", f"run_name={name}"]
        self.overrides = [*SMALL, *places, *overrides]
        self.executed = 0  # steps, including repeated ones
        self.log = results / f"{name}.txt"

    def start(self) -> int:
        """Process id."""
        self.started_at, self.started_ns = self.last_saved(), time.time_ns()
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            with cli.user_errors():
                code = train.train(parse(Settings, cli.load_config("config", self.overrides)))
        except SystemExit as leaving:
            code = leaving.code
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait(self, process: int) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        self.executed += max(0, self.last_logged() - self.started_at)
        return code

    def run(self) -> int:
        return self.wait(self.start())

    def last_logged(self) -> int:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return max([json.loads(line)["step"] for line in lines if line.endswith("\n")], default=0)

    def reached(self) -> int:
        """The last step that the present process has logged; 0 before its first."""
        path = self.folder / "metrics.jsonl"
        fresh = path.exists() and path.stat().st_mtime_ns > self.started_ns
        return self.last_logged() if fresh and self.last_logged() > self.started_at else 0

    def last_saved(self) -> int:
        found = complete_checkpoints(self.folder)
        return step_of(found[-1]) if found else 0


def wait_until(condition: Callable[[], bool], process: int, seconds: float = 120) -> bool:
    """Polls; False where the process ended first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {process} did nothing for {seconds} s")
        time.sleep(0.0005)
    return True


def max_difference(a: Job, b: Job) -> float:
    """Over weights, EMA and optimizer state; infinite where the logs differ."""
    if numbers(a.folder) != numbers(b.folder):
        return float("inf")
    worst = 0.0
    for name in COMPARED:
        x, y = (read_tensors(latest_checkpoint(job.folder) / name) for job in (a, b))
        worst = max([worst, *((x[key] - y[key]).abs().max().item() for key in x)])
    return worst


def kill_somewhere(job: Job, process: int, rng: random.Random, inside_save: bool) -> bool:
    """SIGKILL at a random moment of the next few steps, or of a save. False where the process ended first."""
    if inside_save:
        saves = job.folder / "checkpoints"
        hit = wait_until(lambda: saves.exists() and any(saves.glob(".tmp_*")), process)
        time.sleep(rng.uniform(0, 0.01))
    else:
        goal = job.last_saved() + rng.randint(1, 3 * SAVE_EVERY)
        hit = wait_until(lambda: job.reached() >= goal, process)
        time.sleep(rng.uniform(0, 0.03))
    if hit:
        os.kill(process, signal.SIGKILL)
    return hit


def kills(results: Path, count: int, rng: random.Random) -> Rows:
    """R1, R2: `count` SIGKILLs, half of them inside a save."""
    steps = 4 * count
    golden = Job(results, "golden_kills", f"train.max_steps={steps}")
    assert golden.run() == 0, golden.log.read_text()
    job = Job(results, "killed", f"train.max_steps={steps}")
    killed = in_save = torn = lost = 0
    while killed < count:
        inside = in_save * 2 < killed + 1
        process = job.start()
        hit = kill_somewhere(job, process, rng, inside)
        code = job.wait(process)
        if not hit:
            assert code == 0, job.log.read_text()[-2000:]
            shutil.rmtree(job.folder)  # it finished before the kill: start over
            continue
        killed, in_save = killed + 1, in_save + inside
        lost = max(lost, job.last_logged() - job.last_saved())
        for path in complete_checkpoints(job.folder):
            try:
                verify_checkpoint(path)
            except UserError:
                torn += 1
    code = job.run()
    difference = max_difference(golden, job)
    yield "R1 SIGKILLs survived", f"{killed if code == 0 else 0} of {count}, {in_save} inside a save", code == 0
    yield "R1 torn checkpoints accepted", str(torn), torn == 0
    yield "R1 steps lost, at most", str(lost), lost <= SAVE_EVERY
    yield "R2 max abs difference to the golden run", f"{difference:g}", difference == 0


def signals(results: Path, count: int, rng: random.Random) -> Rows:
    """R3, R8: SIGTERM, SIGUSR1 and SIGINT in turn."""
    job, lost, slowest, ok = Job(results, "signals", "train.max_steps=100000"), 0, 0.0, 0
    for i in range(count):
        process = job.start()
        goal = job.last_saved() + rng.randint(1, 8)
        wait_until(lambda: job.reached() >= goal, process)
        sent = time.monotonic()
        os.kill(process, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[i % 3])
        ok += job.wait(process) == EXIT_START_AGAIN
        slowest = max(slowest, time.monotonic() - sent)
        lost = max(lost, job.last_logged() - job.last_saved())
    yield "R3 signals answered by a save and exit code 75", f"{ok} of {count}", ok == count
    yield "R3 steps lost, at most", str(lost), lost == 0
    yield "R3 from the signal to the exit, at most", slowest, True
    yield "R8 from the command to the first new step", recovery_seconds(job), True


def recovery_seconds(job: Job) -> float:
    """Seconds until a new interpreter has resumed a run."""
    job.started_at, job.started_ns, started = job.last_saved(), time.time_ns(), time.monotonic()
    launched = subprocess.Popen([sys.executable, "train.py", *job.overrides], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_until(lambda: job.reached() > 0, launched.pid)
    seconds = time.monotonic() - started
    launched.terminate()
    launched.wait()
    return seconds


def storm(results: Path, steps: int, rng: random.Random) -> Rows:
    """R9: a fault about every 50 steps (kills, signals, a damaged newest checkpoint), against an undisturbed run."""
    golden = Job(results, "golden_storm", f"train.max_steps={steps}")
    assert golden.run() == 0, golden.log.read_text()
    job, faults = Job(results, "storm", f"train.max_steps={steps}"), 0
    while True:
        process = job.start()
        goal = job.last_saved() + rng.randint(40, 60)
        kind = rng.choice(("kill", "kill in save", "SIGTERM", "SIGUSR1", "damage"))
        if wait_until(lambda: job.reached() >= goal, process):
            faults += 1
            if kind == "kill in save":
                kill_somewhere(job, process, rng, inside_save=True)
            else:
                os.kill(process, getattr(signal, kind, signal.SIGKILL))
        code = job.wait(process)
        if code == 0:
            break
        if kind == "damage":
            file = rng.choice(list(complete_checkpoints(job.folder)[-1].iterdir()))
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    goodput, difference = steps / job.executed, max_difference(golden, job)
    yield "R9 goodput of the storm", f"{goodput:.3f}, {faults} faults in {steps:,} steps", goodput >= 0.9
    yield "R9 max abs difference after the storm", f"{difference:g}", difference == 0


def processes(results: Path) -> Rows:
    """R4: a dead and a hung process of two."""
    for number, what, timeout in ((signal.SIGKILL, "dead", 600), (signal.SIGSTOP, "hung", 10)):
        job, launched = launch(results, what, "", "train.max_steps=1000000", f"train.timeout_s={timeout}")
        wait_until(lambda: job.last_logged() >= 5, launched.pid)
        workers = children(launched.pid)
        victim = next(child for child in workers if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes())
        os.kill(victim, number)
        sent = time.monotonic()
        telling = ("not answering: [1]", "rank      : 1")
        named = next((line for line in launched.stderr if any(text in line for text in telling)), None)
        seconds = time.monotonic() - sent
        if number == signal.SIGSTOP:
            os.kill(victim, signal.SIGKILL)
        launched.communicate()
        yield f"R4 a {what} process of two is named after", seconds if named else None, launched.returncode != 0


def launch(results: Path, name: str, change: str, *overrides: str) -> tuple[Job, subprocess.Popen]:
    """Starts a `changed` train.py on two processes, by torchrun."""
    job, (_, *command) = changed(results, name, change, *overrides)
    heard = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return job, subprocess.Popen([*TORCHRUN, *command], cwd=ROOT, **heard)


def changed(results: Path, name: str, change: str, *overrides: str) -> tuple[Job, list[str]]:
    """A job, and the command of train.py with something changed in it by `change`."""
    job, program = Job(results, name, *overrides), results / f"{name}.py"
    program.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport train\nfrom system import cli\n{change}\n"
        "with cli.user_errors():\n    settings = train.parse(train.Settings, cli.load_config('config', sys.argv[1:]))\n"
        "    code = train.train(settings)\nsys.exit(code)\n"
    )
    return job, [sys.executable, str(program), *job.overrides]


def one_of_two(results: Path) -> Rows:
    """R3, R4: what only one process meets, and the launcher's SIGTERM on a disk that takes seconds for a save."""
    change = (
        "from checkpoints.load import Run\npredict = Run.predict\ndef fail(self, *arguments):\n"
        "    if os.environ['RANK'] == '1':\n        raise RuntimeError('made to fail')\n"
        "    return predict(self, *arguments)\nRun.predict = fail"
    )
    keys = (f"eval.digits={results / 'mnist'}", "eval.seeds=0-49", "eval.steps=2", "eval.every=4")
    assert Job(results, "evaluation", "train.max_steps=4").run() == 0
    job, command = changed(results, "evaluation", change, "train.max_steps=8", *keys)  # a resume evaluates first
    done = started.run(command, processes=2)
    lines = ("evaluation failed on process 1: Traceback", "RuntimeError: made to fail")
    told = min(done.stderr.count(text) for text in lines)
    good = told == 2 and done.returncode == 0 and job.last_saved() == 8
    yield "R4 evaluations that fail on one of two: told, trained on", f"{told} of 2", good

    seen = Job(results, "there", "train.max_steps=10")
    assert seen.run() == 0, seen.log.read_text()
    (results / "other").mkdir()
    shutil.copytree(seen.folder, results / "other" / "there")
    shutil.rmtree(results / "other" / "there" / "checkpoints" / "step_0000010")
    change = f"sys.argv += [f'results_dir={results / 'other'}'] * (os.environ['RANK'] == '1')"
    said = started.run(changed(results, "there", change, "train.max_steps=20")[1], processes=2).stderr
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    good = len(lines) == 1 and "step_0000010, process 1 has step_0000005" in lines[0] and seen.last_saved() == 10
    yield "R4 two processes with different newest checkpoints", f"{len(lines)} line", good

    slow = "fsync = os.fsync\ndef slow(descriptor):\n    time.sleep(2)\n    fsync(descriptor)\nos.fsync = slow"
    job, launched = launch(results, "slow", slow, "train.max_steps=100000", "train.save_every=0")
    wait_until(lambda: job.last_logged() >= 5, launched.pid)
    launched.terminate()
    sent = time.monotonic()
    launched.communicate()
    lost = job.last_logged() - job.last_saved()
    yield "R3 the launcher's SIGTERM on a slow disk: steps lost", str(lost), lost == 0
    yield "R3 the launcher's SIGTERM on a slow disk: to the exit", time.monotonic() - sent, True


def going_back(results: Path) -> Rows:
    """R2: resume= an older checkpoint, a SIGTERM, and the same command again, on a file system without locks."""
    golden = Job(results, "forth", "train.max_steps=30", "train.keep_last=20")
    assert golden.run() == 0, golden.log.read_text()
    back = f"resume={golden.folder}/checkpoints/step_0000010"
    job = Job(results, "forth", "train.max_steps=1000", "train.keep_last=2", back)
    process = job.start()
    wait_until(lambda: job.reached() >= 12 and not (job.folder / "checkpoints" / "step_0000030").exists(), process)
    os.kill(process, signal.SIGTERM)
    stopped = job.wait(process) == EXIT_START_AGAIN
    at, lost = job.last_saved(), job.last_logged() - job.last_saved()
    flock = fcntl.flock

    def unsupported(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = unsupported
    again = Job(results, "forth", f"train.max_steps={at + 5}", "train.keep_last=2", back).run() == 0
    fcntl.flock = flock
    first = min(step for step in (line["step"] for line in numbers(job.folder)) if step > at)
    kept = max(step_of(path) for path in (golden.folder / "checkpoints").glob("abandoned_*/step_*"))
    good = stopped and lost == 0 and first == at + 1 and kept == 30
    yield "R2 going back to an older checkpoint: steps lost, later ones kept", f"{lost}, {kept}", good
    good = again and "has no locks" in job.log.read_text()
    yield "R1 a file system without locks", "trained, with a warning" if good else "not trained, or no warning", good


def lost_nodes(results: Path) -> Rows:
    """R4, R9: two nodes of two processes each, of which one is killed, and one answers nothing until the other is gone.

    The same commands bring the run back.
    """
    jobs = {name: Job(results, name, "train.max_steps=60", "train.timeout_s=10") for name in ("nodes", "lost_node")}
    assert [node.wait() for node in start_nodes(jobs["nodes"])] == [0, 0]
    job = jobs["lost_node"]
    for what, number, step in (("dead", signal.SIGKILL, 12), ("hung", signal.SIGSTOP, 30)):
        left, lost = start_nodes(job)
        wait_until(lambda: job.last_logged() >= step, left.pid)
        members = [*children(lost.pid), lost.pid]
        for process in members:
            os.kill(process, number)
        started = time.monotonic()
        ended, seconds = left.wait() != 0, time.monotonic() - started
        for process in members if number == signal.SIGSTOP else ():
            os.kill(process, signal.SIGCONT)  # the network is back; the job has gone
        yield f"R4 a {what} node of two: the other one ends after", seconds, ended and lost.wait() != 0
        for path in complete_checkpoints(job.folder):
            verify_checkpoint(path)
    back = [node.wait() for node in start_nodes(job)] == [0, 0]
    difference = max_difference(jobs["nodes"], job) if back else float("inf")
    yield "R9 max abs difference after two lost nodes", f"{difference:g}", difference == 0


def start_nodes(job: Job) -> list[subprocess.Popen]:
    """The job on two nodes, which meet on this machine's loopback address."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "2"]
    torchrun += ["--master_addr", "127.0.0.1", "--master_port", str(started.free_port()), "--node_rank"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [subprocess.Popen([*torchrun, rank, "train.py", *job.overrides], cwd=ROOT, **quiet) for rank in "01"]


def children(process: int) -> list[int]:
    listing = ["ps", "-o", "pid=", "--ppid", str(process)]
    return [int(child) for child in subprocess.run(listing, capture_output=True, text=True).stdout.split()]


def read_errors(results: Path) -> Rows:
    """R6: reads that fail while shards are indexed, once and for as long as it lasts, are not kept as damage."""
    folder = shutil.copytree(results / "mnist", results / "unreadable")
    total, found = len(data.open_latents(folder)), []
    with failing_reads() as fail:
        for times in (1, 10**9, 0):
            for index in folder.glob(".*.index.npz") if times else ():
                index.unlink()
            fail("train-000000.tar", times)
            with contextlib.suppress(UserError):
                found.append(len(data.open_latents(folder)))
    good = found == [total, total]
    yield "R6 samples after one EIO, and after lasting ones have ended", f"{found} of {total}", good


def bad_numbers(results: Path) -> Rows:
    """R5: from step 10 on one gradient is infinite; is anything saved after it?"""
    job = Job(results, "infinite", "train.max_steps=40", "train.log_every=7")
    step = train.train_step

    def poisoned(settings, loaded, state, batches):
        if state.step == 10:
            list(state.model.parameters())[-1].register_hook(lambda grad: grad * torch.inf)
        return step(settings, loaded, state, batches)

    train.train_step = poisoned
    code = job.run()
    train.train_step = step
    saved = sum(step_of(path) >= 10 for path in complete_checkpoints(job.folder))
    good = saved == 0 and code == EXIT_NOT_FINITE
    yield "R5 checkpoints from the first bad value on", f"{saved}, exit code {code}", good


def damaged_shards(results: Path, count: int, rng: random.Random) -> Rows:
    """R6: a shard cut at random offsets, and single bits flipped in its latents."""
    folder, found = results / "damaged", 0
    for i in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(results / "mnist", folder)
        shard = sorted(folder.glob("train-*.tar"))[0]
        content = bytearray(shard.read_bytes())
        if i % 2:
            del content[rng.randrange(512, len(content) - 10240) :]
        else:
            content[rng.randrange(512, len(content) - 10240)] ^= 1 << rng.randrange(8)
        shard.write_bytes(content)
        try:
            latents = data.open_latents(folder)
            for start in range(0, len(latents), 500):
                latents.read(range(start, min(start + 500, len(latents))))
        except UserError:
            found += 1
    yield "R6 damaged shards detected", f"{found} of {count}", found == count


def planted_code(results: Path) -> Rows:
    """R7: code instead of weights, images, references, latents and settings, given to all that opens such files."""
    sung, folder = results / "canary", results / "planted"
    folder.mkdir()
    canary = Canary(sung)
    payload, objects = pickle.dumps(canary), np.array([canary], dtype=object)
    (folder / "bare.pt").write_bytes(payload)
    torch.save({"model": canary}, folder / "archive.pt")
    (folder / "weights.safetensors").write_bytes(payload)
    np.savez(folder / "arrays.npz", arr_0=objects, mu=objects, sigma=objects)
    np.save(folder / "one.latent.npy", objects)
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        tar.add(folder / "one.latent.npy", "one.latent.npy")
        (folder / "one.cls").write_text("0")
        tar.add(folder / "one.cls", "one.cls")
    offers = [  # what opens a file, and a word of the line that refuses what it holds
        (partial(sample.load_run, folder / "bare.pt"), "not a file of weights"),
        (partial(sample.load_run, folder / "archive.pt"), "needs code to load"),
        (partial(sample.load_run, folder / "weights.safetensors"), "not a safetensors file"),
        (partial(open_images, folder / "arrays.npz"), "pickled objects"),
        (partial(read_reference, folder / "arrays.npz"), "pickled objects"),
        (lambda: data.open_latents(folder).read([0]), "pickled objects"),
    ]
    for section in ("model", "objective", "data.codec"):
        run = make_run(folder / section, SMALL)
        plant(latest_checkpoint(run), section, {"_target_": "os.mkdir", "path": str(sung)})
        offers.append((partial(sample.load_run, run), "os.mkdir"))
    refused = 0
    for offer, word in offers:
        try:
            offer()
        except Exception as error:  # whatever planted code raises when it has run: only the refusal counts
            refused += isinstance(error, UserError) and word in str(error)
    yield (
        "R7 hostile files and configs refused for what they hold",
        f"{refused} of {len(offers)}",
        refused == len(offers),
    )
    yield "R7 planted code that ran", str(int(sung.exists())), not sung.exists()


def plant(checkpoint: Path, section: str, hostile: dict) -> None:
    """Puts a class into a checkpoint's config, and the config's new hash into its manifest: nothing else is wrong."""
    path, manifest = checkpoint / "config.yaml", json.loads((checkpoint / "manifest.json").read_text())
    config = yaml.safe_load(path.read_text())
    *parents, last = section.split(".")
    functools.reduce(dict.__getitem__, parents, config)[last] = hostile
    path.write_text(yaml.safe_dump(config))
    manifest["files"][path.name] |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    verify_checkpoint(checkpoint)


def mismatches(results: Path) -> Rows:
    """R10: one setting at a time is changed between a run and its continuation."""
    changes = (
        "model.depth=7", "model.hidden_size=64", "model.routes=[]", "objective=rf", "objective.P_std=1",
        "optimizer.weight_decay=0.1", "optimizer.betas=[0.9,0.95]", "seed=1", "train.lr=1e-3",
        "train.global_batch_size=32", "train.precision=bf16", "train.ema_decay=0.99", "train.label_dropout=0.2",
        "train.warmup_steps=7", "train.grad_clip=2", "train.compile=blocks", "train.decay_steps=5",
    )  # fmt: skip
    assert Job(results, "mismatch", "train.max_steps=5").run() == 0
    refused = sum(Job(results, "mismatch", "train.max_steps=10", change).run() == 2 for change in changes)
    yield "R10 changed settings refused", f"{refused} of {len(changes)}", refused == len(changes)


def faults(results: Path, quick: bool, rng: random.Random) -> Rows:
    """Every row of ROWS; quick: fewer faults, and none of lost nodes."""
    yield from kills(results, 10 if quick else 200, rng)
    yield from signals(results, 6 if quick else 20, rng)
    yield from processes(results)
    yield from one_of_two(results)
    yield from () if quick else lost_nodes(results)
    yield from going_back(results)
    yield from planted_code(results)
    yield from bad_numbers(results)
    yield from damaged_shards(results, 6 if quick else 50, rng)
    yield from read_errors(results)
    yield from storm(results, 150 if quick else 2000, rng)
    yield from mismatches(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 kills and a storm of 150 steps; times are not judged")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quick, started = arguments.quick, time.monotonic()
    shown, missed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        data.prepare("mnist", Path(folder) / "mnist")
        for what, found, good in faults(Path(folder), quick, random.Random(arguments.seed)):
            needed, seconds = ROWS[what], not isinstance(found, str)
            good = good and (not seconds or found is not None and (quick or found <= needed))
            missed += [] if good else [what]
            found = found if not seconds else "never" if found is None else f"{found:.1f} s"
            shown[what] = f"| {what} | {found} | {f'<= {needed} s' if seconds else needed} |"
            print(f"{time.monotonic() - started:4.0f} s  {what}: {found}", file=sys.stderr, flush=True)
    print("\n".join(["| | found | needed |", "|---|---|---|", *(shown[what] for what in ROWS if what in shown)]))
    print(f"\n{time.monotonic() - started:.0f} s; missed: {', '.join(missed) or 'nothing'}")
    sys.exit(bool(missed) or not quick and shown.keys() != ROWS.keys())


if __name__ == "__main__":
    main()
