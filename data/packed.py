"""Pictures packed many to a file, as trees: parquet as on the Hugging Face hub, WebDataset's tars, and IDX.

In a tree, picture <i> of a file is `<file>/<i>.jpg` or the like, with its label beside it, `<file>/<i>.cls`: whatever
reads folders of pictures reads these. Nothing is unpacked.

An IDX file, the format of MNIST, Fashion-MNIST, KMNIST and EMNIST, is two zero bytes, 8 for uint8, the number of
dimensions, each dimension as a big-endian uint32, then the numbers; compressed by gzip where the name ends in `.gz`.
"""

import gzip
import math
import re
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.archives import LABEL, Tree, is_hidden, is_picture, open_tars, open_tree, split_name
from system import UserError
from system.files import open_regular
from system.limits import IDX_BYTES, PARQUET_ROWS, ROW_GROUP_BYTES

IDX_NAME = re.compile(r"(?:(.+)-)?(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(?:\.gz)?")
SPLITS = {"train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val", "test": "test"}


def open_pictures(path: Path, split: str | None = None, beside: str = LABEL) -> Tree:
    """The files of a folder, a zip or a tar; of a folder without pictures, those in its parquet, tar or IDX files.

    split: train, val or test, as the names of packed files say; None = the only one. beside: LABEL or CAPTIONS, what
    pictures in a folder's tars have beside them. Raises UserError where there is no such split, or more than one and
    None is given, for damaged files, and as open_tree.
    """
    if not path.is_dir():
        if path.suffix == ".parquet" and path.is_file():
            return _open_parquet(path.parent, [path.name])
        beside = path.parent.iterdir() if not path.exists() and path.parent.is_dir() else ()
        if any((match := IDX_NAME.fullmatch(other.name)) and match[1] == path.name for other in beside):
            return _open_idx(_choose(path, find_idx(path), split))
    tree = open_tree(path)
    if path.is_dir() and not any(map(is_picture, tree.names)):
        for suffix, opener in ((".parquet", _open_parquet), (".tar", partial(_open_tars, beside=beside))):
            groups = defaultdict(list)  # by the last word of a file's path that names a split
            for name in (name for name in tree.names if name.endswith(suffix) and not is_hidden(name)):
                words = [word for word in re.findall("[a-z]+", name.lower()) if word in SPLITS]
                groups[SPLITS[words[-1]] if words else None].append(name)
            if groups:
                return opener(path, _choose(path, groups, split))
        if any(map(IDX_NAME.fullmatch, tree.names)):
            return _open_idx(_choose(path, find_idx(path), split))
    if split is not None:
        raise UserError(f"{path} has no files of several splits; needed: split=null, and the path of one split")
    return tree


def _choose(path: Path, groups: dict, split: str | None):
    if split is None and len(groups) == 1:
        (split,) = groups
    elif split is None or split not in groups:
        found = ", ".join(sorted(name or "null" for name in groups))
        raise UserError(f"{path} has files of split={found}; needed: one of them{f', not {split}' if split else ''}")
    return groups[split]


def _open_tars(folder: Path, names: list[str], beside: str) -> Tree:
    tree = open_tars({f"{name}/": folder / name for name in names})
    told = {name.partition(".tar/")[0] + ".tar" for name in tree.names if split_name(name)[1] == beside}
    if bare := [name for name in names if name not in told]:
        what = f"{'labels' if beside == LABEL else 'captions'}; needed: <key>.{beside}"
        raise UserError(f"{folder / bare[0]} has no {what} beside each picture, as in WebDataset")
    return tree


def _open_parquet(folder: Path, names: list[str]) -> Tree:
    """A row group is read whole, and the last two are kept: rows are read fastest in order, or by `fetch`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{folder / names[0]} needs the package pyarrow: pip install pyarrow") from None

    files, images, starts, labels = {}, {}, {}, {}  # by name of file; starts: the first row of each row group
    for name in sorted(names):
        try:
            files[name] = file = parquet.ParquetFile(folder / name)
            images[name], label = _columns(folder / name, file.schema_arrow)
            if file.metadata.num_rows > PARQUET_ROWS:
                raise UserError(f"{folder / name} has more than {PARQUET_ROWS} rows, the most that are accepted")
            labels[name] = file.read([label]).column(0).to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"{folder / name} is damaged or no parquet file ({str(error).splitlines()[0]})") from None
        groups = file.metadata.num_row_groups
        starts[name] = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(groups))])
    lock, fetched = threading.Lock(), {}

    @lru_cache(maxsize=2)
    def group(name: str, number: int) -> pyarrow.Array:  # of bytes, or null
        parts, held = [], 0  # a few rows at a time: how large they are is known only once they are read
        for batch in files[name].iter_batches(8, row_groups=[number], columns=[images[name]]):
            held += batch.nbytes
            if held > ROW_GROUP_BYTES:
                raise UserError(f"{folder / name}: row group {number} takes over {ROW_GROUP_BYTES} bytes")
            parts.append(batch.column(0))
        column = pyarrow.chunked_array(parts).combine_chunks()
        return column.field("bytes") if pyarrow.types.is_struct(column.type) else column

    def read(name: str) -> bytes:
        if name in fetched:
            return fetched[name]
        file, _, member = name.rpartition("/")
        row = int(member.partition(".")[0])
        if split_name(name)[1] == LABEL:
            return str(labels[file][row]).encode()
        number = int(np.searchsorted(starts[file], row, "right")) - 1
        try:
            with lock:
                contents = group(file, number)[row - starts[file][number]].as_py()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{folder / file}: row group {number} is damaged ({str(error).splitlines()[0]})") from None
        if contents is None:
            raise UserError(f"{folder / file}: row {row} has no picture in it")
        return contents

    def fetch(wanted: Iterable[str]) -> None:
        fetched.clear()
        fetched.update({name: read(name) for name in sorted(wanted)})

    rows = [f"{name}/{row:08d}.{kind}" for name in files for row in range(starts[name][-1]) for kind in (LABEL, "jpg")]
    return Tree(rows, read, fetch)


def _columns(path: Path, schema) -> tuple[str, str]:
    """The names of the image column, {bytes, path} or bytes, and of the integer label column. Raises UserError."""
    from pyarrow import types

    def is_image(kind) -> bool:
        kind = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        return types.is_binary(kind) or types.is_large_binary(kind)

    images = [field.name for field in schema if is_image(field.type)]
    integers = [field.name for field in schema if types.is_integer(field.type)]
    labels = [name for name in integers if name == "label"] or integers
    if len(images) != 1 or len(labels) != 1:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(f"{path} has the columns {found}; needed: one of image bytes, and whole numbers named label")
    return images[0], labels[0]


class IdxPair(NamedTuple):
    images: Path
    labels: Path


def find_idx(source: str | Path) -> dict[str, IdxPair]:
    """{"train": files, "test": files}, or the one of them that `source` has.

    source: a folder, or `<folder>/<set>` where the files of several sets lie side by side, as EMNIST's do:
    `emnist-balanced` for emnist-balanced-train-images-idx3-ubyte.gz. Raises UserError where there are no such files, or
    those of several sets.
    """
    source = Path(source)
    folder, wanted = (source, None) if source.is_dir() else (source.parent, source.name)
    found: dict[str, dict[str, Path]] = {}  # {split: {"images" or "labels": file}}
    sets = set()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (match := IDX_NAME.fullmatch(path.name)) and wanted in (None, match[1]):
            sets.add(match[1] or "")
            split = found.setdefault("train" if match[2] == "train" else "test", {})
            split.setdefault(match[3], path)  # the plain file before its .gz
    if len(sets) > 1:
        raise UserError(f"{source} has IDX files of {', '.join(sorted(sets))}; needed: one, {source}/{max(sets)}")
    for files in found.values():
        if len(files) == 1:
            raise UserError(f"{source} has {next(iter(files.values())).name} alone; needed: images and labels")
    if not found:
        raise UserError(f"{source} has no IDX files; needed: train-images-idx3-ubyte, train-labels-idx1-ubyte, or .gz")
    return {split: IdxPair(**found[split]) for split in ("train", "test") if split in found}


def read_idx(pair: IdxPair) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (N, H, W) and labels (N,). Raises UserError for damaged files and where the counts differ."""
    labels, images = _read_array(pair.labels, 1), _read_array(pair.images, 3)
    if len(images) != len(labels):
        raise UserError(f"{pair.images} has {len(images)} images, {pair.labels.name} {len(labels)} labels")
    return images, labels


def _read_array(path: Path, ndim: int) -> np.ndarray:
    try:
        with open_regular(path) as plain, gzip.open(plain) if path.suffix == ".gz" else plain as file:
            magic = file.read(4)
            shape = tuple(np.frombuffer(file.read(4 * ndim).ljust(4 * ndim, b"\0"), ">u4").tolist())
            numbers = file.read(min(math.prod(shape), IDX_BYTES) + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is cut off or damaged ({error})") from None
    if magic != (needed := bytes((0, 0, 8, ndim))):
        raise UserError(f"{path} begins with {magic.hex(' ')}; needed: {needed.hex(' ')}, an IDX file of uint8")
    if len(numbers) != math.prod(shape) or not numbers:
        raise UserError(f"{path} has {len(numbers)} bytes of numbers; its header needs {math.prod(shape)}, {shape}")
    return np.frombuffer(numbers, np.uint8).reshape(shape)


def _open_idx(pair: IdxPair) -> Tree:
    images, labels = read_idx(pair)

    def read(name: str) -> bytes:
        row, _, kind = name.partition(".")
        return b"%d" % labels[int(row)] if kind == LABEL else as_picture(images[int(row)])

    return Tree([f"{i:08d}.{kind}" for i in range(len(labels)) for kind in (LABEL, "pgm")], read)


def as_picture(pixels: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, 3) as a file that Pillow reads: PGM or PPM."""
    height, width, *channels = pixels.shape
    return b"P%d %d %d 255\n" % (6 if channels else 5, width, height) + pixels.tobytes()
