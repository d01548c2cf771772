"""Stopping early without losing a step: SIGTERM, SIGUSR1 (SLURM), SIGINT, SIGHUP and max_hours.

A signal to any process becomes "stop after step n", with the same n on every process: the first to see the signal
writes n into the process group's key-value store, and all look it up after each step. This needs no collective. Until
the first step is over, which compiles, there is nothing to save, and a signal ends a process that is alone.
"""

import os
import signal
import time
from collections import deque

import torch
from accelerate import PartialState

from system.processes import OtherProcessFailed, Preempted, other_process_failed, several, store

EXIT_START_AGAIN = 75  # stopped and saved; the same command continues (EX_TEMPFAIL)
EXIT_NOT_FINITE = 3  # a gradient was not finite; the last checkpoint is from before it
EXIT_NOW = 130  # a second SIGINT
KEY = "tread_stop_after_step"
POLL_S = 0.2  # seconds between two looks into the store


class Interrupted(BaseException):
    """A signal to a lone process before its first step was over. No Exception: compilers would make another of it."""


class PreemptionHandler:
    """Turns signals and the time limit into an agreed last step. `close` restores the signal handlers.

    Raises Interrupted, wherever a lone process is, for signals before `stops_after` is first asked.
    """

    def __init__(self, dist: PartialState, max_hours: float | None = None):
        self.dist, self.reason, self.announced = dist, None, False
        self.deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
        self.interrupted = None  # time of the first SIGINT
        self.starting = True
        self.alone = False  # the launcher is gone, and nothing can be agreed on any more
        # The hosts of several GPUs may run ahead of one another, but never by more steps than this.
        self.ahead = 2 if dist.device.type == "cuda" else 0
        self.events: deque = deque()
        self.store = store() if several() else None
        self.step, self.polled = 0, 0.0  # the last step that is over, and when `poll` last looked
        numbers = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup; under SLURM SIGUSR1 is, too
            numbers.discard(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.handle) for number in numbers}

    def handle(self, number: int, frame) -> None:
        now = time.monotonic()
        # Launchers forward a terminal's Ctrl-C, so the same one may arrive twice within a moment.
        if number == signal.SIGINT:
            self.interrupted = self.interrupted or now
            if now - self.interrupted > 1:
                os._exit(EXIT_NOW)
        self.reason = self.reason or signal.Signals(number).name
        if self.starting and self.store is None:  # several processes agree on a step first
            self.starting = False  # a second signal does not interrupt what the first one has begun
            raise Interrupted

    def stops_after(self, step: int) -> bool:
        """As `should_stop`; where the launcher is gone, and with it the store that it held, True on process 0 alone."""
        try:
            return self.should_stop(step)
        except RuntimeError:
            self.alone = True
            self.reason = self.reason or "the end of the launcher"
            return self.dist.is_main_process

    def should_stop(self, step: int) -> bool:
        """After step `step`, on every process: True on all of them after the same step."""
        self.step, self.starting = step, False
        if self.dist.device.type == "cuda":  # waits for the step before the last: the host stays close to its GPU
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > self.ahead:
                self.events.popleft().synchronize()
        self.look()
        if self.store is None:
            return self.reason is not None
        if not self.store.check([KEY]):
            return False
        last_step, self.reason = self.store.get(KEY).decode().split()
        return step >= int(last_step)

    def poll(self) -> None:
        """Between steps: raises Preempted where any process is asked to stop, OtherProcessFailed where the same work
        has failed on another one. Cheap enough for every network call."""
        now = time.monotonic()
        if self.reason is None and now < self.polled + POLL_S:
            return
        self.polled = now
        self.look()
        if self.store is not None and self.reason is None and self.store.check([KEY]):
            self.reason = self.store.get(KEY).decode().split()[1]
        if self.reason is not None:
            raise Preempted(self.reason)
        if other_process_failed():
            raise OtherProcessFailed("another process failed")

    def look(self) -> None:
        """Notices the time limit, and tells the other processes what this one has noticed."""
        if self.deadline is not None and self.dist.is_main_process and time.monotonic() > self.deadline:
            self.reason = self.reason or "max_hours"
        if self.store is not None and self.reason is not None and not self.announced:
            # Nobody is past step + 1 + ahead, because that step needs this process too.
            self.store.compare_set(KEY, "", f"{self.step + 1 + self.ahead} {self.reason}")
            self.announced = True

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.store is not None and self.dist.is_main_process and not self.alone:
            self.store.delete_key(KEY)
