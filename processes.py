"""The processes of one launch: `accelerate launch`, `torchrun`, or a plain `python`."""

import ctypes
import os
from datetime import timedelta

import torch
from accelerate import PartialState


def start_processes(timeout_s: float = 600) -> PartialState:
    """This process's rank, device and group, joined at the first call; the same object's state at every later one.

    timeout_s: how long the others may take to answer. Without a GPU, several processes talk through gloo.
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
    """Lets glibc's malloc reuse a step's memory in the next one, where it would give it back and fetch it anew.

    Fetched pages have to be zeroed: 230,000 of them, a tenth of the time, in a step of DiT-B/2 at batch 16.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_MMAP_MAX, 0)  # no block apart, to be unmapped when it is freed
    mallopt(M_TRIM_THRESHOLD, -1)  # nor the end of the heap given back
