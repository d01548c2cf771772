"""torch.compile of a network's blocks, each on its own and in place: all blocks share their graphs, and no parameter is
renamed."""

from collections.abc import Iterable

import torch
from torch import nn

# Images x network calls x multiply-adds / square root of the number of weights, above which compiling pays for itself:
# what it saves are passes over activations. Measured on one CPU in bf16: DiT-XS/4, 800 digits, 10 steps, CFG.
WORTH_COMPILING = 2e9


def pays_to_compile(device: torch.device, macs: float, parameters: int) -> bool:
    """Whether a call of so many multiply-adds is faster with compiled blocks. False on GPUs, where it is unmeasured."""
    return device.type == "cpu" and macs / parameters**0.5 >= WORTH_COMPILING


def decide_compile(wanted: str, device: torch.device) -> tuple[str, str]:
    """(blocks or off, why it is off although blocks were wanted: this machine cannot compile)."""
    if wanted == "off":
        return "off", ""
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
        for block in blocks:
            block.compile(fullgraph=True, dynamic=dynamic)
