"""What a command makes of where it was started: locale, standard output, home folder. At the door of every command."""

import getpass
import io
import locale
import os
import select
import sys
import tempfile

UNREAD_S = 5.0  # seconds after which lines that nobody takes (a paused terminal, a stuck pipe) are dropped


def settle_in() -> None:
    """UTF-8 for text in files and output, output that stops nobody, a user's name and a cache folder that are there."""
    if locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"):
        words = [word.encode("utf-8", "surrogateescape") for word in (sys.executable, *sys.orig_argv[1:])]
        os.execve(sys.executable, words, os.environ | {"PYTHONUTF8": "1"})
    for name in ("stdout", "stderr"):
        given = getattr(sys, name)
        if given is getattr(sys, f"__{name}__"):  # not a notebook's, nor a test's
            raw = Output(given.fileno()) if given is not None else open(os.devnull, "wb", buffering=0)
            text = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=True)
            setattr(sys, name, text)
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container's user, who is in no passwd
        os.environ["LOGNAME"] = f"user{os.getuid()}"
    home = os.path.expanduser("~")
    if not os.access(home, os.W_OK) and "XDG_CACHE_HOME" not in os.environ:
        os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tread-cache-")
    if not os.path.isabs(home):  # nobody knows it
        os.environ["HOME"] = os.environ["XDG_CACHE_HOME"]


class Output(io.RawIOBase):
    """Standard output that neither fails (full disks, closed pipes) nor waits for ever (what nobody reads)."""

    def __init__(self, descriptor: int):
        self.descriptor, self.waiting, self.poller = descriptor, UNREAD_S, select.poll()
        self.poller.register(descriptor, select.POLLOUT)

    def write(self, data) -> int:
        part = bytes(data[: select.PIPE_BUF])  # which a pipe that can be written to takes without waiting
        if self.poller.poll(1000 * self.waiting):
            self.waiting = UNREAD_S
            try:
                return os.write(self.descriptor, part)
            except OSError:
                return len(part)
        self.waiting = 0
        return len(part)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def fileno(self) -> int:
        return self.descriptor
