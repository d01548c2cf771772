"""The numbers of training: metrics.jsonl, the trackers that are asked for, and the terminal."""

import datetime
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tqdm import tqdm

from checkpoints.config import Settings
from checkpoints.curves import log_lines
from cost import mean_macs, training_flops
from system import UserError, cli, warn
from system.files import own
from system.precision import peak_tflops
from system.processes import OtherProcessFailed, Preempted, from_first
from training.prepare import TrainState
from training.trackers import TRACKERS, Values


class TimedBatches(Iterator):
    """The same batches; `waited` is the number of seconds spent waiting for them so far."""

    def __init__(self, batches: Iterator):
        self.batches, self.waited = batches, 0.0

    def __next__(self) -> tuple[torch.Tensor, ...]:
        started = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - started
        return batch


class Log:
    """Written by the main process; the others take part in the mean of the loss alone."""

    def __init__(
        self, settings: Settings, run_folder: Path, start_step: int, dist: PartialState, compiled: str = "off"
    ):
        self.settings, self.dist, self.path = settings.train, dist, run_folder / "metrics.jsonl"
        self.resumed_at, self.there = start_step, from_first(lambda: made_at(run_folder, start_step)).split()
        self.losses, self.steps = torch.zeros((), device=dist.device), 0  # since the last line
        self.started, self.paused, self.waited = clocks(), np.zeros(2), 0.0
        self.compiling, self.compile_s, self.pace = compiled == "blocks", 0.0, 0.0
        self.peak = peak_tflops(dist.device, settings.train.precision)
        self.skipped, self.unwritten, self.warned = 0.0, "", set()
        self.trackers = {}
        for name in TRACKERS.keys() & set(settings.log) if dist.is_main_process else ():
            with self.survive(name):
                self.trackers[name] = TRACKERS[name](settings, run_folder, start_step)
        self.bar = tqdm(
            total=settings.train.max_steps, initial=start_step, unit="step", dynamic_ncols=True,
            disable=not (dist.is_main_process and sys.stderr.isatty()),
        )  # fmt: skip

    def has(self, step: int, prefix: str) -> bool:
        """Whether the run had such values, or a preview, of this step when it was resumed, on all processes."""
        return step == self.resumed_at and any(name.startswith(prefix) for name in self.there)

    def say(self, text: str) -> None:
        if self.dist.is_main_process:
            self.bar.write(text)
            sys.stdout.flush()

    def add(self, loss: torch.Tensor) -> None:
        if self.compiling:
            self.compiling, self.compile_s = False, clocks()[0] - self.started[0]
            self.say(f"compiled   in {self.compile_s:.0f} s, with the first step")
        self.losses += loss
        self.steps += 1
        self.bar.update()

    def train(self, state: TrainState, grad_norm: torch.Tensor, waited: float, left_out: int) -> int:
        """One line on the steps since the last one -> the first non-finite step, where it ends the run, else 0.

        waited: seconds for data so far. left_out: this process's damaged samples. The device is waited for here only.
        """
        guard, lr = state.guard, state.optimizer.param_groups[0]["lr"]
        totals = torch.stack([self.losses, torch.full_like(self.losses, left_out)])
        if self.dist.num_processes > 1:
            torch.distributed.all_reduce(totals)
        totals[0] /= self.dist.num_processes
        host_seconds = clocks()[0] - self.started[0] - self.paused[0]
        loss, left_out = totals.tolist()  # here the host waits
        norm, skipped, first_bad = torch.stack([grad_norm, guard.count, guard.first]).tolist()
        seconds, cpu_seconds = (clocks() - self.started - self.paused).tolist()
        once = self.compile_s if self.steps > 1 else 0.0  # with the first step, which says nothing of those to come
        self.pace, self.compile_s = (seconds - once) / (self.steps - bool(once)), 0.0
        images_per_s = self.steps * self.settings.global_batch_size / seconds
        macs = mean_macs(state.model, self.settings, state.step - self.steps, state.step)
        tflops = training_flops(macs, images_per_s / self.dist.num_processes) / 1e12
        good_steps = self.steps - (skipped - self.skipped)
        values = {
            "train/loss": loss / good_steps if good_steps else None,
            "train/grad_norm": norm if math.isfinite(norm) else None,
            "train/lr": lr, "train/skipped": int(skipped), "data/left_out": int(left_out),
            "perf/step_s": seconds / self.steps, "perf/cpu_s": cpu_seconds / self.steps,
            "perf/img_per_s": images_per_s,
            "perf/data_wait": (waited - self.waited) / seconds,
            "perf/paused": self.paused[0] / (seconds + self.paused[0]), "perf/tflops": tflops,
        }  # fmt: skip
        if self.dist.device.type != "cpu":
            values["perf/host_s"] = host_seconds / self.steps
        if self.peak is not None:
            values["perf/mfu"] = tflops / self.peak
        self.write(state.step, values)
        self.bar.set_postfix(loss=values["train/loss"], refresh=False)
        self.losses.zero_()
        self.skipped, self.steps = skipped, 0
        self.started, self.paused, self.waited = clocks(), np.zeros(2), waited
        return int(first_bad) if skipped > (0 if guard.mode == "stop" else self.settings.max_skipped) else 0

    @contextmanager
    def survive(self, what: str, once: bool = False) -> Iterator[None]:
        """An exception inside becomes a warning, once or each time, but Preempted; a bug's comes with its traceback."""
        try:
            yield
        except Preempted:
            raise
        except Exception as error:
            if self.dist.is_main_process and not (once and what in self.warned):
                told = str(error) if isinstance(error, OtherProcessFailed) else ""
                warn(f"{what} failed" + (f" on {told}" if told else f": {type(error).__name__}: {cli.one_line(error)}"))
                if not isinstance(error, (OtherProcessFailed, UserError, OSError)):
                    traceback.print_exception(error)
            self.warned.add(what)

    def write(self, step: int, values: dict[str, float]) -> None:
        if not self.dist.is_main_process:
            return
        self.unwritten += json.dumps({"step": step, **values}) + "\n"
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", opener=own) as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError as error:  # kept, and written with the next line; what a full disk took of it goes
            with suppress(OSError):
                os.truncate(self.path, size)
            warn(f"{self.path}: {error.strerror}; training goes on")
        known = {name: value for name, value in values.items() if value is not None}
        self.track(step, known)
        shown = [f"{name.split('/')[1]} {value:.4g}" for name, value in known.items() if name.count("/") == 1]
        if "perf/step_s" in known:
            left = datetime.timedelta(seconds=round(self.pace * (self.settings.max_steps - step)))
            shown.append(f"eta {left}")
        self.say(f"step {step}/{self.settings.max_steps}  " + "  ".join(shown))

    def track(self, step: int, values: Values) -> None:
        for name, (log, _) in self.trackers.items():
            with self.survive(name, once=True):
                log(step, values)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside does not count as training time."""
        started = clocks()
        yield
        self.paused += clocks() - started

    def close(self, text: str) -> None:
        self.bar.close()
        self.say(text)
        for name, (_, finish) in self.trackers.items():
            with self.survive(name):
                finish()


def preview_path(run_folder: Path, step: int) -> Path:
    return run_folder / "samples" / f"step_{step:07d}.png"


def made_at(run_folder: Path, step: int) -> str:
    """The names of the values that a run's log has of a step, and "preview" where there is one."""
    lines = log_lines(run_folder / "metrics.jsonl")
    names = [name for _, _, values in lines if values and values["step"] == step for name in values]
    return " ".join(names + ["preview"] * preview_path(run_folder, step).is_file())


def clocks() -> np.ndarray:
    """Seconds that have passed, and seconds that this process has computed: less where it shares its cores."""
    return np.array([time.perf_counter(), time.process_time()])
