"""The processes of one launch: `accelerate launch`, `torchrun`, or a plain `python`."""

import os
from datetime import timedelta

import torch
from accelerate import PartialState


def start_processes(timeout_s: float = 600) -> PartialState:
    """This process's rank, device and process group, which the first call joins.

    timeout_s: seconds that the others may take to answer. Without a GPU, several processes communicate through gloo.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and not torch.cuda.is_available():
        return PartialState(cpu=True, timeout=timedelta(seconds=timeout_s))
    return PartialState(timeout=timedelta(seconds=timeout_s))
