"""Reads a shard once, from end to end, and says what each sample is and what is wrong with the others.

A shard is a tar of `<key>.latent.npy` and `<key>.cls` pairs; members of other kinds are passed over, none is unpickled.
"""

import contextlib
import hashlib
import os
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np

from data.tar import Member, member_name, members, split_name

ARRAY, LABEL = "latent.npy", "cls"  # what follows the key in a member's name
DTYPES = ("float16", "float32")
MAX_LABEL = 2**31 - 1


@dataclass
class Entries:
    """Samples of one shard, or of all shards of a split, in the order of the archives."""

    offsets: np.ndarray  # (n,) int64: first byte of the contents of `<key>.latent.npy`
    headers: np.ndarray  # (n,) uint16: bytes of .npy header in front of the numbers
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
class ShardScan:
    """Scans shards whose arrays should have this shape and dtype, and labels in [0, num_classes) if that is known."""

    shape: tuple[int, ...]
    dtype: str
    num_classes: int | None = None

    def checked(self, path: Path, described: dict | None, before: Entries | None) -> tuple[Entries, list[str]]:
        """The sound samples of a shard and a line for each fault.

        described: the manifest's {n, sha256} of it. before: an earlier scan, which tells the sample that changed since.
        """
        try:
            entries, faults = self.samples(path)
        except OSError as error:
            return Entries.of([]), [f"{path.name}: {error.strerror}"]
        if described is None or faults or file_sha256(path) == described["sha256"]:
            return entries, [f"{path.name}: {fault}" for fault in faults]
        if before is not None and np.array_equal(before.offsets, entries.offsets):
            changed = (before.crcs != entries.crcs) | (before.labels != entries.labels)
            if changed.any():
                return entries[~changed], [f"{where(path, at)} has changed" for at in entries.offsets[changed]]
        counts = "" if len(entries) == described["n"] else f": {len(entries)} samples, needed {described['n']}"
        return Entries.of([]), [f"{path.name}: its sha256 is not the one in meta.json{counts}"]

    def samples(self, path: Path) -> tuple[Entries, list[str]]:
        """The complete and sound samples of a shard, and what is wrong with the others."""
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
                except ValueError as error:
                    faults.append(f"sample {key!r} at byte {next(iter(parts.values())).offset} {error}")
        return Entries.of(rows), faults

    def _row(self, fd: int, parts: dict[str, Member]) -> tuple[int, int, int, int]:
        """(offset, header bytes, label, CRC) of a sample; ValueError says what is wrong with it."""
        for extension in (ARRAY, LABEL):
            if extension not in parts:
                raise ValueError(f"has no .{extension}")
        array = parts[ARRAY]
        contents = os.pread(fd, array.size, array.offset)
        shape, dtype, start = npy_header(contents)
        if (shape, dtype) != (self.shape, self.dtype):
            raise ValueError(f"is {dtype} {shape}; needed: {self.dtype} {self.shape}")
        numbers = contents[start:]
        if len(numbers) != np.dtype(dtype).itemsize * int(np.prod(shape)):
            raise ValueError(f"has {len(numbers)} bytes of numbers, not those of {dtype} {shape}")
        if not np.isfinite(np.frombuffer(numbers, dtype)).all():
            raise ValueError("has numbers that are not finite")
        text = os.pread(fd, min(parts[LABEL].size, 64), parts[LABEL].offset).decode("ascii", "replace").strip()
        top = MAX_LABEL if self.num_classes is None else self.num_classes - 1
        if not re.fullmatch(r"-?\d{1,10}", text) or not 0 <= int(text) <= top:
            raise ValueError(f"has label {text[:20]!r}; needed: 0..{top}")
        return array.offset, start, int(text), zlib.crc32(numbers)


def first_array(paths: list[Path]) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the first array in some shards, for shards that no manifest describes."""
    for path in paths:
        with open(path, "rb") as file:
            for member in members(file, []):
                if split_name(member.name)[1] == ARRAY:
                    with contextlib.suppress(ValueError):  # the scan will name it
                        return npy_header(os.pread(file.fileno(), min(member.size, 4096), member.offset))[:2]
    return (), DTYPES[0]  # the scan will find no sample in them


def npy_header(contents: bytes) -> tuple[tuple[int, ...], str, int]:
    """(shape, dtype, bytes of header) of a .npy file; ValueError where it is not an array of numbers that we take."""
    length = int.from_bytes(contents[8:10], "little") + 10  # version 1, which holds every shape that is not absurd
    return _parse_npy_header(contents[:length])


@lru_cache(maxsize=64)  # all samples of a set have the same header
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], str, int]:
    stream = BytesIO(header)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception:  # numpy parses the header as Python: one flipped bit may be a TokenError, a SyntaxError, ...
        raise ValueError("is not a .npy array") from None
    if dtype.name not in DTYPES or not dtype.isnative or (fortran_order and len(shape) > 1):
        order = "Fortran" if fortran_order else "C"
        raise ValueError(f"is {dtype.str} in {order} order; needed: {' or '.join(DTYPES)} in C order, little-endian")
    return shape, dtype.name, len(header)


def where(path: Path, offset: int) -> str:
    """`shard: sample 'key' at byte offset`, the key read back from the archive."""
    try:
        with open(path, "rb") as file:
            key = split_name(member_name(file.fileno(), offset))[0]
    except OSError:
        key = "?"
    return f"{path.name}: sample {key!r} at byte {offset}"


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
