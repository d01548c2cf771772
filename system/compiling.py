"""torch.compile of a network's blocks, each on its own and in place: all blocks share their graphs, and no parameter is
renamed."""

import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

# Images x network calls x multiply-adds / square root of the number of weights, above which compiling pays for itself:
# what it saves are passes over activations. Measured on one CPU in bf16: DiT-XS/4, 800 digits, 10 steps, CFG.
WORTH_COMPILING = 2e9


def pays_to_compile(device: torch.device, macs: float, parameters: int) -> bool:
    """Whether a call of so many multiply-adds is faster with compiled blocks. False on GPUs, where it is unmeasured."""
    return device.type == "cpu" and macs / parameters**0.5 >= WORTH_COMPILING


LINKED_S = 2.0  # seconds after which no linker still writes an object that it has not touched


def remove_cut_objects(folder: Path) -> None:
    """Removes shared objects that a killed compilation cut short: torch would load them, and fail, in every later run.

    A young one may be another process's, at work: it gets LINKED_S seconds.
    """
    cut = [path for path in folder.glob("**/*.so") if is_cut(path)]
    if any(time.time() - path.stat().st_mtime < LINKED_S for path in cut if path.exists()):
        time.sleep(LINKED_S)
    for path in cut:
        if is_cut(path):
            path.unlink(missing_ok=True)


def is_cut(path: Path) -> bool:
    """Whether a shared object is empty, or an ELF file (64 bits) that ends before its table of sections does."""
    try:
        with path.open("rb") as file:
            header, size = file.read(64), path.stat().st_size
    except OSError:
        return False
    if not header.startswith(b"\x7fELF"):
        return not header.strip(b"\0")
    table, entry, count = (int.from_bytes(header[at : at + n], "little") for at, n in ((40, 8), (58, 2), (60, 2)))
    return len(header) < 64 or not table or size < table + entry * count


def decide_compile(wanted: str, device: torch.device) -> tuple[str, str]:
    """(blocks or off, why it is off although blocks were wanted: this machine cannot compile)."""
    if wanted == "off":
        return "off", ""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # torch.compile imports it; no one else needs it

    remove_cut_objects(Path(cache_dir()))
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # whatever a machine without a compiler raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return "off", f"torch.compile does not work here ({reason[:120]})"
    return "blocks", ""


def compile_blocks(blocks: Iterable[nn.Module], decided: str, *, dynamic: bool = False) -> None:
    """Compiles in place where `decided` is "blocks". A graph break is an error, never silent.

    dynamic: False = one graph per token count, all sizes fixed: training. True = one graph for all batch sizes and
    token counts: evaluation and sampling.
    """
    if decided == "blocks":
        # Torch gives up after 8 graphs of one function: a sweep's networks share it, as do RWKV's selections.
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
        for block in blocks:
            block.compile(fullgraph=True, dynamic=dynamic)
