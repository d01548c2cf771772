"""Files that are there whole or not at all, their hashes, locks between processes, and the version of this code.

All that is written is opened by `own`, and all of strangers' that is read by `open_regular` or `read_small`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from system import UserError, warn
from system.limits import TEXT_BYTES
from system.processes import once_per_machine


def own(path: str | Path, flags: int) -> int:
    """The opener of all that is written: `open(path, "a", opener=own)`. Raises UserError for links, pipes and devices.

    Somebody who can write to the folder, or has packed it, may have put them there under our files' names. To read, a
    link is followed. Neither waits for what is at the other end of a pipe.
    """
    truncates, writes = flags & os.O_TRUNC, flags & (os.O_WRONLY | os.O_RDWR)
    try:
        opened = os.open(path, flags ^ truncates | os.O_NONBLOCK | (os.O_NOFOLLOW if writes else 0), 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise UserError(f"{path} is a link, a pipe or a device; needed: a file") from None
        raise
    kind = os.fstat(opened).st_mode
    if not stat.S_ISREG(kind):
        os.close(opened)
        raise UserError(f"{path} is a {'folder' if stat.S_ISDIR(kind) else 'pipe or a device'}; needed: a file")
    if truncates:
        os.ftruncate(opened, 0)
    return opened


def open_regular(path: Path) -> BinaryIO:
    """A file to read. Raises UserError for pipes and devices, on which reading could wait for ever."""
    return open(path, "rb", opener=own)


def read_small(path: Path, most: int = TEXT_BYTES) -> bytes:
    """The bytes of a file. Raises UserError where it has more than `most`, or is no file."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise UserError(f"{path} has {size} bytes; at most {most} are accepted")
        return file.read()


def read_json(path: Path, most: int = TEXT_BYTES) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError where it is damaged, or something else."""
    return json_object(read_small(path, most), path)


def json_object(contents: bytes, source: str | Path) -> dict[str, Any]:
    """The object in JSON. Raises UserError, which begins with `source`, where it is damaged, or something else."""
    try:
        values = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is damaged: it is not JSON ({str(error):.100})") from None
    if not isinstance(values, dict):
        raise UserError(f"{source} is damaged: it holds a {type(values).__name__}; needed: an object of keys")
    return values


def check_name(name: Any, source: str | Path) -> str:
    """The name of a file in the folder of `source`, which gives it. Raises UserError for any other."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
        raise UserError(f"{source} names a file {name!r:.100}; needed: the name of a file in that folder")
    return name


def check_no_links(folder: Path) -> None:
    """Raises UserError where something in a folder that is written to is a link, which may lead out of it.

    Those that wandb makes in its own folder are let be.
    """
    folders = [os.fspath(folder)]
    for place in folders:
        with contextlib.suppress(FileNotFoundError):  # a temporary one of a run that is training
            entries = [*os.scandir(place)]
            if link := next((entry.path for entry in entries if entry.is_symlink()), None):
                needed = "files and folders of the run's own, another run_name or another out"
                raise UserError(f"{link} is a link; needed: {needed}")
            folders += [entry.path for entry in entries if entry.is_dir() and entry.name != "wandb"]


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file to write. On success it is on disk under `path`; after any failure `path` is as it was before.

    durable: False = the system may write it to disk later.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb", opener=own) as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which is `path` in the end; after any failure there is none. OSError where one is there."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Replaces a text file as a whole."""
    with atomic_file(path) as file:
        file.write(text.encode())


def sync(path: Path) -> None:
    """Flushes a file, or a folder's names, to disk: what a rename shows is then what a power cut leaves.

    Some network file systems cannot do it with folders, and need not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_once(path: Path) -> str:
    """sha256_of, computed once per command and machine for as long as the file's size and times do not change."""
    found = path.stat()
    return _sha256_once(path.absolute(), found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@cache
def _sha256_once(path: Path, size: int, *times: int) -> str:
    return once_per_machine(f"sha256 {path} {size} {times}", lambda: sha256_of(path), seconds=30 + size / 1e8)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time. The kernel releases the lock when its holder ends, however that happens.

    Without locks (some network file systems) the work is done twice, which is harmless: files appear whole.
    """
    with open(path, "a", opener=own) as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def reserve(folder: Path) -> TextIO:
    """Locks a folder for this process until the returned file is closed. Raises UserError where another holds it.

    Without locks (some network file systems) a warning asks the user to take care.
    """
    lock = open(folder / ".lock", "a+", opener=own)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            reason = f"{folder}: this file system has no locks ({error.strerror})"
            warn(f"{reason}; no second job may use the folder meanwhile")
            return lock
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        lock.seek(0)
        owner = lock.read().strip() or "another job"
        raise UserError(f"{folder} is in use by {owner}; needed: another run_name") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def commit() -> str | None:
    """The git commit of this code, "-dirty" where files differ from it; None outside of git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
