"""IDX files, the format of MNIST, Fashion-MNIST, KMNIST and EMNIST: train-images-idx3-ubyte, train-labels-idx1-ubyte.

A file is two zero bytes, 8 for uint8, the number of dimensions, each dimension as a big-endian uint32, then the
numbers; with `.gz` behind its name, compressed by gzip.
"""

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from system import UserError

NAME = re.compile(r"(?:(.+)-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")


class IdxPair(NamedTuple):
    images: Path
    labels: Path


def find_idx(source: str | Path) -> dict[str, IdxPair]:
    """{"train": files, "val": files of the test split}, of those that `source` has.

    source: a folder, or `<folder>/<set>` where the files of several sets lie side by side, as EMNIST's do:
    `emnist-balanced` for emnist-balanced-train-images-idx3-ubyte.gz. Raises UserError where there are no such files, or
    those of several sets.
    """
    source = Path(source)
    folder, wanted = (source, None) if source.is_dir() else (source.parent, source.name)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found: dict[tuple[str, str], Path] = {}
    sets = set()
    for name in names:
        if (match := NAME.fullmatch(name)) and wanted in (None, match[1]):
            sets.add(match[1] or "")
            found.setdefault(("train" if match[2] == "train" else "val", match[3]), folder / name)  # plain before .gz
    if len(sets) > 1:
        raise UserError(f"{source} has IDX files of {', '.join(sorted(sets))}; needed: one, {source}/{max(sets)}")
    pairs = {}
    for split in ("train", "val"):
        files = [found.get((split, what)) for what in ("images", "labels")]
        if all(files):
            pairs[split] = IdxPair(*files)
        elif any(files):
            raise UserError(f"{source} has {next(filter(None, files)).name} alone; needed: images and labels")
    if not pairs:
        raise UserError(f"{source} has no IDX files; needed: train-images-idx3-ubyte, train-labels-idx1-ubyte, or .gz")
    return pairs


def read_idx(pair: IdxPair) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (N, H, W) and labels (N,). Raises UserError for damaged files and where the counts differ."""
    labels, images = _read(pair.labels, 1), _read(pair.images, 3)
    if len(images) != len(labels):
        raise UserError(f"{pair.images} has {len(images)} images, {pair.labels.name} {len(labels)} labels")
    return images, labels


def _read(path: Path, ndim: int) -> np.ndarray:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            magic, shape, numbers = file.read(4), file.read(4 * ndim), file.read()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is cut off or damaged ({error})") from None
    needed = bytes((0, 0, 8, ndim))
    if magic != needed:
        raise UserError(f"{path} begins with {magic.hex(' ')}; needed: {needed.hex(' ')}, an IDX file of uint8")
    shape = tuple(np.frombuffer(shape.ljust(4 * ndim, b"\0"), ">u4").tolist())
    if len(numbers) != math.prod(shape) or not numbers:
        raise UserError(f"{path} has {len(numbers)} bytes of numbers; its header needs {math.prod(shape)}, {shape}")
    return np.frombuffer(numbers, np.uint8).reshape(shape)
