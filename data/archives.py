"""Folders, zips and tars: the files in them, read in place; and .npy, of which numpy parses the header alone.

Nothing is ever extracted, so that a member's name cannot reach the file system. Links, devices, names that point
outside and members of absurd size are faults. Tar has checksums for its headers only: contents are checked elsewhere.
"""

import contextlib
import json
import lzma
import math
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO, NamedTuple

import numpy as np

from system import UserError
from system.files import open_regular, read_small
from system.limits import ARRAY_BYTES, CLASSES, MEMBER_BYTES

BLOCK = tarfile.BLOCKSIZE
PADDING = 1 << 16  # bytes after a tar's end in which another one is looked for
# What follows the key in a member's name
ARRAY, LABEL, TEXT, CAPTIONS, FEATURES = "latent.npy", "cls", "text.npy", "txt", "features.npy"
SYSTEM = "@eaDir", "__MACOSX", "$RECYCLE.BIN", "#recycle", "System Volume Information", "lost+found", "Thumbs.db"
HIDDEN = re.compile(rf"(?:^|/)(?:\.[^/]|(?:{'|'.join(map(re.escape, SYSTEM))})(?:/|$))")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".pgm")
NPY_VERSIONS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What zipfile raises at damaged, encrypted and unknown contents; RuntimeError and NotImplementedError among them.
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, ValueError, RuntimeError, EOFError, struct.error)


class Member(NamedTuple):
    name: str
    offset: int  # of the first byte of its contents
    size: int  # bytes


def members(file: BinaryIO, faults: list[str]) -> Iterator[Member]:
    """The regular files of a tar, in order; what is wrong with it is appended to `faults`, one line each.

    Stops at the first damaged header and where the archive is cut off, since nothing after that can be trusted: the
    standard library would end there without a word, so that its iterator cannot be used.
    """
    end, at, records = file.seek(0, os.SEEK_END), 0, {}
    while (block := os.pread(file.fileno(), BLOCK, at)) != bytes(BLOCK):
        place, offset = at, at + BLOCK
        if (header := _header(block)) is None:
            what = "is cut off: no end-of-archive block" if len(block) < BLOCK else "has a damaged tar header"
            faults.append(f"{what} at byte {at}")
            return
        name, size, kind = header
        name, size, records = records.get("path", name), records.get("size", str(size)), {}
        if not size.isdecimal() or (size := int(size)) > MEMBER_BYTES:
            faults.append(f"member {name!r} at byte {at} claims {size} bytes; at most {MEMBER_BYTES} are accepted")
            return
        if offset + size > end:
            faults.append(f"is cut off inside member {name!r} at byte {at}: {size} bytes needed, {end - offset} there")
            return
        at = offset + -(-size // BLOCK) * BLOCK
        if kind == tarfile.XHDTYPE:
            records = _pax_records(os.pread(file.fileno(), size, offset))
        elif kind == tarfile.GNUTYPE_LONGNAME:
            records = {"path": os.pread(file.fileno(), size, offset).rstrip(b"\0").decode("utf-8", "replace")}
        elif kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            name = name.removeprefix("./")
            if name.startswith("/") or ".." in name.split("/"):
                faults.append(f"member {name!r} at byte {place} has a name that points outside the archive")
            else:
                yield Member(name, offset, size)
        elif kind not in (tarfile.DIRTYPE, tarfile.XGLTYPE):
            faults.append(f"member {name!r} at byte {place} is a link or a device, not a regular file")
    if os.pread(file.fileno(), PADDING, at).strip(b"\0"):
        faults.append(f"goes on after its end at byte {at}, as tars joined by cat do; needed: one archive a file")


def sample_key(path: Path, offset: int) -> str:
    """The key of the sample whose array begins at `offset` of a tar, read back; '?' if that is not possible."""
    with contextlib.suppress(OSError, TypeError), open_regular(path) as file:
        return split_name(_header(os.pread(file.fileno(), BLOCK, offset - BLOCK))[0])[0]
    return "?"


def split_name(name: str) -> tuple[str, str]:
    """'dir/key.latent.npy' -> ('dir/key', 'latent.npy'): WebDataset's keys end at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def _header(block: bytes) -> tuple[str, int, bytes] | None:
    """(name, size, type), four times as fast as tarfile; None where the checksum, its own bytes as spaces, is wrong."""
    try:
        size, checksum = (int(block[field].split(b"\0")[0], 8) for field in (slice(124, 136), slice(148, 156)))
    except ValueError:  # sizes above 8 GiB, for one
        return None
    if len(block) < BLOCK or checksum != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        return None
    name, prefix = (field.split(b"\0")[0].decode("utf-8", "replace") for field in (block[:100], block[345:500]))
    return f"{prefix}/{name}" if prefix and block[257:263] == b"ustar\0" else name, size, block[156:157]


def _pax_records(text: bytes) -> dict[str, str]:
    """{'path': ...} from records '<length> path=...\\n'; a malformed record ends them."""
    records = {}
    while (length := text.split(b" ", 1)[0]).isdigit() and 0 < int(length) <= len(text):
        name, _, value = text[len(length) + 1 : int(length) - 1].decode("utf-8", "replace").partition("=")
        records[name], text = value, text[int(length) :]
    return records


class Tree(NamedTuple):
    names: list[str]  # relative, with "/", sorted
    read: Callable[[str], bytes]
    fetch: Callable[[list[str]], None] | None = None  # reads these ahead, in the order that is fastest
    empty: Sequence[str] = ()  # folders without files


def open_tree(path: Path) -> Tree:
    """The files of a folder, a zip or a tar. Raises UserError for anything else and for damaged archives."""
    if path.is_dir():
        names = sorted(_files(path))
        files, empty = [n for n in names if n[-1] != "/"], [n[:-1] for n in names if n[-1] == "/"]
        return Tree(files, lambda name: read_small(path / name, MEMBER_BYTES), empty=empty)
    if path.is_file() and zipfile.is_zipfile(path):
        return open_zip(path)
    if path.suffix == ".tar" and path.exists():
        return open_tars({"": path})
    raise UserError(f"{path} is {'not there' if not path.exists() else 'neither a folder, a .zip nor a .tar'}")


def _files(folder: Path, prefix: str = "", above: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Relative paths of all files, in linked folders too; links back to a folder `above` are left out.

    A folder in which there are only hidden files is among them, with a "/" at its end.
    """
    above |= {folder.resolve()}
    entries = list(os.scandir(folder))
    if prefix and all(is_hidden(prefix + entry.name) for entry in entries) and not is_hidden(prefix[:-1]):
        yield prefix
    for entry in entries:
        if not entry.is_dir():
            yield prefix + entry.name
        elif Path(entry).resolve() not in above:
            yield from _files(Path(entry), f"{prefix}{entry.name}/", above)


def open_zip(path: Path, most: int = MEMBER_BYTES) -> Tree:
    """The files of a zip, each of at most `most` bytes when it is decompressed. Raises UserError for damaged ones."""
    file = open_regular(path)
    try:
        archive = zipfile.ZipFile(file)
    except DAMAGED as error:
        raise UserError(f"{path} is damaged: {error}") from None
    found = {info.filename.replace("\\", "/"): info for info in archive.infolist()}  # as Windows writes them
    files = {name: info for name, info in found.items() if not name.endswith("/")}
    filled = {Path(name.rpartition("/")[0]) for name in files if not is_hidden(name)}
    filled |= {above for folder in filled for above in folder.parents}
    folders = [name[:-1] for name in found if name.endswith("/")]
    empty = [name for name in folders if Path(name) not in filled and not is_hidden(name)]

    def read(name: str) -> bytes:
        if (size := files[name].file_size) > most:
            raise UserError(f"{path}: {name!r} has {size} bytes; at most {most} are accepted")
        try:
            return archive.read(files[name])  # checks the member's CRC
        except DAMAGED as error:
            raise UserError(f"{path}: {name!r} is damaged or cannot be read: {error}") from None

    return Tree(sorted(files), read, empty=empty)


def open_tars(paths: Mapping[str, Path]) -> Tree:
    """The files of tars as one tree; the keys of `paths` precede their names. Raises UserError for damaged tars."""
    places: dict[str, tuple[BinaryIO, int, int]] = {}  # the files stay open as long as the tree lives
    for prefix, path in paths.items():
        file, faults = open_regular(path), []
        places |= {prefix + member.name: (file, member.size, member.offset) for member in members(file, faults)}
        if faults:
            raise UserError(f"{path} {faults[0]}")

    def read(name: str) -> bytes:
        file, size, offset = places[name]
        return os.pread(file.fileno(), size, offset)

    return Tree(sorted(places), read)


def npy_header(contents: bytes, size: int) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, whether in Fortran order, dtype, bytes of header) of a .npy file of `size` bytes; `contents` begins it.

    Raises UserError, whose first word is a verb, for other files, pickled objects, and a size that does not fit.
    """
    start = 10 + int.from_bytes(contents[8:10], "little") + 2 * (contents[6:7] == b"\2")  # no header needs 64 KiB
    shape, fortran_order, dtype = _parse_header(contents[:start])
    if dtype.hasobject:
        raise UserError("holds pickled objects, which are never read; needed: plain arrays")
    if not fits(shape, dtype, size - start):
        raise UserError(f"has {size - start} bytes of numbers, not those of {dtype} {str(shape):.100}")
    return shape, fortran_order, dtype, start


def fits(shape: tuple, dtype: np.dtype, size: int) -> bool:
    """Whether an array of this shape, which a file claims, has `size` bytes of numbers."""
    plain = len(shape) <= 8 and all(type(side) is int and 0 <= side < 2**31 for side in shape)
    return plain and size == dtype.itemsize * math.prod(shape)


@lru_cache(maxsize=64)  # all samples of a set have the same header
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    stream = BytesIO(header)
    try:  # numpy parses it as Python, which fails in many ways
        return NPY_VERSIONS[np.lib.format.read_magic(stream)](stream)
    except (ValueError, SyntaxError, TokenError, TypeError, LookupError, OverflowError, RecursionError, MemoryError):
        raise UserError("is not a .npy array") from None


def read_npy(contents: bytes | bytearray | np.memmap, source: str | Path) -> np.ndarray:
    """The array in a .npy file, in place. Raises UserError, which begins with `source`, as `npy_header`."""
    try:
        shape, fortran_order, dtype, start = npy_header(bytes(contents[: 1 << 16]), len(contents))
    except UserError as error:
        raise UserError(f"{source} {error}") from None
    return np.ndarray(shape, dtype, contents, start, order="F" if fortran_order else "C")


def read_arrays(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz that are among `keys`. Raises UserError for a damaged file and for pickled objects."""
    tree = open_zip(path, max(ARRAY_BYTES, path.stat().st_size))
    found = {key: bytearray(tree.read(f"{key}.npy")) for key in keys if f"{key}.npy" in tree.names}  # can be written to
    return {key: read_npy(contents, f"{path}: {key}") for key, contents in found.items()}


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a file is hidden, or lies in a folder that is or that a system has made: .ipynb_checkpoints, @eaDir."""
    return HIDDEN.search(name) is not None


def dataset_json(root: Path, tree: Tree) -> dict[str, int] | None:
    """{name in the tree: label}; None if there is no such file or its labels are null. It may lie in a top folder."""
    found = [name for name in tree.names if name.rpartition("/")[2] == "dataset.json" and not is_hidden(name)]
    if not found:
        return None
    if len(found) > 1 and "dataset.json" not in found:
        raise UserError(f"{root} has {len(found)} files dataset.json; needed: the path of one set")
    contents = tree.read(where := min(found, key=len))
    above = where.removesuffix("dataset.json")
    try:
        labels = json.loads(contents)["labels"]
        if labels is None:
            return None
        odd = [name for name, label in labels if int(label) != label or not 0 <= label < CLASSES or label is True]
        by_name = {above + name.replace("\\", "/"): int(label) for name, label in labels}
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise UserError(f'{root}/{where} is not {{"labels": [[name, label], ...]}}') from None
    if odd:
        raise UserError(f"{root}/{where}: the label of {odd[0]!r:.100} is no whole number of 0..{CLASSES - 1}")
    return by_name


def parse_number(contents: bytes, source: str, num_classes: int | None = None) -> int:
    """The label in a `.cls` file or its like. Raises UserError, which begins with `source`, for anything else."""
    text = contents.decode("ascii", "replace").strip()
    most = (num_classes or CLASSES) - 1
    if not re.fullmatch(r"\d{1,10}", text) or int(text) > most:
        raise UserError(f"{source} says {text[:20]!r}; needed: a whole number, 0..{most}")
    return int(text)
