"""The files in a folder, a zip or a tar, read one at a time and never extracted."""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data.tar import MAX_MEMBER, members

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Tree(NamedTuple):
    names: list[str]  # relative, with "/", sorted
    read: Callable[[str], bytes]


def open_tree(path: Path) -> Tree:
    """Raises ValueError for what is neither of the three, or is damaged."""
    if path.is_dir():
        found = [
            Path(folder, name).relative_to(path).as_posix() for folder, _, names in os.walk(path) for name in names
        ]
        return Tree(sorted(found), lambda name: (path / name).read_bytes())
    if zipfile.is_zipfile(path):
        return _open_zip(path)
    if path.suffix == ".tar":
        return _open_tar(path)
    raise ValueError(f"{path} is {'not there' if not path.exists() else 'neither a folder, a .zip nor a .tar'}")


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def holds_pictures(path: Path) -> bool:
    """Whether a path can be opened and has pictures in it."""
    try:
        return any(map(is_picture, open_tree(path).names))
    except ValueError:
        return False


def dataset_json(root: Path, tree: Tree) -> dict[str, int] | None:
    """{relative path: label}; None where there is no such file or it says null."""
    if "dataset.json" not in tree.names:
        return None
    try:
        labels = json.loads(tree.read("dataset.json"))["labels"]
        return {name.replace("\\", "/"): int(label) for name, label in labels} if labels is not None else None
    except (ValueError, TypeError, KeyError):
        raise ValueError(f'{root}/dataset.json is not {{"labels": [[name, label], ...]}}') from None


def _open_zip(path: Path) -> Tree:
    archive = zipfile.ZipFile(path)
    sizes = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}

    def read(name: str) -> bytes:
        if sizes[name] > MAX_MEMBER:
            raise ValueError(f"{path}: {name!r} has {sizes[name]} bytes; at most {MAX_MEMBER} are accepted")
        try:
            return archive.read(name)  # compares the member's CRC
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path}: {name!r} is damaged: {error}") from None

    return Tree(sorted(sizes), read)


def _open_tar(path: Path) -> Tree:
    faults: list[str] = []
    file = open(path, "rb")  # lives as long as the closure below
    places = {member.name: (member.size, member.offset) for member in members(file, faults)}
    if faults:
        raise ValueError(f"{path} {faults[0]}")
    return Tree(sorted(places), lambda name: os.pread(file.fileno(), *places[name]))
