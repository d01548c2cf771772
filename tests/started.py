"""Commands in processes that are forked from one which has imported torch: each saves its start, 4 seconds of CPU.

`run` and `Process` take a command of one Python process, [sys.executable, file or -m module, ...], as
subprocess.run and Popen do. Nothing of this repository is imported before the fork, so a command may be that of another
checkout. What libraries read from the environment on import (OMP_NUM_THREADS, HF_HOME, CXX) is as in the tests:
commands that change it need a real start.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = (
    "accelerate", "hydra", "matplotlib.figure", "safetensors.torch", "scipy.stats", "torch._dynamo",
    "torch._inductor.compile_fx", "torch.distributed.fsdp", "torch.distributed.run", "torch.utils.data",
)  # fmt: skip


@cache
def _starter() -> socket.socket:
    """Of this process: where its starter of commands listens."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.started", str(theirs.fileno())]
    process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(lambda: (ours.close(), process.wait()))
    return ours


def free_port() -> int:
    """One that nothing listens on at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Process:
    """As subprocess.Popen, with files or descriptors as stdout and stderr; None = the starter's."""

    def __init__(self, command: Sequence, *, cwd: Path = ROOT, env: dict | None = None, stdout=None, stderr=None):
        assert command[0] == sys.executable
        self.returncode, (self.ends, theirs) = None, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        files = [stdout or 1, stderr or 2]
        files = [os.open(os.devnull, os.O_RDWR) if file == subprocess.DEVNULL else file for file in files]
        files = [theirs.fileno(), *(file if isinstance(file, int) else file.fileno() for file in files)]
        request = {"command": list(map(str, command[1:])), "cwd": str(cwd), "env": dict(env or os.environ)}
        message = json.dumps(request).encode()
        socket.send_fds(_starter(), [len(message).to_bytes(4, "big")], files)
        _starter().sendall(message)
        theirs.close()
        self.pid = json.loads(self.ends.recv(100))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.ends.settimeout(timeout)
            try:
                self.returncode = json.loads(self.ends.recv(100))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(str(self.pid), timeout) from None
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence, *, cwd: Path = ROOT, env: dict | None = None, timeout: float = 240, processes: int = 1
) -> subprocess.CompletedProcess:
    """The exit code and the output, as text. processes: as many are started, as torchrun does, on a free port."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        how = dict(cwd=cwd, stdout=out, stderr=error)
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        ranks = [address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        started = [Process(command, env=(env or os.environ) | (rank if processes > 1 else {}), **how) for rank in ranks]
        try:
            codes = [process.wait(timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        for file in (out, error):
            file.seek(0)
        return subprocess.CompletedProcess(command, max(codes, key=abs), out.read(), error.read())


def serve(requests: socket.socket) -> list[str]:
    """Forks for each request. Returns in the new process alone, as the one that was asked for -> its command."""
    while True:
        size, files, _, _ = socket.recv_fds(requests, 4, 3)
        if not size:
            os._exit(0)
        request = json.loads(requests.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        if os.fork():
            for file in files:
                os.close(file)
            continue
        requests.close()
        ends, *output = files
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if pid := os.fork():  # this process waits for the command, and says how it ended
            os.write(ends, json.dumps(pid).encode())
            os.write(ends, json.dumps(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
            os._exit(0)
        os.close(ends)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for target, file in zip((1, 2), output):
            os.dup2(file, target)
            os.close(file)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        return request["command"]


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    sys.modules.pop("tests")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    gc.freeze()  # what was imported is neither searched for garbage nor copied
    kind, *arguments = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.path[0] = os.getcwd() if kind.startswith("-") else str(Path(kind).resolve().parent)
    if kind == "-m":
        sys.argv = ["-m", *arguments[1:]]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *arguments]
        runpy.run_path(kind, run_name="__main__")
