"""Batches for each process, the same global batches for any number of processes and workers: `make_loader`."""

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.latents import Latents
from data.order import Order


def make_loader(
    latents: Latents,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start_step: int = 0,
    num_steps: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> "Loader":
    """Micro-batches (raw (micro, *stored_shape), y (micro,)) of steps start_step..num_steps-1, in order.

    Global batch s is positions s*G..s*G+G-1 of the endless stream of shuffled epochs (order.py), micro-batch m of rank
    r is rows (m * world_size + r) * micro.. of it. Each rank gets (num_steps - start_step) * G / (micro * world_size).
    Raises ValueError where the global batch does not divide.
    """
    if global_batch_size % (micro_batch_size * world_size):
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of "
            f"micro_batch_size={micro_batch_size} x {world_size} processes"
        )
    accumulation = global_batch_size // (micro_batch_size * world_size)
    # Of a run of neighbours, each of many machines uses little: they read what they use, and not whole runs ahead.
    machines = world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    micro_batches = MicroBatches(
        latents, Order(len(latents), seed), micro_batch_size, rank, world_size, read_ahead=machines <= 2
    )
    return Loader(
        latents,
        DataLoader(
            micro_batches,
            batch_size=None,  # the data set makes whole batches
            sampler=range(start_step * accumulation, num_steps * accumulation),
            num_workers=num_workers,
            pin_memory=pin_memory,
            prefetch_factor=4 if num_workers else None,
            generator=torch.Generator(),  # for worker seeds, which nothing uses, so that the global stream stays put
        ),
    )


class MicroBatches(Dataset):
    """Micro-batch i of one rank, counted from step 0; damage comes back as a value, for the main process to raise."""

    def __init__(
        self, latents: Latents, order: Order, micro_batch_size: int, rank: int, world_size: int, read_ahead: bool
    ):
        self.latents, self.order, self.micro_batch_size = latents, order, micro_batch_size
        self.rank, self.world_size, self.read_ahead = rank, world_size, read_ahead
        self._asked_for: tuple = ()  # windows that the system was asked to read ahead

    def positions(self, i: int) -> np.ndarray:
        """Places (micro,) in the stream. Micro-batches of all ranks lie one behind another in it."""
        start = (i * self.world_size + self.rank) * self.micro_batch_size
        return np.arange(start, start + self.micro_batch_size)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, list[str]] | str:
        positions = self.positions(i)
        if self.read_ahead:
            windows = self.order.windows_from(int(positions[0]))
            for window in set(windows).difference(self._asked_for):
                self.latents.will_need(self.order.window(*window))
            self._asked_for = windows
        try:
            return self.latents.read_with_faults(self.order(positions))
        except ValueError as error:
            return str(error)  # a worker's exception would arrive wrapped in its traceback


class Loader:
    """Iterates over a DataLoader's batches; faults are reported here, in the process that logs."""

    def __init__(self, latents: Latents, batches: DataLoader):
        self.latents, self.batches = latents, batches

    def __len__(self) -> int:
        return len(self.batches.sampler)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches = iter(self.batches)
        try:
            while (batch := self._next(batches)) is not None:
                if isinstance(batch, str):
                    raise ValueError(batch)
                raw, y, faults = batch
                self.latents.report(faults)
                yield raw, y
        finally:
            del batches  # ends the loader processes here, and not whenever the traceback is forgotten

    def _next(self, batches: Iterator) -> tuple | str | None:
        """The next batch, None at the end; OSError where a loader process was killed, which shows in many ways."""
        try:
            return next(batches, None)
        except (EOFError, ConnectionError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            raise OSError(
                f"a loader process died ({error or type(error).__name__}), often for want of memory; "
                f"needed: a smaller data.num_workers than {self.batches.num_workers}, or the same command again"
            ) from error
