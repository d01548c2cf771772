"""Files that are there whole or not at all, their hashes, locks between processes, and the version of this code."""

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import BinaryIO, TextIO

from system import UserError
from system.processes import once_per_machine


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write. On success it is on disk under `path`; after any failure `path` is as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Gives a file that safetensors writes inside a new file's permissions: its owner alone could read it otherwise."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    yield
    path.chmod(mode)


def write_text_atomic(path: Path, text: str) -> None:
    """Replaces a text file as a whole."""
    with atomic_file(path) as file:
        file.write(text.encode())


def sync(path: Path) -> None:
    """Flushes a file, or a folder's names, to disk: what a rename shows is then what a power cut leaves."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
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
    with open(path, "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def reserve(folder: Path) -> TextIO:
    """Locks a folder for this process until the returned file is closed. Raises UserError where another holds it.

    Without locks (some network file systems) a warning asks the user to take care.
    """
    lock = open(folder / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            reason = f"{folder}: this file system has no locks ({error.strerror})"
            print(f"warning: {reason}; no second job may use the folder meanwhile", file=sys.stderr)
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
