"""Folders, zips and tars: the files in them, read in place.

Nothing is ever extracted, so that a member's name cannot reach the file system. Links, devices, names that point
outside and members of absurd size are faults. Tar has checksums for its headers only: contents are checked elsewhere.
Format of tars: POSIX.1-1988 ustar with pax (`path`, `size`) and GNU long-name records.
"""

import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from system import UserError

BLOCK = 512
MAX_MEMBER = 1 << 28  # bytes; a larger member is no latent and no picture
REGULAR, DIRECTORY, PAX, PAX_GLOBAL, LONG_NAME = (b"0", b"\0", b"7"), b"5", b"x", b"g", b"L"
ARRAY, LABEL, TEXT = "latent.npy", "cls", "text.npy"  # what follows the key in a member's name
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".pgm")


class Member(NamedTuple):
    name: str
    offset: int  # of the first byte of its contents
    size: int  # bytes


def members(file: BinaryIO, faults: list[str]) -> Iterator[Member]:
    """The regular files of a tar, in order; what is wrong with it is appended to `faults`, one line each.

    Stops at the first damaged header and where the archive is cut off, since nothing after that can be trusted.
    """
    end, at, path, size_record = file.seek(0, os.SEEK_END), 0, None, None
    while True:
        header = os.pread(file.fileno(), BLOCK, at)
        if header == bytes(BLOCK):
            return
        if len(header) < BLOCK or not _checksum_holds(header):
            what = "is cut off: no end-of-archive block" if len(header) < BLOCK else "has a damaged tar header"
            faults.append(f"{what} at byte {at}")
            return
        name, size, kind = path or _name(header), _size(header, size_record), header[156:157]
        offset, path, size_record = at + BLOCK, None, None
        if size > MAX_MEMBER:
            faults.append(f"member {name!r} at byte {at} claims {size} bytes; at most {MAX_MEMBER} are accepted")
            return
        if offset + size > end:
            faults.append(f"is cut off inside member {name!r} at byte {at}: {size} bytes needed, {end - offset} there")
            return
        at = offset + -(-size // BLOCK) * BLOCK
        if kind == PAX:
            records = _pax_records(os.pread(file.fileno(), size, offset))
            path, size_record = records.get("path"), records.get("size")
        elif kind == LONG_NAME:
            path = os.pread(file.fileno(), size, offset).rstrip(b"\0").decode("utf-8", "replace")
        elif kind in REGULAR:
            name = name.removeprefix("./")
            if name.startswith("/") or ".." in name.split("/"):
                faults.append(f"member {name!r} at byte {offset - BLOCK} has a name that points outside the archive")
            else:
                yield Member(name, offset, size)
        elif kind not in (DIRECTORY, PAX_GLOBAL):
            faults.append(f"member {name!r} at byte {offset - BLOCK} is a link or a device, not a regular file")


def member_name(fd: int, offset: int) -> str:
    """The name in the header that precedes the contents at `offset`; '?' if no valid header is left there."""
    header = os.pread(fd, BLOCK, offset - BLOCK)
    return _name(header) if len(header) == BLOCK and _checksum_holds(header) else "?"


def split_name(name: str) -> tuple[str, str]:
    """'dir/key.latent.npy' -> ('dir/key', 'latent.npy'): WebDataset's keys end at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def _checksum_holds(header: bytes) -> bool:
    """Sum of the header's bytes, its own eight counted as spaces, against the octal number stored there."""
    stored = header[148:156].split(b"\0")[0].strip()
    return stored.isdigit() and _octal(stored) == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _octal(digits: bytes) -> int:
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return MAX_MEMBER + 1  # not a number: refused as too large


def _size(header: bytes, size_record: str | None) -> int:
    if size_record is not None:
        return int(size_record) if size_record.isdigit() else MAX_MEMBER + 1
    return _octal(header[124:136].split(b"\0")[0].strip())  # base-256 sizes, above 8 GiB, are not octal: refused


def _name(header: bytes) -> str:
    name, prefix = (field.split(b"\0")[0].decode("utf-8", "replace") for field in (header[:100], header[345:500]))
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _pax_records(text: bytes) -> dict[str, str]:
    """{'path': ...} from records '<length> path=...\\n'; a malformed record ends them."""
    records = {}
    while text:
        length = text.split(b" ", 1)[0]
        if not length.isdigit() or not 0 < int(length) <= len(text):
            break
        name, _, value = text[len(length) + 1 : int(length) - 1].decode("utf-8", "replace").partition("=")
        records[name], text = value, text[int(length) :]
    return records


class Tree(NamedTuple):
    names: list[str]  # relative, with "/", sorted
    read: Callable[[str], bytes]
    fetch: Callable[[list[str]], None] | None = None  # reads these ahead, in the order that is fastest


def open_tree(path: Path) -> Tree:
    """The files of a folder, a zip or a tar. Raises UserError for anything else and for damaged archives."""
    if path.is_dir():
        return Tree(sorted(_files(path)), lambda name: (path / name).read_bytes())
    if zipfile.is_zipfile(path):
        return _open_zip(path)
    if path.suffix == ".tar":
        return _open_tar(path)
    raise UserError(f"{path} is {'not there' if not path.exists() else 'neither a folder, a .zip nor a .tar'}")


def _files(folder: Path, prefix: str = "", above: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Relative paths of all files, in linked folders too; links back to a folder `above` are left out."""
    above |= {folder.resolve()}
    for entry in os.scandir(folder):
        if not entry.is_dir():
            yield prefix + entry.name
        elif Path(entry).resolve() not in above:
            yield from _files(Path(entry), f"{prefix}{entry.name}/", above)


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def holds_pictures(path: Path) -> bool:
    """Whether a path can be opened and has pictures in it."""
    try:
        return any(map(is_picture, open_tree(path).names))
    except UserError:
        return False


def dataset_json(root: Path, tree: Tree) -> dict[str, int] | None:
    """{relative path: label}; None if there is no such file or its labels are null."""
    if "dataset.json" not in tree.names:
        return None
    contents = tree.read("dataset.json")
    try:
        labels = json.loads(contents)["labels"]
        return {name.replace("\\", "/"): int(label) for name, label in labels} if labels is not None else None
    except (ValueError, TypeError, KeyError):
        raise UserError(f'{root}/dataset.json is not {{"labels": [[name, label], ...]}}') from None


def parse_number(contents: bytes, source: str) -> int:
    """The number in a `.cls` file or its like. Raises UserError, which begins with `source`, for anything else."""
    text = contents.decode("ascii", "replace").strip()
    if not re.fullmatch(r"\d{1,9}", text):
        raise UserError(f"{source} says {text[:20]!r}; needed: a whole number, 0 or more")
    return int(text)


def _open_zip(path: Path) -> Tree:
    archive = zipfile.ZipFile(path)
    sizes = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}

    def read(name: str) -> bytes:
        if sizes[name] > MAX_MEMBER:
            raise UserError(f"{path}: {name!r} has {sizes[name]} bytes; at most {MAX_MEMBER} are accepted")
        try:
            return archive.read(name)  # checks the member's CRC
        except (zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: {name!r} is damaged: {error}") from None

    return Tree(sorted(sizes), read)


def _open_tar(path: Path) -> Tree:
    faults: list[str] = []
    file = open(path, "rb")  # stays open as long as the closure below lives
    places = {member.name: (member.size, member.offset) for member in members(file, faults)}
    if faults:
        raise UserError(f"{path} {faults[0]}")
    return Tree(sorted(places), lambda name: os.pread(file.fileno(), *places[name]))
