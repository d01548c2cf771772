"""Stopping early without losing a step: SIGTERM, SIGUSR1 (SLURM), SIGINT and max_hours.

A signal to any process becomes "stop after step n", with the same n on every process: the first to see the signal
writes n into the process group's key-value store, and all look it up after each step. This needs no collective, and no
wait for the device.
"""

import os
import signal
import time
from collections import deque

import torch
from accelerate import PartialState

EXIT_START_AGAIN = 75  # stopped and saved; the same command continues (EX_TEMPFAIL)
EXIT_NOT_FINITE = 3  # a gradient was not finite; the last checkpoint is from before it
EXIT_NOW = 130  # a second SIGINT
START_AGAIN = "start_again"  # the file in the run folder that says the same, until the command is given again
KEY = "tread_stop_after_step"


class PreemptionHandler:
    """Turns signals and the time limit into an agreed last step. `close` restores the signal handlers."""

    def __init__(self, dist: PartialState, max_hours: float | None = None):
        self.dist, self.reason, self.announced = dist, None, False
        self.deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
        self.interrupted = None  # time of the first SIGINT
        self.alone = False  # the launcher is gone, and nothing can be agreed on any more
        # The hosts of several GPUs may run ahead of one another, but never by more steps than this.
        self.ahead = 2 if dist.device.type == "cuda" else 0
        self.events: deque = deque()
        self.store = torch.distributed.distributed_c10d._get_default_store() if dist.num_processes > 1 else None
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self.before = {number: signal.signal(number, self.handle) for number in numbers}

    def handle(self, number: int, frame) -> None:
        now = time.monotonic()
        # Launchers forward a terminal's Ctrl-C, so the same one may arrive twice within a moment.
        if number == signal.SIGINT and self.interrupted is not None and now - self.interrupted > 1:
            os._exit(EXIT_NOW)
        if number == signal.SIGINT and self.interrupted is None:
            self.interrupted = now
        self.reason = self.reason or signal.Signals(number).name

    def stops_after(self, step: int) -> bool:
        """`should_stop`; where the launcher is gone, and with it the store that it held, on process 0 alone.

        Process 0 saves what its step left, which is what all have. The others' next exchange of gradients fails.
        """
        try:
            return self.should_stop(step)
        except RuntimeError:
            self.alone = True
            self.reason = self.reason or "the end of the launcher"
            return self.dist.is_main_process

    def should_stop(self, step: int) -> bool:
        """After step `step`, on every process: True on all of them after the same step."""
        self.limit_lead()
        if self.deadline is not None and self.dist.is_main_process and time.monotonic() > self.deadline:
            self.reason = self.reason or "max_hours"
        if self.store is None:
            return self.reason is not None
        if self.reason is not None and not self.announced:
            # Nobody is past step + 1 + ahead, because that step needs this process too.
            self.store.compare_set(KEY, "", f"{step + 1 + self.ahead} {self.reason}")
            self.announced = True
        if not self.store.check([KEY]):
            return False
        last_step, self.reason = self.store.get(KEY).decode().split()
        return step >= int(last_step)

    def limit_lead(self) -> None:
        """Waits for the step before the last, so that the host stays close to its GPU, which never idles for it."""
        if self.dist.device.type == "cuda":
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > self.ahead:
                self.events.popleft().synchronize()

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.store is not None and self.dist.is_main_process and not self.alone:
            self.store.delete_key(KEY)


def roll_call(dist: PartialState, seconds: float = 3.0) -> list[int]:
    """After a failed collective: the ranks that do not answer."""
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set(f"tread_alive_{dist.process_index}", "yes")
    deadline = time.monotonic() + seconds
    missing = list(range(dist.num_processes))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"tread_alive_{rank}"])]
        time.sleep(0.1)
    return missing
