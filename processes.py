"""The processes of one launch: `accelerate launch`, `torchrun`, or a plain `python`."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState


def start_processes(timeout_s: float = 600) -> PartialState:
    """This process's rank, device and group, joined at the first call; the same object's state at every later one.

    timeout_s: how long the others may take to answer. Without a GPU, several processes talk through gloo.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and not torch.cuda.is_available():
        return PartialState(cpu=True, timeout=timedelta(seconds=timeout_s))
    state = PartialState(timeout=timedelta(seconds=timeout_s))
    if state.device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ and torch.get_num_threads() == 1:
        torch.set_num_threads(os.cpu_count() or 1)  # `accelerate launch` leaves a lone process one thread of the machine
    return state
