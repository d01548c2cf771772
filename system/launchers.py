"""What a command sets for its own process, and what it takes from `accelerate launch` and `torchrun`.

None of this is done by library calls: a notebook that loads a run keeps its threads and its malloc.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

import torch

from system import UserError

# What `accelerate launch` hands on of flags by which a model may fit into memory that does not fit here.
SHARDING = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
}


def own_process() -> None:
    """Prepares a command's own process: malloc and threads for training on CPUs, and it ends with its launcher.

    Raises UserError for flags of the launcher that ask for another way to train.
    """
    refuse_sharding()
    end_with_launcher()
    if torch.cuda.is_available():
        return
    keep_freed_memory()
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone and "ACCELERATE_MIXED_PRECISION" in os.environ and torch.get_num_threads() == 1:
        torch.set_num_threads(usable_cpus())  # `accelerate launch` leaves a lone process one thread


def refuse_sharding() -> None:
    """Raises UserError where `accelerate launch` was told to divide the model among the processes."""
    for variable, flag in SHARDING.items():
        if os.environ.get(variable) == "true":
            raise UserError(f"{flag} of the launcher has no effect here; needed: train.gradient_checkpointing=true")


def launcher_arguments() -> set[str]:
    """The flags of the launcher that started this process; on Linux, and empty elsewhere."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return set()
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return set()
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return {"--" + flag[2:].replace("-", "_") for flag in flags}


def end_with_launcher() -> None:
    """On Linux the kernel sends this process SIGTERM when its launcher dies, so that it saves instead of training on.

    `accelerate launch` hands no signal on to a lone process, and no launcher survives SIGKILL or an unknown SIGUSR1.
    """
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        end_with_parent()


def end_with_parent() -> None:
    """On Linux the kernel sends this process SIGTERM when the one that started it dies."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def usable_cpus() -> int:
    """The CPUs that this process may use: not all under taskset, SLURM or a container's cpuset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def set_determinism(on: bool) -> None:
    """on: equal inputs give equal bits on a GPU too, where its backward passes otherwise add in no fixed order.

    Deterministic algorithms, attention as plain matrix products, and cuBLAS's fixed workspace, which must be chosen
    before its first product.
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.backends.cuda.enable_flash_sdp(not on)
    torch.backends.cuda.enable_mem_efficient_sdp(not on)
    torch.backends.cuda.enable_cudnn_sdp(not on)
