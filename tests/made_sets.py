"""Small data sets for tests: every array's first number says which sample it is."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import torch

from data.encoding import LatentEncoding
from data.shards import finalize, shard_name, write_shard

SHAPE, NUM_CLASSES = (4, 4, 4), 10
SIZES = (5, 7, 100)  # of the shards
TOTAL = sum(SIZES)


def array_of(number: int) -> np.ndarray:
    """Its first number is `number`, so that a batch says which samples it is made of."""
    array = np.random.default_rng(number).standard_normal(SHAPE).astype(np.float16)
    array[0, 0, 0] = number
    return array


def numbers_in(raw: torch.Tensor) -> list[int]:
    return raw[:, 0, 0, 0].int().tolist()


def write_set(folder: Path, sizes=SIZES) -> Path:
    """Shards of these sizes with a manifest; sample i has key i, label i % 10 and array_of(i)."""
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for shard, size in enumerate(sizes):
        samples = ((f"{i:04d}", array_of(i), i % NUM_CLASSES) for i in range(start, start + size))
        write_shard(folder / shard_name("train", shard), samples)
        start += size
    finalize(folder, LatentEncoding("sample_scaled"), num_classes=NUM_CLASSES)
    return folder


def add(tar: tarfile.TarFile, name: str, contents: bytes, **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(contents))


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def write_members(path: Path, members: list[tuple]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, contents, *fields in members:
            add(tar, name, contents, **(fields[0] if fields else {}))


def good(i: int) -> list[tuple]:
    return [(f"{i:04d}.latent.npy", npy(array_of(i))), (f"{i:04d}.cls", b"%d" % (i % NUM_CLASSES))]


def write_idx(folder: Path, sizes=(30, 20), name: str = "", compress: bool = True, test: str = "t10k") -> tuple:
    """Four IDX files of noise with 10 classes -> ((images, labels) of train, of the test split)."""
    folder.mkdir(parents=True, exist_ok=True)
    sets, rng = [], np.random.default_rng(len(name))
    for split, n in zip(("train", test), sizes):
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
        for what, array in (("images-idx3", images), ("labels-idx1", labels)):
            contents = idx(array)
            path = folder / f"{name}{split}-{what}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(contents, 1) if compress else contents)
        sets.append((images, labels))
    return tuple(sets)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
