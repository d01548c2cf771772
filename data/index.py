"""Where each sample of a split lies: found and checked once, then cached.

Building the index reads every byte: shards are compared with the manifest's sha256, every array and label is checked,
and a CRC of each array is kept, so that reading a sample later is one `pread` and one comparison. 18 bytes a sample.

The cache lies beside the shards (`.train.index.npz`), or in the user's cache folder where that cannot be written, and
is used only while the shards' names, sizes and times and the manifest are what they were.
"""

import hashlib
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.files import atomic_file, locked
from data.scan import Entries, ShardScan, first_array


@dataclass
class Index:
    """All shards of a split. `faults`: a line for every shard or sample that is left out."""

    shards: list[str]
    ends: np.ndarray  # (number of shards,) int64: how many samples lie in this shard and those before it
    entries: Entries
    shape: tuple[int, ...]  # of each stored array
    dtype: str
    faults: list[str]

    @property
    def counts(self) -> np.ndarray:
        """(number of shards,) int64: samples in each."""
        return np.diff(self.ends, prepend=0)


def load_index(folder: Path, split: str, shards: list[str], manifest: dict) -> Index:
    """The index of the named shards of a folder: from the cache, or built and then cached.

    manifest: what meta.json says, {} where there is none; the shards are held against its `shards` (name, n, sha256),
    `shape`, `dtype` and `num_classes`.
    """
    stamp = _stamp(folder, shards, manifest)
    for place in _cache_places(folder, split):
        index, known_stamp = _read_cache(place)
        if index is not None and known_stamp == stamp:
            return index
    place = _cache_place(folder, split)
    with locked(place.with_suffix(".lock")):
        before, known_stamp = _read_cache(place)
        if before is not None and known_stamp == stamp:  # another process has just built it
            return before
        index = build_index(folder, shards, manifest, before)
        _write_cache(place, index, stamp)
    return index


def cached_index(folder: Path, split: str) -> Index | None:
    """The index that was kept last, which may no longer hold; None where there is none."""
    return next((i for i, _ in map(_read_cache, _cache_places(folder, split)) if i is not None), None)


def save_index(folder: Path, split: str, index: Index, manifest: dict) -> None:
    """Keeps an index that was built on the way to the manifest."""
    _write_cache(_cache_place(folder, split), index, _stamp(folder, index.shards, manifest))


def build_index(folder: Path, shards: list[str], manifest: dict, before: Index | None = None) -> Index:
    """Reads every shard. before: an earlier index, which knows the samples that changed in a damaged shard."""
    described = {shard["name"]: shard for shard in manifest.get("shards", [])}
    shape, dtype = manifest.get("shape"), manifest.get("dtype")
    if shape is None:
        shape, dtype = first_array([folder / name for name in shards])
    scan = ShardScan(tuple(shape), dtype, manifest.get("num_classes"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading, hashing and CRCs leave the interpreter's lock
        results = list(
            pool.map(lambda name: scan.checked(folder / name, described.get(name), shard_entries(before, name)), shards)
        )
    columns = zip(*(vars(entries).values() for entries, _ in results))
    return Index(
        shards=shards,
        ends=np.cumsum([len(entries) for entries, _ in results], dtype=np.int64),
        entries=Entries(*(np.concatenate(column) for column in columns)),
        shape=scan.shape,
        dtype=scan.dtype,
        faults=[fault for _, faults in results for fault in faults],
    )


def shard_entries(index: Index | None, shard: str) -> Entries | None:
    """The part of an index that is one shard's; None where it does not know the shard."""
    if index is None or shard not in index.shards:
        return None
    s = index.shards.index(shard)
    return index.entries[slice(index.ends[s - 1] if s else 0, index.ends[s])]


def _stamp(folder: Path, shards: list[str], manifest: dict) -> str:
    """What must not have changed for a cached index to hold."""
    files = []
    for name in shards:
        try:
            stat = os.stat(folder / name)
            files.append([name, stat.st_size, stat.st_mtime_ns])
        except FileNotFoundError:
            files.append([name, None, None])
    checks = {key: manifest.get(key) for key in ("shards", "shape", "dtype", "num_classes")}
    return json.dumps([files, checks])


def _cache_places(folder: Path, split: str) -> tuple[Path, Path]:
    """Beside the shards, and in the user's cache folder under a name made from the path."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tread"
    path_hash = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return folder / f".{split}.index.npz", user_cache / f"{path_hash}.{split}.index.npz"


def _cache_place(folder: Path, split: str) -> Path:
    """The one to write: beside the shards where that is allowed."""
    beside, elsewhere = _cache_places(folder, split)
    if os.access(folder, os.W_OK):
        return beside
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    return elsewhere


def _write_cache(path: Path, index: Index, stamp: str) -> None:
    about = {"stamp": stamp, "shards": index.shards, "shape": index.shape, "dtype": index.dtype, "faults": index.faults}
    with atomic_file(path) as file:
        np.savez(
            file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), ends=index.ends, **vars(index.entries)
        )


def _read_cache(path: Path) -> tuple[Index | None, str]:
    """(index, stamp) of a cached index; (None, '') where there is none or it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            entries = Entries(*(arrays[name] for name in Entries.__annotations__))
            index = Index(
                about["shards"], arrays["ends"], entries, tuple(about["shape"]), about["dtype"], about["faults"]
            )
            return index, about["stamp"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None, ""
