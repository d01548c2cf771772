"""The processes of one launch (`accelerate launch`, `torchrun`, or a plain `python`), and how they stay together."""

import contextlib
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

from system import UserError, warn

CONNECTION_ERRORS = (
    torch.distributed.DistBackendError,
    torch.distributed.DistNetworkError,
    torch.distributed.DistStoreError,
)
agreements = 0  # that `together` has made so far: the same number on all processes


class Preempted(Exception):
    """Work between two steps was left, because the job has to stop."""


class OtherProcessFailed(RuntimeError):
    """Another process failed. The message says which one, and ends with its traceback."""


def start_processes(timeout_s: float = 600) -> PartialState:
    """This process's rank, device and process group; the first call joins the group.

    timeout_s: seconds that the others may take to answer. Without a GPU, several processes communicate through gloo.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and not torch.cuda.is_available():
        return PartialState(cpu=True, timeout=timedelta(seconds=timeout_s))
    return PartialState(timeout=timedelta(seconds=timeout_s))


def end_processes(seconds: float = 10.0) -> None:
    """Leaves the process group after all processes have come here, so that none ends while another still talks to it.

    The wait is limited: after the launcher's death, others may be blocked until this process has gone.
    """
    if several():
        with contextlib.suppress(RuntimeError):  # timed out, or the store died with the launcher that held it
            store().set(f"tread_ended_{torch.distributed.get_rank()}", "yes")
            ended = [f"tread_ended_{rank}" for rank in range(torch.distributed.get_world_size())]
            store().wait(ended, timedelta(seconds=seconds))
        torch.distributed.destroy_process_group()


def is_main() -> bool:
    """Whether this is the first process of the launch, also before the processes have met."""
    return int(os.environ.get("RANK", 0)) == 0


def several() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def store() -> torch.distributed.Store:
    """The process group's key-value store, which needs no collective."""
    return torch.distributed.distributed_c10d._get_default_store()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Work that ends alike on all processes: what fails on one is raised on all, so that none goes on alone.

    The process that failed raises its own error; the others UserError or OtherProcessFailed, which name it. Preempted
    on one is Preempted on all. All processes must come here. Collectives within the work need a `together` of their
    own before them.
    """
    global agreements
    own = None
    try:
        yield
    except Exception as error:
        if not several() or connection_lost(error) or getattr(error, "agreed", False):
            raise
        own = error
    if not several():
        return
    if own is not None and not isinstance(own, OtherProcessFailed):
        store().set(f"tread_failed_{agreements}", "yes")
    outcomes: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, outcome_of(own))
    agreements += 1
    failed = [(rank, *outcome) for rank, outcome in enumerate(outcomes) if outcome is not None]
    if not failed:
        return
    stopping = next((failure for failure in failed if failure[1] is Preempted), None)
    rank, kind, text = stopping or failed[0]
    if own is None or isinstance(own, OtherProcessFailed) or stopping:
        own = kind(text) if kind is Preempted else kind(f"process {rank}: {text}")
    own.agreed = True  # an outer `together` has nothing to ask any more
    raise own


def outcome_of(error: Exception | None) -> tuple[type, str] | None:
    """What the other processes raise for this one's error, and its text; None = nothing went wrong here."""
    if error is None or isinstance(error, OtherProcessFailed):
        return None
    if isinstance(error, Preempted):
        return Preempted, str(error)
    if isinstance(error, (UserError, OSError)):
        return UserError, str(error)
    return OtherProcessFailed, "".join(traceback.format_exception(error)).strip()


def other_process_failed() -> bool:
    """Whether another process has failed in the present `together`, so that the rest of the work is in vain."""
    return several() and store().check([f"tread_failed_{agreements}"])


def from_first(work: Callable[[], str]) -> str:
    """What the first process finds, on all of them."""
    if not several():
        return work()
    found = [None]
    with together():
        found[0] = work() if torch.distributed.get_rank() == 0 else None
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def once_per_machine(key: str, work: Callable[[], str], seconds: float) -> str:
    """The result of `work` on this machine's first process. Not a collective: that process may call it alone.

    The others wait `seconds` for the result, then do the work themselves. They poll: a blocking wait would keep the
    store from this process's other threads.
    """
    if not several():
        return work()
    key, deadline = f"tread {socket.gethostname()} {key}", time.monotonic() + seconds
    if int(os.environ.get("LOCAL_RANK", 0)):
        while time.monotonic() < deadline:
            if store().check([key]):
                return store().get(key).decode()
            time.sleep(0.01)
        return work()
    found = work()
    store().set(key, found)
    return found


def agree(facts: dict[str, Any], refuse: bool = True) -> None:
    """Raises UserError, on all processes, where one of them found something else than the first; or says so once."""
    if not several():
        return
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, facts)
    for rank, theirs in enumerate(found):
        for name in found[0] | theirs:
            first, other = found[0].get(name), theirs.get(name)
            if other != first:
                differing = f"{name}: process 0 has {first}, process {rank} has {other}"
                if refuse:
                    raise UserError(f"{differing}; needed: the same on all processes")
                if is_main():
                    warn(f"{differing}: bits may differ from those of equal processes")


def connection_lost(error: BaseException) -> bool:
    """Whether an error says that other processes no longer answer. gloo has no class of its own for it."""
    return isinstance(error, CONNECTION_ERRORS) or (
        isinstance(error, RuntimeError) and "/gloo/transport/" in str(error) and "enforce fail" not in str(error)
    )


def roll_call(seconds: float = 3.0) -> list[int]:
    """After a lost connection: the ranks that do not answer, as soon as one of the others has reported the error."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    deadline = time.monotonic() + seconds
    missing = list(range(world))
    with contextlib.suppress(RuntimeError):  # the store has gone, with the launcher that held it
        store().set(f"tread_alive_{rank}", "yes")
        while missing and time.monotonic() < deadline and not store().check(["tread_reported"]):
            missing = [rank for rank in missing if not store().check([f"tread_alive_{rank}"])]
            time.sleep(0.1)
    return missing


def claim_report(code: int) -> tuple[bool, int]:
    """(whether this process reports the job's error: the first that asks does, that one's exit code).

    Before the processes have met, it is the first of each machine; another one, with an error of its own, after 5 s.
    """
    if not torch.distributed.is_initialized():
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(5)  # the launcher ends this process when the first has reported its error and left
        return True, code
    own = f"{torch.distributed.get_rank()} {code}"
    try:
        reported = store().compare_set("tread_reported", "", own).decode()
    except RuntimeError:  # the store ended with the process that held it
        return True, code
    return reported == own, int(reported.split()[1])
