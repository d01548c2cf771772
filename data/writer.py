"""Shards, written whole or not at all and to the same bytes each time."""

import tarfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np

from data.files import atomic_file
from data.scan import ARRAY, LABEL


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[tuple[str, np.ndarray, int]]) -> None:
    """A tar of (key, array, label) samples; no times, owners or modes of this machine, so that bytes repeat."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a writer that was killed
        leftover.unlink(missing_ok=True)
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, array, label in samples:
            contents = BytesIO()
            np.save(contents, np.ascontiguousarray(array), allow_pickle=False)
            _add(tar, f"{key}.{ARRAY}", contents.getvalue())
            _add(tar, f"{key}.{LABEL}", b"%d" % label)


def _add(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
    info = tarfile.TarInfo(name)  # mode 644, owner 0, time 0
    info.size = len(contents)
    tar.addfile(info, BytesIO(contents))
