"""The index of a split: every sample validated once, its position and a checksum of it; cached.

A shard is a tar of `<key>.latent.npy` and `<key>.cls` pairs; other members are ignored, and nothing is unpickled.
Building the index reads every byte: shards are compared with the manifest's sha256, every array and label is checked,
and a CRC of each array is kept, so that reading a sample later is one `pread` and one comparison. 18 bytes a sample.

The cache is kept beside the shards, or in the user's cache folder if theirs is not writable, and is used only while the
shards' names, sizes and times and the manifest are unchanged. What the system failed to read (EIO, ESTALE, ...) is left
out of the index, which is not cached then: it may be readable the next time.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np

from data.archives import ARRAY, LABEL, Member, member_name, members, split_name
from system import UserError
from system.files import atomic_file, locked, sha256_of
from system.launchers import usable_cpus

DTYPES = ("float16", "float32")
MAX_LABEL = 2**31 - 1


@dataclass
class Entries:
    """Samples of one shard, or of all shards of a split, in the order of the archives."""

    offsets: np.ndarray  # (n,) int64: first byte of the contents of `<key>.latent.npy`
    headers: np.ndarray  # (n,) uint16: bytes of .npy header before the numbers
    labels: np.ndarray  # (n,) int32
    crcs: np.ndarray  # (n,) uint32: CRC-32 of the numbers

    @classmethod
    def of(cls, rows: list[tuple[int, int, int, int]]) -> "Entries":
        types = (np.int64, np.uint16, np.int32, np.uint32)
        columns = zip(*rows) if rows else [()] * len(types)
        return cls(*(np.array(column, dtype) for column, dtype in zip(columns, types)))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, which: np.ndarray | slice) -> "Entries":
        return Entries(*(column[which] for column in vars(self).values()))


@dataclass
class Index:
    """All shards of a split. `faults`: a line for every shard or sample that is left out."""

    shards: list[str]
    ends: np.ndarray  # (number of shards,) int64: number of samples in this shard and those before it
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

    manifest: the contents of meta.json, {} if there is none; the shards are checked against its `shards` (name, n,
    sha256), `shape`, `dtype` and `num_classes`.
    """
    stamp = _stamp(folder, shards, manifest)
    _rename_earlier(folder, split)
    for path in _cache_paths(folder, split):
        index, known_stamp = _read_cache(path)
        if index is not None and known_stamp == stamp:
            return index
    path = _cache_path(folder, split)
    with locked(path.with_suffix(".lock")):
        before, known_stamp = _read_cache(path)
        if before is not None and known_stamp == stamp:  # another process has just built it
            return before
        index = build_index(folder, shards, manifest, before)
        if not any(map(_is_read_error, index.faults)):
            _write_cache(path, index, stamp)
    return index


def cached_index(folder: Path, split: str) -> Index | None:
    """The index cached last, which may be out of date; None if there is none."""
    return next((i for i, _ in map(_read_cache, _cache_paths(folder, split)) if i is not None), None)


def save_index(folder: Path, split: str, index: Index, manifest: dict) -> None:
    """Caches an index that was built before the manifest was written."""
    _rename_earlier(folder, split)
    _write_cache(_cache_path(folder, split), index, _stamp(folder, index.shards, manifest))


def build_index(folder: Path, shards: list[str], manifest: dict, before: Index | None = None) -> Index:
    """Reads every shard. before: an earlier index, which identifies the samples that changed in a damaged shard."""
    described = {shard["name"]: shard for shard in manifest.get("shards", [])}
    shape, dtype = manifest.get("shape"), manifest.get("dtype")
    if shape is None:
        shape, dtype = first_array([folder / name for name in shards])
    validator = ShardValidator(tuple(shape), dtype, manifest.get("num_classes"))

    def validate(name: str) -> tuple[Entries, list[str]]:
        return validator.validate(folder / name, described.get(name), _shard_entries(before, name))

    with ThreadPoolExecutor(usable_cpus()) as pool:  # reading, hashing and CRCs release the interpreter's lock
        results = list(pool.map(validate, shards))
    columns = zip(*(vars(entries).values() for entries, _ in results))
    return Index(
        shards=shards,
        ends=np.cumsum([len(entries) for entries, _ in results], dtype=np.int64),
        entries=Entries(*(np.concatenate(column) for column in columns)),
        shape=validator.shape,
        dtype=validator.dtype,
        faults=[fault for _, faults in results for fault in faults],
    )


def _shard_entries(index: Index | None, shard: str) -> Entries | None:
    """The entries of one shard; None if the index does not have it."""
    if index is None or shard not in index.shards:
        return None
    s = index.shards.index(shard)
    return index.entries[slice(index.ends[s - 1] if s else 0, index.ends[s])]


@dataclass
class ShardValidator:
    """Reads shards whose arrays must have this shape and dtype, and labels in [0, num_classes) if that is known."""

    shape: tuple[int, ...]
    dtype: str
    num_classes: int | None = None

    def validate(self, path: Path, described: dict | None, before: Entries | None) -> tuple[Entries, list[str]]:
        """The valid samples of a shard and a line for each fault.

        described: its {n, sha256} in the manifest. before: its entries in an earlier index, which identify the samples
        that have changed since.
        """
        for attempt in (1, 2):
            try:
                entries, faults = self.read_samples(path)
                unchanged = described is None or faults or sha256_of(path) == described["sha256"]
                break
            except OSError as error:
                if attempt == 2:
                    return Entries.of([]), [f"{path.name}: {error.strerror}"]
        if unchanged:
            return entries, [f"{path.name}: {fault}" for fault in faults]
        if before is not None and np.array_equal(before.offsets, entries.offsets):
            changed = (before.crcs != entries.crcs) | (before.labels != entries.labels)
            if changed.any():
                return entries[~changed], [
                    f"{describe_sample(path, at)} has changed" for at in entries.offsets[changed]
                ]
        counts = "" if len(entries) == described["n"] else f": {len(entries)} samples, needed {described['n']}"
        return Entries.of([]), [f"{path.name}: its sha256 is not the one in meta.json{counts}"]

    def read_samples(self, path: Path) -> tuple[Entries, list[str]]:
        """The complete and valid samples of a shard, and what is wrong with the others."""
        faults: list[str] = []
        found: dict[str, dict[str, Member]] = {}
        others: set[str] = set()
        rows = []
        with open(path, "rb") as file:
            for member in members(file, faults):
                key, extension = split_name(member.name)
                if extension not in (ARRAY, LABEL):
                    others.add(extension)
                elif extension in found.setdefault(key, {}):
                    faults.append(f"sample {key!r} at byte {member.offset} has a second .{extension}")
                else:
                    found[key][extension] = member
            if not faults and not any(ARRAY in parts for parts in found.values()):
                instead = f", but .{', .'.join(sorted(others))}; python -m data inspect says more" if others else ""
                return Entries.of([]), [f"holds no .{ARRAY}{instead}"]
            for key, parts in found.items():
                try:
                    rows.append(self._row(file.fileno(), parts))
                except UserError as error:
                    faults.append(f"sample {key!r} at byte {next(iter(parts.values())).offset} {error}")
        return Entries.of(rows), faults

    def _row(self, fd: int, parts: dict[str, Member]) -> tuple[int, int, int, int]:
        """(offset, header bytes, label, CRC) of a sample. Raises UserError saying what is wrong with it."""
        for extension in (ARRAY, LABEL):
            if extension not in parts:
                raise UserError(f"has no .{extension}")
        array = parts[ARRAY]
        contents = os.pread(fd, array.size, array.offset)
        shape, dtype, start = npy_header(contents)
        if (shape, dtype) != (self.shape, self.dtype):
            raise UserError(f"is {dtype} {shape}; needed: {self.dtype} {self.shape}")
        numbers = contents[start:]
        if len(numbers) != np.dtype(dtype).itemsize * int(np.prod(shape)):
            raise UserError(f"has {len(numbers)} bytes of numbers, not those of {dtype} {shape}")
        if not np.isfinite(np.frombuffer(numbers, dtype)).all():
            raise UserError("has numbers that are not finite")
        text = os.pread(fd, min(parts[LABEL].size, 64), parts[LABEL].offset).decode("ascii", "replace").strip()
        top = MAX_LABEL if self.num_classes is None else self.num_classes - 1
        if not re.fullmatch(r"-?\d{1,10}", text) or not 0 <= int(text) <= top:
            raise UserError(f"has label {text[:20]!r}; needed: 0..{top}")
        return array.offset, start, int(text), zlib.crc32(numbers)


def first_array(paths: list[Path]) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the first array in some shards, for shards that no manifest describes."""
    for path in paths:
        with open(path, "rb") as file:
            for member in members(file, []):
                if split_name(member.name)[1] == ARRAY:
                    with contextlib.suppress(UserError):  # validation will name it
                        return npy_header(os.pread(file.fileno(), min(member.size, 4096), member.offset))[:2]
    return (), DTYPES[0]  # validation will find no sample in them


def npy_header(contents: bytes) -> tuple[tuple[int, ...], str, int]:
    """(shape, dtype, bytes of header) of a .npy file. Raises UserError for anything but a float array in C order."""
    length = int.from_bytes(contents[8:10], "little") + 10  # version 1, which can hold every reasonable shape
    return _parse_npy_header(contents[:length])


@lru_cache(maxsize=64)  # all samples of a set have the same header
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], str, int]:
    stream = BytesIO(header)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception:  # numpy parses the header as Python: one flipped bit may be a TokenError, a SyntaxError, ...
        raise UserError("is not a .npy array") from None
    if dtype.name not in DTYPES or not dtype.isnative or (fortran_order and len(shape) > 1):
        order = "Fortran" if fortran_order else "C"
        raise UserError(f"is {dtype.str} in {order} order; needed: {' or '.join(DTYPES)} in C order, little-endian")
    return shape, dtype.name, len(header)


def _is_read_error(fault: str) -> bool:
    """Whether the system failed to read a shard that exists, rather than found damage in it."""
    return any(fault.endswith(f": {os.strerror(code)}") for code in errno.errorcode if code != errno.ENOENT)


def describe_sample(path: Path, offset: int) -> str:
    """`shard: sample 'key' at byte offset`, with the key read back from the archive."""
    try:
        with open(path, "rb") as file:
            key = split_name(member_name(file.fileno(), offset))[0]
    except OSError:
        key = "?"
    return f"{path.name}: sample {key!r} at byte {offset}"


def _stamp(folder: Path, shards: list[str], manifest: dict) -> str:
    """What must be unchanged for a cached index to be valid."""
    files = []
    for name in shards:
        try:
            stat = os.stat(folder / name)
            files.append([name, stat.st_size, stat.st_mtime_ns])
        except FileNotFoundError:
            files.append([name, None, None])
    checks = {key: manifest.get(key) for key in ("shards", "shape", "dtype", "num_classes")}
    return json.dumps([files, checks])


def _cache_paths(folder: Path, split: str) -> list[Path]:
    """Beside the shards, there as earlier versions named it, and in the user's cache folder under the path's hash."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tread"
    path_hash, split_hash = (hashlib.sha256(name.encode()).hexdigest() for name in (str(folder.resolve()), split))
    # Without the split's name: CompVis's loader takes every file with "train" in its name for a shard.
    beside = folder / f".{split_hash[:8]}.index.npz"
    return [beside, folder / f".{split}.index.npz", user_cache / f"{path_hash[:16]}.{split}.index.npz"]


def _rename_earlier(folder: Path, split: str) -> None:
    """Gives an index that an earlier version cached beside the shards its present name, if that is allowed."""
    beside, earlier, _ = _cache_paths(folder, split)
    with contextlib.suppress(OSError):
        earlier.with_suffix(".lock").unlink(missing_ok=True)
        os.replace(earlier, beside)


def _cache_path(folder: Path, split: str) -> Path:
    """The one to write: beside the shards if that is allowed."""
    beside, _, elsewhere = _cache_paths(folder, split)
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
    """(index, stamp) of a cached index; (None, '') if there is none, it cannot be read or lacks an unread shard."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            entries = Entries(*(arrays[name] for name in Entries.__annotations__))
            index = Index(
                about["shards"], arrays["ends"], entries, tuple(about["shape"]), about["dtype"], about["faults"]
            )
            return (None, "") if any(map(_is_read_error, index.faults)) else (index, about["stamp"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None, ""
