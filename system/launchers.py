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

# What `accelerate launch` hands on by environment: its flag, and the key to use instead.
SAVES_MEMORY = "train.gradient_checkpointing=true, to save memory on plain DDP"
NOT_HONOURED = {
    "ACCELERATE_USE_FSDP": ("--use_fsdp", SAVES_MEMORY),
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", SAVES_MEMORY),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", SAVES_MEMORY),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("--use_parallelism_config", SAVES_MEMORY),
    "ACCELERATE_DYNAMO_BACKEND": ("--dynamo_backend", "train.compile=blocks, or compile=blocks when sampling"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("--gradient_accumulation_steps", "train.micro_batch_size"),
    "ACCELERATE_GRADIENT_CLIPPING": ("--gradient_clipping", "train.grad_clip"),
}
ASKS_FOR_NOTHING = ("", "0", "1", "1.0", "false", "no", "none")


def own_process() -> None:
    """For a command's own process: malloc and threads suited to training on CPUs, and an end with its launcher.

    Raises UserError for flags of the launcher that are not honoured.
    """
    refuse_flags()
    end_with_launcher()
    if torch.cuda.is_available():
        return
    keep_freed_memory()
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone and "ACCELERATE_MIXED_PRECISION" in os.environ and torch.get_num_threads() == 1:
        torch.set_num_threads(usable_cpus())  # `accelerate launch` leaves a lone process one thread


def refuse_flags() -> None:
    """Raises UserError for flags of `accelerate launch` that would change nothing here."""
    given = launcher_arguments()
    for variable, (flag, instead) in NOT_HONOURED.items():
        value = os.environ.get(variable, "")
        if not value and flag in given:  # some flags are handed on to DeepSpeed alone
            value = given[flag]
        if value.lower() not in ASKS_FOR_NOTHING or variable.startswith("ACCELERATE_USE") and value == "1":
            raise UserError(f"{flag} of the launcher is not honoured here; needed: {instead}")


def launcher_arguments() -> dict[str, str]:
    """{flag: value} of the launcher that started this process; on Linux, and empty elsewhere."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return {}
    found = {}
    for word, following in zip(words, [*words[1:], ""]):
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            found[flag.replace("-", "_").replace("__", "--", 1)] = value or following
    return found


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
    """Of this process: fewer than the machine has under taskset, SLURM or a container's cpuset."""
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
