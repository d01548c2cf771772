"""Which sample comes when: a pure function of (seed, position), so that any step can be reached at once.

Epochs are laid end to end into one endless stream, each of them every sample once; global batch s is positions
s * G .. s * G + G - 1 of it. A batch may straddle two epochs, so no remainder is ever dropped.

Inside an epoch: the samples are cut into runs of RUN neighbours on the disk, the runs shuffled, and the samples
shuffled inside windows of WINDOW. A window is made of runs from all over the set, so batches are well mixed even where
the shards are sorted by class, while the disk can be read in whole runs, a window ahead.
"""

from functools import lru_cache

import numpy as np
import torch

from randomness import seeded_generator

RUN = 32  # samples
WINDOW = 32768  # samples; a set no larger than this is shuffled without any structure


class Order:
    """Sample indices of stream positions, for a set of `num_samples` and a seed."""

    def __init__(self, num_samples: int, seed: int):
        assert num_samples > 0
        self.num_samples, self.seed = num_samples, seed
        # Positions come in their order: this one and the next suffice, and the last for a batch across the border.
        self._runs = lru_cache(maxsize=3)(self._shuffle_runs)
        self.window = lru_cache(maxsize=3)(self._shuffle_window)

    def __getstate__(self) -> dict:
        return {"num_samples": self.num_samples, "seed": self.seed}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """positions (B,) int64 of the stream -> sample indices (B,) int64."""
        epochs, places = np.divmod(positions, self.num_samples)
        windows, places = np.divmod(places, WINDOW)
        indices = np.empty_like(positions)
        for epoch, window in sorted(set(zip(epochs.tolist(), windows.tolist()))):
            here = (epochs == epoch) & (windows == window)
            indices[here] = self.window(epoch, window)[places[here]]
        return indices

    def windows_from(self, position: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(epoch, window) of a position of the stream, and the next one; `window` gives the samples of each."""
        epoch, place = divmod(position, self.num_samples)
        window, last = place // WINDOW, (self.num_samples - 1) // WINDOW
        return (epoch, window), ((epoch, window + 1) if window < last else (epoch + 1, 0))

    def _shuffle_runs(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(first sample of each run, place where each run ends), runs in their shuffled order."""
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
