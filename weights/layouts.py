"""Tensors under other projects' names and in their layouts, as ours and back, exactly.

SPRINT (`from_sprint`):

    encoder_blocks, middle_blocks, decoder_blocks    blocks, counted through
    renoise_linear                                   fusion, [deep | shallow] in both
    mlp.fc1_g over mlp.fc1_x; mlp.fc2 beside them    mlp.w12; mlp.w3
    x_embedder.proj, of (channel, row, column)       x_embedder.proj, a convolution
    final_layer.linear, to (channel, row, column)    final_layer.linear, to (row, column, channel)
    no positions but rotary ones                     pos_embed, of zeros

SiT (`reverse_time`): its time runs the other way, v(x, t) = -v_SiT(x, 1 - t). The last layer changes sign, and the
first layer after the time embedding absorbs the reflection that takes cos(t w) and sin(t w) to cos((1 - t) w) and
sin((1 - t) w).
"""

import itertools
import re
from collections.abc import Sequence

import torch

from dit import time_frequencies

Tensors = dict[str, torch.Tensor]
LABELS = "y_embedder.embedding_table.weight"
SPRINT_PATCH = 2  # of all its models; the file has no shape that tells it


def our_names(tensors: Tensors) -> Tensors:
    """Names without wrappers' prefixes: module. and _orig_mod. anywhere, and a preconditioner's model. in front."""
    wrappers = re.compile(r"(^|\.)((module|_orig_mod)\.)+")
    return {wrappers.sub(r"\1", key).removeprefix("model."): value for key, value in tensors.items()}


def num_blocks(tensors: Tensors, prefix: str = "blocks.") -> int:
    return len({key.split(".")[1] for key in tensors if key.startswith(prefix)})


def network_of(tensors: Tensors) -> dict:
    """The class of a network by its keys, under our names, with the arguments that they tell."""
    qk_norm, swiglu = (f"blocks.0.{part}.weight" in tensors for part in ("attn.q_norm", "mlp.w12"))
    if "fusion.weight" in tensors:
        norm = "rms" if "blocks.0.norm1.weight" in tensors else "layer"
        return {"_target_": "sprint.Sprint", "norm": norm, "mlp": "swiglu" if swiglu else "gelu", "qk_norm": qk_norm}
    if any(key.startswith("decoder_") for key in tensors):
        return {"_target_": "maskdit.MaskDiT", "decoder_depth": max(num_blocks(tensors, "decoder_blocks."), 1)}
    return {"_target_": "lightningdit.LightningDiT", "qk_norm": qk_norm} if swiglu else {"_target_": "dit.DiT"}


def from_sprint(tensors: Tensors, input_size: int) -> Tensors:
    """The official names and layouts -> ours (above); what is missing stays missing."""
    stages = ("encoder_blocks.", "middle_blocks.", "decoder_blocks.")
    starts = dict(zip(stages, (0, *itertools.accumulate(num_blocks(tensors, stage) for stage in stages))))
    result = {}
    for key, value in tensors.items():
        stage = next((stage for stage in stages if re.match(rf"{stage}\d+\.", key)), None)
        if stage:
            number, rest = key.removeprefix(stage).split(".", 1)
            key = f"blocks.{starts[stage] + int(number)}.{rest}"
        result[key.replace("renoise_linear.", "fusion.")] = value
    for key in [key for key in result if ".mlp.fc1_g." in key]:
        names = [key.replace("fc1_g", name) for name in ("fc1_g", "fc1_x", "fc2", "w12", "w3")]
        if result.keys() >= set(names[:3]):
            gate, value, result[names[4]] = (result.pop(name) for name in names[:3])
            result[names[3]] = torch.cat([gate, value])
    patch = SPRINT_PATCH**2
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if key in result and len(result[key]) % patch == 0:
            result[key] = result[key].unflatten(0, (-1, patch)).transpose(0, 1).flatten(0, 1)
    key = "x_embedder.proj.weight"
    if key in result and result[key].ndim == 2 and result[key].shape[1] % patch == 0:
        result[key] = result[key].unflatten(1, (-1, SPRINT_PATCH, SPRINT_PATCH))
        result["pos_embed"] = torch.zeros(1, (input_size // SPRINT_PATCH) ** 2, len(result[key]))
    return result


def reverse_time(tensors: Tensors) -> Tensors:
    """A DiT's weights of a velocity with time and sign reversed, v(x, t) -> -v(x, 1 - t); its own inverse.

    The reflected layer stays in float64, which the network rounds when it loads it: exact in both directions.
    """
    result = dict(tensors)
    w = time_frequencies().double()  # (F,)
    cos, sin = tensors["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)  # (D, F) each
    reflected = [cos * w.cos() + sin * w.sin(), cos * w.sin() - sin * w.cos()]
    result["t_embedder.mlp.0.weight"] = torch.cat(reflected, dim=1)  # (D, 2F)
    channels, patch = tensors["x_embedder.proj.weight"].shape[1:3]
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = tensors[key].unflatten(0, (patch**2, -1)).clone()  # (p * p, C_out, ...)
        rows[:, :channels] *= -1  # not the learned sigma, which has no sign
        result[key] = rows.flatten(0, 1)
    return result


def relabel(tensors: Tensors, rows: Sequence[int]) -> Tensors:
    """Tensors whose table of labels has, as row i, the row rows[i]; the last is that of no label, before and after.

    MaskDiT's has a column a class, and no label is zero. Those of a network without such a table are left as they are.
    """
    if LABELS not in tensors:
        return tensors
    table, columns = tensors[LABELS], network_of(tensors)["_target_"] == "maskdit.MaskDiT"
    picked = torch.nn.functional.pad(table.T, (0, 0, 0, 1))[list(rows)][:-1].T if columns else table[list(rows)]
    return tensors | {LABELS: picked.contiguous()}
