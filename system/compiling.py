"""torch.compile of a network's blocks and its final layer, each on its own and in place: all blocks share their
graphs, and no parameter is renamed."""

import torch
from torch import nn

from system import UserError

# Images x network calls x multiply-adds / width above which compiling pays for itself: what it saves are passes over
# activations, which grow as multiply-adds / width. Measured on one CPU in bf16: DiT-XS/4, 800 digits, 10 steps, CFG.
WORTH_COMPILING = 3e10


def pays_to_compile(device: torch.device, macs: float, width: int) -> bool:
    """Whether a call of so many multiply-adds is faster with compiled blocks. False on GPUs, where it is unmeasured."""
    return device.type == "cpu" and macs / width >= WORTH_COMPILING


def decide_compile(wanted: str, device: torch.device) -> tuple[str, str]:
    """(blocks or off, why it is off although blocks were wanted: this machine cannot compile). Raises UserError."""
    if wanted not in ("blocks", "off"):
        raise UserError(f"compile={wanted}; needed: blocks or off")
    if wanted == "off":
        return "off", ""
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as error:  # whatever a machine without a compiler raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return "off", f"torch.compile does not work here ({reason[:120]})"
    return "blocks", ""


def compile_blocks(model: nn.Module, decided: str, *, dynamic: bool = False) -> None:
    """Compiles in place where `decided` is "blocks". A graph break is an error, never silent.

    dynamic: False = one graph per token count, all sizes fixed: training. True = one graph for all batch sizes and
    token counts: evaluation and sampling.
    """
    if decided == "blocks":
        for part in (*model.all_blocks, model.final_layer):
            part.compile(fullgraph=True, dynamic=dynamic)
