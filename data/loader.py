"""Batches for each process, the same global batches for any number of processes and workers: `make_loader`.

Which sample comes when is a pure function of (seed, position), so that training can start at any step. Epochs are laid
end to end into one endless stream, each of them every sample once; global batch s is positions s * G .. s * G + G - 1
of it. A batch may straddle two epochs, so no remainder is ever dropped.

Within an epoch, the samples are cut into runs of RUN neighbours on disk, the runs are shuffled, and the samples are
shuffled within windows of WINDOW. A window is made of runs from all over the set, so batches are well mixed even if
the shards are sorted by class, while the disk can be read in whole runs, a window ahead.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from conditions import Condition, save
from data.latents import Latents
from randomness import BatchSlice, seeded_generator, uniform
from system import UserError

RUN = 32  # samples
WINDOW = 32768  # samples; a set no larger than this is shuffled as a whole
SHARED = "/dev/shm"  # where loader processes put their batches
ROOM_S = 60  # that a loader process waits there for room


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is divided: global_batch_size = world_size * micro_batch_size * accumulation.

    Micro-batch m of rank r begins at row (m * world_size + r) * micro_batch_size. Raises UserError for other sizes.
    """

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    rank: int
    world_size: int

    def __post_init__(self):
        if self.global_batch_size != self.micro_batch_size * self.accumulation * self.world_size:
            found = f"{self.micro_batch_size} x {self.accumulation} accumulated x {self.world_size} processes"
            raise UserError(f"global_batch_size={self.global_batch_size} is not micro_batch_size={found}")

    def slice(self, generator: torch.Generator, micro: int) -> BatchSlice:
        """This rank's rows of micro-batch `micro`, in draws by `generator` for the global batch."""
        start = (micro * self.world_size + self.rank) * self.micro_batch_size
        return BatchSlice(generator, start, self.global_batch_size)


def make_loader(
    latents: Latents, plan: BatchPlan, *, seed: int = 0, start_step: int = 0, num_steps: int, num_workers: int = 0,
    pin_memory: bool = False,
) -> "Loader":  # fmt: skip
    """Micro-batches (raw (micro, *stored_shape), condition) of this rank for steps start_step..num_steps-1, in order;
    and with a teacher's features, where the latents have a feature_shape.

    (num_steps - start_step) * plan.accumulation of them; together, those of all ranks are the global batches.
    """
    # Each of many machines uses few samples of a run of neighbours: it reads those, and no whole runs ahead.
    machines = plan.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", plan.world_size))
    return Loader(
        MicroBatches(latents, Order(len(latents), seed), plan, read_ahead=machines <= 2),
        batch_size=None,  # the data set makes whole batches
        sampler=range(start_step * plan.accumulation, num_steps * plan.accumulation),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # for worker seeds, which are unused: the global stream is not advanced
    )


def ignore_signals(worker: int) -> None:
    """In a loader process: the process that trains answers those to a whole job, and needs batches until then."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


class Order:
    """Sample indices at stream positions, for a set of `num_samples` and a seed."""

    def __init__(self, num_samples: int, seed: int):
        assert num_samples > 0
        self.num_samples, self.seed = num_samples, seed
        # Positions ascend: this window and the next suffice, and the last one for a batch that straddles two.
        self._runs = lru_cache(maxsize=3)(self._shuffle_runs)
        self.window = lru_cache(maxsize=3)(self._shuffle_window)

    def __reduce__(self) -> tuple:
        return Order, (self.num_samples, self.seed)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """positions (B,) int64 in the stream -> sample indices (B,) int64."""
        epochs, places = np.divmod(positions, self.num_samples)
        windows, places = np.divmod(places, WINDOW)
        indices = np.empty_like(positions)
        for epoch, window in sorted(set(zip(epochs.tolist(), windows.tolist()))):
            here = (epochs == epoch) & (windows == window)
            indices[here] = self.window(epoch, window)[places[here]]
        return indices

    def windows_from(self, position: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(epoch, window) of a position in the stream, and the next one; `window` gives the samples of each."""
        epoch, place = divmod(position, self.num_samples)
        window, last = place // WINDOW, (self.num_samples - 1) // WINDOW
        return (epoch, window), ((epoch, window + 1) if window < last else (epoch + 1, 0))

    def _shuffle_runs(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(first sample of each run, position at which each run ends), runs in their shuffled order."""
        generator = seeded_generator("runs", self.seed, epoch)
        # The cuts move from epoch to epoch, so that neighbours do not stay together.
        first_cut = int(torch.randint(1, RUN + 1, (), generator=generator))
        edges = np.r_[0, np.arange(first_cut, self.num_samples, RUN), self.num_samples]
        runs = torch.randperm(len(edges) - 1, generator=generator).numpy()
        return edges[runs], np.cumsum(np.diff(edges)[runs])

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        """The samples of a window in their final order."""
        firsts, ends = self._runs(epoch)
        places = np.arange(window * WINDOW, min((window + 1) * WINDOW, self.num_samples))
        runs = np.searchsorted(ends, places, side="right")
        indices = firsts[runs] + places - np.r_[0, ends][runs]
        generator = seeded_generator("window", self.seed, epoch, window)
        return indices[torch.randperm(len(indices), generator=generator).numpy()]


class MicroBatches(Dataset):
    """Micro-batch i of one rank, counted from step 0; damage is returned as a UserError, to be raised later."""

    def __init__(self, latents: Latents, order: Order, plan: BatchPlan, read_ahead: bool):
        self.latents, self.order, self.plan, self.read_ahead = latents, order, plan, read_ahead
        self._requested: tuple = ()  # windows that the system was asked to read ahead

    def __getitem__(self, i: int) -> tuple[torch.Tensor, Condition, list[str]] | UserError:
        start = (i * self.plan.world_size + self.plan.rank) * self.plan.micro_batch_size
        # Micro-batches of all ranks, one after another.
        positions = np.arange(start, start + self.plan.micro_batch_size)
        if self.read_ahead:
            windows = self.order.windows_from(start)
            for window in set(windows).difference(self._requested):
                self.latents.will_need(self.order.window(*window))
            self._requested = windows
        faults: list[str] = []
        draws = None
        if self.latents.text_count > 1:  # a text of each sample, for the whole global batch as all draws are
            step, micro = divmod(i, self.plan.accumulation)
            rows = self.plan.slice(seeded_generator("captions", self.order.seed, step), micro)
            draws = uniform((self.plan.micro_batch_size,), rows).tolist()
        try:
            raw, condition, *features = self.latents.read(self.order(positions), faults, draws)
            if (worker := get_worker_info()) is not None:
                parts = (raw, *save(condition).values(), *features)
                wait_for_room(worker.num_workers * sum(part.nbytes for part in parts))
            return raw, condition, *features, faults
        except UserError as error:
            return error  # raised in a worker, it would arrive with its traceback in its message


def wait_for_room(needed: int) -> None:
    """Returns when so many bytes of shared memory are free: torch loses a batch that finds none, and waits for ever.

    Raises UserError where there is less altogether, or none in ROOM_S.
    """
    until = time.monotonic() + ROOM_S
    while os.path.isdir(SHARED) and (room := shutil.disk_usage(SHARED)).free < needed:
        if room.total < needed or time.monotonic() > until:
            found = f"{SHARED} has {room.free / 1e6:.3g} of {room.total / 1e6:.3g} MB free"
            found = f"{found}, and batches of the loader processes take {needed / 1e6:.3g} MB"
            raise UserError(f"{found}; needed: data.num_workers=0, or more (docker run --shm-size=1g)")
        time.sleep(0.1)


class Loader(DataLoader):
    """Faults are reported here, in the process that logs."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Condition]]:
        """Raises UserError for damage, and for a killed loader process."""
        batches = super().__iter__()
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                *batch, faults = batch
                self.dataset.latents.report(faults)
                yield tuple(batch)
        except (EOFError, ConnectionError, RuntimeError) as error:
            if died := loader_died(error, self.num_workers):
                raise died from error
            raise
        finally:
            del batches  # ends the loader processes here, and not when the traceback is freed


def loader_died(error: Exception, num_workers: int) -> UserError | None:
    """What to say of a killed loader process, which shows in many ways: also by a RuntimeError wherever torch's handler
    of SIGCHLD meets the main thread. None for other errors."""
    if not isinstance(error, (EOFError, ConnectionError)) and "DataLoader worker (pid" not in str(error):
        return None
    found = f"a loader process died ({error or type(error).__name__}), often for want of memory"
    return UserError(f"{found}; needed: a smaller data.num_workers than {num_workers}, or the same command again")
