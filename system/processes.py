"""The processes of one launch: `accelerate launch`, `torchrun`, or a plain `python`."""

import ctypes
import os
from datetime import timedelta

import torch
from accelerate import PartialState


def start_processes(timeout_s: float = 600) -> PartialState:
    """This process's rank, device and process group, which the first call joins.

    timeout_s: seconds that the others may take to answer. Without a GPU, several processes communicate through gloo.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and not torch.cuda.is_available():
        return PartialState(cpu=True, timeout=timedelta(seconds=timeout_s))
    state = PartialState(timeout=timedelta(seconds=timeout_s))
    if state.device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ and torch.get_num_threads() == 1:
        torch.set_num_threads(os.cpu_count() or 1)  # `accelerate launch` leaves a lone process one thread
    return state


def keep_freed_memory() -> None:
    """Makes glibc's malloc reuse one step's memory in the next instead of returning it to the system.

    New pages must be zeroed first: 230,000 of them, a tenth of the time, in a step of DiT-B/2 at batch 16.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap too, not from maps of their own
    mallopt(M_TRIM_THRESHOLD, -1)  # and the end of the heap is never returned
