"""The index of a split: every sample validated once, its position and a checksum of it; cached.

A shard is a tar with a `<key>.latent.npy` for every sample and its condition: `<key>.cls`, `<key>.text.npy` or nothing.
Further texts of a sample are `<key>.text.1.npy`, `<key>.text.2.npy`, ...; a teacher's `<key>.features.npy` precede it
all, where a set has them. Other members are ignored, and nothing is unpickled. Building the index reads every byte:
shards are compared with the manifest's sha256, every array and label is checked, and a CRC of each array is kept, so
that reading an array later is one `pread` and one comparison. A sample takes 18 bytes of the index, or 14 and 18 for
each text, and 14 for features.

The cache is kept beside the shards, or in the user's cache folder if theirs is not writable, and is used only while the
shards' names, sizes and times and the manifest are unchanged. An index that lacks something because the system failed
to read it (EIO, ESTALE, ...) is not cached: the next attempt may succeed.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from data import archives
from data.archives import ARRAY, FEATURES, LABEL, TEXT, Member, split_name
from system import UserError
from system.files import atomic_file, locked, open_regular, sha256_of
from system.launchers import usable_cpus
from system.limits import CLASSES, MEMBER_BYTES, TEXT_TOKENS
from system.settings import Check, Positive, between, convert, parse

DTYPES = ("float16", "float32")
NO_MORE_FILES = (errno.EMFILE, errno.ENFILE)
PARTS = {"class": (ARRAY, LABEL), "text": (ARRAY, TEXT), "none": (ARRAY,)}  # what a sample needs, by its condition
MAX_TEXTS, TEXT_NAME = 99, re.compile(r"text\.([1-9]\d?)\.npy")  # of a sample; all but the first
# A sample's entry: where each of its .npy files begins in the shard, the bytes before its numbers, their CRC-32.
ARRAY_FIELDS = [("offset", "i8"), ("header", "u2"), ("crc", "u4")]
TEXT_FIELDS = [("length", "i4"), ("text_offset", "i8"), ("text_header", "u2"), ("text_crc", "u4")]  # length: tokens
SMALL = Check(f"of at most {MEMBER_BYTES} numbers", lambda shape: math.prod(shape) <= MEMBER_BYTES)
FEATURE_FIELDS = [("feature_offset", "i8"), ("feature_header", "u2"), ("feature_crc", "u4")]


@dataclass(frozen=True)
class Layout:
    """What all samples of a set have in common, as meta.json says it."""

    shape: Annotated[tuple[Positive, ...], Check("of 3 sides", lambda shape: len(shape) == 3), SMALL]  # as stored
    dtype: Literal["float16", "float32"]
    condition: Literal["class", "text", "none"] = "class"
    num_classes: Annotated[int, between(1, CLASSES + 1)] | None = None  # None = unknown, or no classes
    text_width: Annotated[int, between(1, MEMBER_BYTES)] | None = None  # texts are (tokens, text_width)
    text_dtype: Literal["float16", "float32"] | None = None
    text_length: Annotated[int, between(1, TEXT_TOKENS + 1)] | None = None  # of the longest text; None = unknown
    text_count: Annotated[int, between(1, MAX_TEXTS + 1)] | None = None  # the most texts of a sample; None = 1
    feature_shape: Annotated[tuple[Positive, Positive], SMALL] | None = None  # (N, D_t) float16, of a teacher; or None

    @classmethod
    def of(cls, manifest: dict) -> "Layout":
        values = {name: manifest[name] for name in cls.__annotations__ if name in manifest}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @property
    def parts(self) -> tuple[str, ...]:
        """What a sample needs."""
        return PARTS[self.condition] + ((FEATURES,) if self.feature_shape else ())

    @property
    def fields(self) -> list[tuple]:
        """Of a sample's entry in the index. A sample with fewer texts than others has some of length 0."""
        labels, texts = [("label", "i4")], [(name, kind, (self.text_count or 1,)) for name, kind in TEXT_FIELDS]
        more = FEATURE_FIELDS if self.feature_shape else []
        return ARRAY_FIELDS + {"class": labels, "text": texts, "none": []}[self.condition] + more


@dataclass
class Index:
    """All shards of a split. `faults`: a line for every shard or sample that is left out."""

    shards: list[str]
    ends: np.ndarray  # (number of shards,) int64: number of samples in this shard and those before it
    entries: np.ndarray  # (number of samples,) of layout.fields, in the order of the archives
    layout: Layout
    faults: list[str]


def load_index(folder: Path, split: str, shards: list[str], manifest: dict) -> Index:
    """The index of the named shards of a folder, checked against meta.json: from the cache, or built and then cached.

    manifest: the contents of meta.json, {} if there is none.
    """
    stamp = _stamp(folder, shards, manifest)

    def up_to_date() -> Index | None:
        fitting = (index for index, found in _cached(folder, split) if found == stamp and index.shards == shards)
        return next((index for index in fitting if not manifest or _fits(index, Layout.of(manifest))), None)

    if (index := up_to_date()) is None:
        path = _cache_paths(folder, split)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):
            if (index := up_to_date()) is None:  # no other process has just built it
                index = build_index(folder, shards, manifest, cached_index(folder, split))
                if not any(map(_is_read_error, index.faults)):
                    save_index(folder, split, index, manifest, stamp)
    return index


def cached_index(folder: Path, split: str) -> Index | None:
    """The index cached last, which may be out of date; None if there is none."""
    return next((index for index, _ in _cached(folder, split)), None)


def save_index(folder: Path, split: str, index: Index, manifest: dict, stamp: str = "") -> None:
    """Caches an index. stamp: of the shards when it was begun; "" = as they are now."""
    about = {"stamp": stamp or _stamp(folder, index.shards, manifest), "shards": index.shards}
    about |= {"layout": asdict(index.layout), "faults": index.faults}
    path = _cache_paths(folder, split)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        about = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez(file, about=about, ends=index.ends, entries=index.entries)


def build_index(folder: Path, shards: list[str], manifest: dict, before: Index | None = None) -> Index:
    """Reads every shard. before: an earlier index, which identifies the samples that changed in a damaged shard.

    manifest: as in load_index; without a shape in it, the layout is that of the shards.
    """
    described = {shard["name"]: shard for shard in manifest.get("shards", [])}
    earlier = dict(zip(before.shards, np.split(before.entries, before.ends[:-1]))) if before else {}
    layout = Layout.of(manifest) if "shape" in manifest else find_layout([folder / name for name in shards])

    def validate(name: str) -> tuple[np.ndarray, list[str]]:
        found, faults = validate_shard(folder / name, layout, described.get(name), earlier.get(name))
        return np.array(found, layout.fields), [f"{name}: {fault}" for fault in faults]

    with ThreadPoolExecutor(usable_cpus()) as pool:  # reading, hashing and CRCs release the interpreter's lock
        entries, faults = zip(*pool.map(validate, shards))
    ends = np.cumsum([len(part) for part in entries], dtype=np.int64)
    return Index(shards, ends, np.concatenate(entries), layout, sum(faults, []))


def validate_shard(
    path: Path, layout: Layout, described: dict | None, before: np.ndarray | None
) -> tuple[np.ndarray | list, list[str]]:
    """The valid samples of a shard and what is wrong with the others. described: its {n, sha256} in the manifest.

    before: its entries in an earlier index, which identify the samples that have changed since.
    """
    for attempt in (1, 2):
        try:
            entries, faults = read_samples(path, layout)
            if described is None or faults or sha256_of(path) == described["sha256"]:
                return entries, faults
            break
        except OSError as error:
            refuse_low_limit(error)
            if attempt == 2:
                return [], [error.strerror]
    if before is not None and before.dtype == entries.dtype and len(before) == len(entries):
        changed = before != entries
        if changed.any() and (before["offset"] == entries["offset"]).all():
            return entries[~changed], [f"{describe_sample(path, at)} has changed" for at in entries["offset"][changed]]
    counts = "" if len(entries) == described["n"] else f": {len(entries)} samples, needed {described['n']}"
    return [], [f"its sha256 is not the one in meta.json{counts}"]


def refuse_low_limit(error: OSError) -> None:
    """Raises UserError where the system, not the data, is at fault: on_error=skip would leave out sound samples."""
    if error.errno in NO_MORE_FILES:
        raise UserError(f"{error.strerror}: no shard can be opened; needed: a higher limit, such as `ulimit -n 4096`")


def read_samples(path: Path, layout: Layout) -> tuple[np.ndarray, list[str]]:
    """The complete and valid samples of a shard, and what is wrong with the others."""
    faults: list[str] = []
    found: dict[str, dict[str, Member]] = {}
    others: set[str] = set()
    rows, known = [], {*layout.parts, *text_names(layout)}
    with open_regular(path) as file:
        for member in archives.members(file, faults):
            key, extension = split_name(member.name)
            if extension not in known:
                others.add(extension)
            elif extension in found.setdefault(key, {}):
                faults.append(f"sample {key!r} at byte {member.offset} has a second .{extension}")
            else:
                found[key][extension] = member
        if not faults and not any(ARRAY in parts for parts in found.values()):
            instead = f", but .{', .'.join(sorted(others))}; python -m data inspect says more" if others else ""
            faults, found = [f"holds no .{ARRAY}{instead}"], {}
        for key, parts in found.items():
            try:
                rows.append(_row(file.fileno(), parts, layout))
            except UserError as error:
                faults.append(f"sample {key!r} at byte {next(iter(parts.values())).offset} {error}")
    return np.array(rows, layout.fields), faults


def text_names(layout: Layout) -> list[str]:
    """What follows the key in the names of a sample's texts."""
    count = (layout.text_count or 1) if layout.condition == "text" else 0
    return [TEXT, *(f"text.{number}.npy" for number in range(1, count))][:count]


def _row(fd: int, parts: dict[str, Member], layout: Layout) -> tuple:
    """The entry of a sample. Raises UserError saying what is wrong with it."""
    if missing := [extension for extension in layout.parts if extension not in parts]:
        raise UserError(f"has no .{missing[0]}")
    _, *row = _read_array(fd, parts[ARRAY], layout.dtype, layout.shape)
    if layout.condition == "class":
        contents = os.pread(fd, min(parts[LABEL].size, 64), parts[LABEL].offset)
        row.append(archives.parse_number(contents, "has a label that", layout.num_classes))

    def more(name: str, *needed) -> tuple[int, int, int, int]:
        try:
            return _read_array(fd, parts[name], *needed)
        except UserError as error:
            raise UserError(f"has a .{name} that {error}") from None

    shape = layout.text_length, layout.text_width
    texts = [more(n, layout.text_dtype, shape, True) if n in parts else (0,) * 4 for n in text_names(layout)]
    _, *features = more(FEATURES, "float16", layout.feature_shape) if layout.feature_shape else (0,)
    return (*row, *zip(*texts), *features)


def _read_array(fd: int, member: Member, dtype: str, needed: tuple, longest: bool = False) -> tuple[int, int, int, int]:
    """(length, offset, header bytes, CRC) of an array. Raises UserError saying what is wrong with it.

    needed: its shape. longest: needed[0] is the largest length there may be, if it is known, and 1 the smallest.
    """
    contents = os.pread(fd, member.size, member.offset)
    shape, found, start = _float_header(contents, member.size)
    fits = shape and (not longest or 1 <= shape[0] <= (needed[0] or TEXT_TOKENS))
    if found != dtype or not fits or shape[longest:] != needed[longest:]:
        words = f"(1..{needed[0] or ''}, {needed[1]})" if longest else needed
        raise UserError(f"is {found} {shape}; needed: {dtype} {words}")
    numbers = contents[start:]
    if not np.isfinite(np.frombuffer(numbers, dtype)).all():
        raise UserError("has numbers that are not finite")
    return shape[0], member.offset, start, zlib.crc32(numbers)


def find_layout(paths: list[Path], condition: str | None = None, num_classes: int | None = None) -> Layout:
    """The layout of shards that no manifest describes: arrays are as the first of their kind is.

    condition: None = as in the first shard with an array: labels, or else texts, or none.
    """
    found: dict[str, tuple] = {}  # {extension: (shape, dtype, bytes of header)}
    extensions: set[str] = set()
    count = 1  # of the texts of a sample
    for path in paths:
        with open_regular(path) as file:
            for member in archives.members(file, []):
                extensions.add(extension := split_name(member.name)[1])
                if extension in (ARRAY, TEXT, FEATURES) and extension not in found:
                    with contextlib.suppress(UserError):  # validation will name it
                        contents = os.pread(file.fileno(), min(member.size, 4096), member.offset)
                        found[extension] = _float_header(contents, member.size)
                if (found.keys() | extensions & {LABEL}) >= set(PARTS[condition or "class"]) != set(PARTS["text"]):
                    break
                if match := TEXT_NAME.fullmatch(extension):
                    count = max(count, int(match[1]) + 1)
        if ARRAY in found and TEXT not in extensions:  # else the most texts of a sample may be in any shard
            break
    shape, dtype, _ = found.get(ARRAY, ((), DTYPES[0], 0))  # without an array, validation will find no sample
    condition = condition or ("class" if LABEL in extensions else "text" if TEXT in extensions else "none")
    features = found.get(FEATURES, (None,))[0]  # which a sample begins with
    if condition != "text":
        return Layout(shape, dtype, condition, num_classes, feature_shape=features)
    text_shape, text_dtype, _ = found.get(TEXT, ((0,), dtype, 0))
    width = text_shape[-1] if text_shape else 0
    several = count if count > 1 else None
    return Layout(shape, dtype, condition, num_classes, width, text_dtype, None, several, features)


def _float_header(contents: bytes, size: int) -> tuple[tuple[int, ...], str, int]:
    """(shape, dtype, bytes of header) of a .npy file. Raises UserError for anything but a float array in C order."""
    shape, fortran_order, dtype, start = archives.npy_header(contents, size)
    if dtype.name not in DTYPES or not dtype.isnative or (fortran_order and len(shape) > 1):
        order = "Fortran" if fortran_order else "C"
        raise UserError(f"is {dtype.str} in {order} order; needed: {' or '.join(DTYPES)} in C order, little-endian")
    return shape, dtype.name, start


def _is_read_error(fault: str) -> bool:
    """Whether the system failed to read a shard that exists, rather than found damage in it."""
    return any(fault.endswith(f": {os.strerror(code)}") for code in errno.errorcode if code != errno.ENOENT)


def describe_sample(path: Path, offset: int) -> str:
    return f"sample {archives.sample_key(path, offset)!r} at byte {offset}"


def _stamp(folder: Path, shards: list[str], manifest: dict) -> str:
    """What must be unchanged for a cached index to be valid."""
    files = [[name, None, None] for name in shards]
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            stat = os.stat(folder / file[0])
            file[1:] = stat.st_size, stat.st_mtime_ns
    return json.dumps([files, {key: manifest.get(key) for key in ("shards", *Layout.__annotations__)}])


def _cache_paths(folder: Path, split: str) -> list[Path]:
    """Beside the shards, and in the user's cache folder under the path's hash; the first of them can be written."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "tread"
    path_hash, split_hash = (hashlib.sha256(name.encode()).hexdigest() for name in (str(folder.resolve()), split))
    # Without the split's name: CompVis's loader takes every file with "train" in its name for a shard.
    beside, elsewhere = folder / f".{split_hash[:8]}.index.npz", user_cache / f"{path_hash[:16]}.{split}.index.npz"
    own = os.access(folder, os.W_OK) and not beside.with_suffix(".lock").is_symlink()  # as in a download of the hub's
    return [beside, elsewhere] if own else [elsewhere, beside]


def _cached(folder: Path, split: str) -> Iterator[tuple[Index, str]]:
    """(index, stamp) of each cached index that can be read."""
    for path in _cache_paths(folder, split):
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError, RecursionError):
            arrays = archives.read_arrays(path, ("about", "ends", "entries"))
            about = json.loads(arrays["about"].tobytes())
            layout, faults = parse(Layout, about["layout"]), convert(about["faults"], list[str], "faults")
            index = Index(about["shards"], arrays["ends"], arrays["entries"], layout, faults)
            if _is_consistent(index):
                yield index, about["stamp"]


def _fits(index: Index, layout: Layout) -> bool:
    """Whether an index is one of this layout, whose number of classes and longest text are counted after it is made."""
    counted = {"num_classes": layout.num_classes, "text_length": layout.text_length}
    return replace(index.layout, **counted) == layout and _is_consistent(replace(index, layout=layout))


def _is_consistent(index: Index) -> bool:
    """Whether an index, which may have come with its set, keeps to its own layout."""
    ends, entries, layout = index.ends, index.entries, index.layout
    if entries.dtype != np.dtype(layout.fields) or entries.ndim != 1 or ends.dtype != np.int64:
        return False
    counted = ends.shape == (len(index.shards),) and (np.diff(ends, prepend=0) >= 0).all() and ends[-1] == len(entries)
    labels = entries["label"] if layout.condition == "class" else np.zeros(1)
    known = labels.min(initial=0) >= 0 and labels.max(initial=0) < (layout.num_classes or CLASSES)
    told = layout.condition != "text" or (entries["length"].max(1, initial=0) > 0).all()
    return bool(counted and (entries["offset"] >= 0).all() and known and told)
