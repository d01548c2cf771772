"""Weights files as ckpt= takes them: other projects', and our own exports. Reading them runs no code.

    family   files                          the network's output                  loaded as
    dit      DiT, fast-DiT                  noise of 1000 linear-beta steps       ddpm.DDPM
    sit      SiT, LightningDiT              velocity, t = 1 is data               rf.RectifiedFlow, time reversed
    repa     REPA                           velocity, t = 1 is noise              rf.RectifiedFlow
    tread    TREAD                          EDM's F                               edm.EDM
    maskdit  MaskDiT                        EDM's F                               edm.EDM
    sprint   SPRINT                         velocity, t = 1 is noise              rf.RectifiedFlow, renamed

A file's family follows from its layout, its arguments or its name (DiT-..., SiT-...); for any other, `ckpt=sit:FILE`
states it. Arguments in a file (`args`, or LightningDiT's `config`) that ask for something else are refused. What is
reversed and renamed, and how, is in weights/layouts.py. A SPRINT does not say its latents' side: 32, for 256 pixels;
`ckpt=sprint64:FILE` states another. Its stages are read from its keys; where all blocks are counted through,
`ckpt=sprint-2-2:FILE` states how many are before and after the sparse middle.
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dit import SIZES, TIME_WIDTH
from system import UserError, warn
from system.building import build
from system.settings import read_yaml
from system.tensors import check_numbers, read_pt, read_safetensors
from weights import layouts
from weights.layouts import LABELS, Tensors, network_of, num_blocks

OBJECTIVES = {
    "dit": {"_target_": "ddpm.DDPM"},
    "sit": {"_target_": "rf.RectifiedFlow", "timesteps": "uniform"},
    "repa": {"_target_": "rf.RectifiedFlow", "timesteps": "uniform"},
    "tread": {"_target_": "edm.EDM"},
    "maskdit": {"_target_": "edm.EDM"},
    "sprint": {"_target_": "rf.RectifiedFlow", "timesteps": "logit_normal"},
}
WEIGHTS_KEYS = {"ema": ("ema", "ema_state_dict"), "raw": ("model", "model_state_dict")}
CONFIG_KEY = "tread_config"  # the key of our exports' config, as YAML
# REPA's training heads; LightningDiT's and SPRINT's rotary angles, which we compute where the key shows such a network.
UNUSED = {"projectors.": "", "feat_rope.": "blocks.0.mlp.w12.weight", "rel_pos_embed.": "mask_token"}
# What the arguments of a file may say; without them, a file is taken as its project trains by default.
ARGUMENTS = {"path_type": ("linear",), "prediction": ("velocity", "v"), "use_rope": ("true",)}
# SPRINT's, which leave no trace in its keys.
ARGUMENTS |= {"rel_pos_embed": ("rope",), "norm_type": ("layernorm", "rmsnorm"), "q_norm": ("rmsnorm", "none")}


def read(path: Path, weights: str = "ema", family: str | None = None) -> tuple[Any, Tensors, int]:
    """(values, tensors, step) of a .pt or .safetensors file; values is a config for `checkpoints.config.from_file`.

    Of our exports, which may hold a network of any class, it is the config that they carry; for files of other
    projects it has model, objective, sampler and data. weights: "ema" or "raw", where the file has both. family: None =
    as the file says, which our exports always do. Raises UserError for a file that is damaged, needs code to load, has
    another architecture, or does not say what its network predicts.
    """
    found, args, step = read_ours(path) if path.suffix == ".safetensors" else read_theirs(path, weights)
    check_numbers(found, path, path.stat().st_size)
    if CONFIG_KEY in args:
        values, tensors, family = read_yaml(str(args[CONFIG_KEY]), str(path)), found, "ours"
        if args.get("layout") == "sit":
            check_keys(tensors, path)
            family = "sit"
    else:
        check_arguments(args, family, path)
        found = layouts.our_names(found)
        unused = tuple(prefix for prefix, shown_by in UNUSED.items() if shown_by in (*found, ""))
        tensors, family, stages = renamed({k: v for k, v in found.items() if not k.startswith(unused)}, family, path)
        check_keys(tensors, path, stages)
        family = family or family_of(found, args, path)
        values = config_of(family, tensors, args, path)
        if values["model"]["_target_"] == "lightningdit.LightningDiT" and "use_rope" not in args:
            if not any(key.startswith("feat_rope.") for key in found):  # which are in the files of its own code
                warn(f"{path} has no feat_rope and does not say use_rope; taken as true")
        values["model"] |= stages
        if family != "maskdit" and len(tensors[LABELS]) == values["data"]["num_classes"]:  # without a null label
            tensors[LABELS] = torch.nn.functional.pad(tensors[LABELS], (0, 0, 0, 1))
    return values, layouts.reverse_time(tensors) if family == "sit" else tensors, step


def read_ours(path: Path) -> tuple[Tensors, dict, int]:
    """(tensors, what the file says about itself, step); our exports carry their config in its metadata."""
    tensors, metadata = read_safetensors(path)
    step = metadata.get("step", "")
    return tensors, metadata, int(step) if re.fullmatch(r"[0-9]{1,18}", step) else 0


def read_theirs(path: Path, weights: str) -> tuple[Tensors, dict, int]:
    """As read_ours, of {model, ema, args}, TREAD's {model_state_dict, ema_state_dict}, or bare tensors."""
    loaded = read_pt(path)
    known = [key for keys in WEIGHTS_KEYS.values() for key in keys if isinstance(loaded.get(key), dict)]
    chosen = next((key for key in WEIGHTS_KEYS[weights] if key in known), None)
    if known and chosen is None:
        other = "raw" if weights == "ema" else "ema"
        raise UserError(f"{path} has {', '.join(known)}, not {weights}; needed: weights={other}")
    tensors = loaded[chosen] if chosen else loaded
    if not tensors or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()):
        names = ", ".join(map(str, list(loaded)[:6])) or "nothing"
        raise UserError(f"{path} has no weights under a name that is known; it has {names}")
    if not known:
        return tensors, {}, 0
    args = {key: loaded[key] for key in ("config", "args") if loaded.get(key) is not None}
    args = {key: vars(told) if isinstance(told, argparse.Namespace) else told for key, told in args.items()}
    if not isinstance(args.get("args", {}), dict):
        raise UserError(f"{path}: its args are a {type(args['args']).__name__}; needed: names with values")
    for _ in range(3):  # they may be in sections, and in sections of these; the outer ones come first
        args = {k: v for part in args.values() if isinstance(part, dict) for k, v in part.items()} | args
    args = {str(name).replace("-", "_"): value for name, value in args.items()}
    if chosen.endswith("_state_dict"):  # TREAD's name
        args = {"layout": "tread", **args}
    step = next((loaded[key] for key in ("step", "steps") if isinstance(loaded.get(key), int)), 0)
    step = step if 0 <= step < 10**18 else 0
    return tensors, args, step


def check_arguments(args: dict, family: str | None, path: Path) -> None:
    """Raises UserError for arguments of a file that its network cannot be opened with, or not as `family`."""
    if family in ("dit", "tread", "maskdit") and "path_type" in args:
        found = f"{path} says path_type {str(args['path_type']):.40} in its arguments, of a velocity"
        raise UserError(f"{found}; needed: ckpt=FILE, or sit: or repa: in front, not {family}:")
    # LightningDiT's configs turn it on; SPRINT's networks have it anyway. A path needs a prediction beside it.
    args = {"use_rope": "use_swiglu" not in args or "network_config" in args} | args
    args = {"prediction": None} | args if "path_type" in args else args
    asked = {key: str(args[key]).lower() for key in ARGUMENTS if key in args}
    wrong = [key for key, value in asked.items() if value not in ARGUMENTS[key]]
    if wrong:
        found = ", ".join(f"{key} {asked[key]:.40}" for key in wrong)
        needed = ", ".join(f"{key} {' or '.join(ARGUMENTS[key])}" for key in wrong)
        raise UserError(f"{path} says {found} in its arguments; needed: {needed}")


def renamed(tensors: Tensors, family: str | None, path: Path) -> tuple[Tensors, str | None, dict[str, int]]:
    """A SPRINT's tensors under our names, its family, and the depths of its dense stages; others as they are.

    Raises UserError for a family that is wrong.
    """
    if any(key.startswith("encoder_blocks.") for key in tensors):
        side = re.fullmatch(r"sprint(\d*)", family or "sprint")
        if not side or int(side.group(1) or 32) % layouts.SPRINT_PATCH:
            found = f"{path} is a SPRINT, whose latents have an even side"
            raise UserError(f"{found}; needed: ckpt=sprint64:FILE for 64 x 64")
        depths = [num_blocks(tensors, f"{stage}_blocks.") for stage in ("encoder", "decoder")]
        tensors = layouts.from_sprint(tensors, int(side.group(1) or 32))
    elif "fusion.weight" in tensors:
        depths = re.fullmatch(r"sprint-(\d+)-(\d+)", family or "")
        if not depths or tensors.get("pos_embed", torch.zeros(1)).any():
            found = f"{path} is a SPRINT whose keys do not tell its stages, encoder_depth and decoder_depth"
            raise UserError(f"{found}; needed: ckpt=sprint-2-2:FILE for 2 and 2, and rotary positions alone")
        depths = map(int, depths.groups())
    elif family and family.startswith("sprint"):
        raise UserError(f"{path} is not a SPRINT; needed: ckpt=FILE, or another family in front")
    else:
        return tensors, family, {}
    return tensors, "sprint", dict(zip(("encoder_depth", "decoder_depth"), depths))


def family_of(tensors: Tensors, args: dict, path: Path) -> str:
    """The project whose convention the output follows. Raises UserError where nothing says it."""
    if str(args.get("layout")) in OBJECTIVES:
        return args["layout"]
    network = network_of(tensors)["_target_"]
    if network == "maskdit.MaskDiT":
        return "maskdit"
    if "enc_type" in args or any(key.startswith("projectors.") for key in tensors):
        return "repa"
    if "path_type" in args or network == "lightningdit.LightningDiT":
        return "sit"
    if named := re.match(r"(dit|sit)\b", str(args.get("model", path.name)).lower().replace("_", "-")):
        return named.group(1)
    raise UserError(
        f"{path} does not say what its network predicts; needed: its family as a prefix, ckpt=dit:FILE (DDPM's noise), "
        f"sit:FILE (velocity, t = 1 is data), repa:FILE (velocity, t = 1 is noise) or tread:FILE (EDM)"
    )


def labels_of(network: str, table: Sequence[int], args: dict, path: Path) -> tuple[int, float | None]:
    """(number of classes, share of labels dropped in training; None = not said) of a table of labels, by its shape.

    By the arguments; where there are none, the last row of more than one is the null label's.
    """
    share, classes = args.get("class_dropout_prob", args.get("cfg_prob")), args.get("num_classes")
    said = f"class_dropout_prob {share}, num_classes {classes}"
    try:
        share, classes = None if share is None else float(share), int(classes or 0)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{path} says {said} in its arguments; needed: numbers") from None
    if network == "maskdit.MaskDiT":  # a column a class; no label is zero
        return table[1], share
    null = table[0] > (classes or 1) if share is None else share > 0
    if table[0] - null != (classes or max(table[0] - null, 1)):
        rows = "needed: one a class and, for a class_dropout_prob above 0, one for no label"
        raise UserError(f"{path} has {table[0]} rows of labels, and says {said} in its arguments; {rows}")
    return table[0] - null, share if null else 0.0


def check_keys(tensors: Tensors, path: Path, stages: Mapping[str, int] | None = None) -> None:
    """Raises UserError, with the keys that differ, for anything but our networks.

    Of the shapes it checks only those that this file relies on; `load_strictly` compares all of them.
    """
    stages = stages or {}
    network = network_of(tensors) | stages | {"depth": max(num_blocks(tensors), sum(stages.values()) + 1)}
    with torch.device("meta"):
        wanted = build(network, torch.nn.Module, "model").state_dict()
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unknown:
        lists = {"missing": missing, "unknown": unknown}
        told = [f"{len(keys)} {what}: {', '.join(keys[:6])}" for what, keys in lists.items() if keys]
        raise UserError(f"{path} is of another architecture than DiT; {'; '.join(told)}")
    for key, like in wanted.items():
        found = tuple(tensors[key].shape)
        if len(found) != like.ndim or key == "t_embedder.mlp.0.weight" and found[1] != TIME_WIDTH:
            raise UserError(f"{path} is of another architecture than DiT; {key} has the shape {found}")


def config_of(family: str, tensors: Tensors, args: dict, path: Path) -> dict:
    """The config that builds the network of these tensors, with the objective and the sampler of its family.

    train.label_dropout is that of the file's arguments; where they do not say it, there is no `train`.
    """
    width, channels, patch = tensors["x_embedder.proj.weight"].shape[:3]
    tokens = math.isqrt(tensors["pos_embed"].shape[1])  # of a side
    outputs = tensors["final_layer.linear.weight"].shape[0] / patch**2
    sizes = {shape["hidden_size"]: name for name, shape in SIZES.items()}
    if width not in sizes or outputs not in (channels, 2 * channels):
        raise UserError(
            f"{path} has width {width} and {outputs:g} outputs for {channels} channels, patch {patch}; needed: one of "
            f"DiT's widths ({', '.join(map(str, sizes))}), which tell the heads, and one or two outputs a channel"
        )
    model = network_of(tensors)
    network = model["_target_"]
    num_classes, dropped = labels_of(network, tensors[LABELS].shape, args, path)
    if network == "maskdit.MaskDiT":  # 16 heads at every width, as in its own code
        model |= {"decoder_hidden_size": tensors["mask_token"].shape[-1], "decoder_num_heads": 16}
    else:
        model["learn_sigma"] = outputs == 2 * channels
    if network == "sprint.Sprint":
        output, ratio = ("mlp.w3", 1.5) if model["mlp"] == "swiglu" else ("mlp.fc2", 1)
        inner = tensors[f"blocks.0.{output}.weight"].shape[1]
        model["mlp_ratio"] = math.ceil(inner * ratio) / width  # SwiGLU's inner width is two thirds, rounded down
        model |= {"rotary": True, "sincos": False, "selection": "random" if tokens % 2 else "structured"}
    if network == "dit.DiT" and family == "tread":
        model["routes"] = [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -4}]
    model |= {"size": f"DiT-{sizes[width]}/{patch}", "depth": num_blocks(tensors), "input_size": tokens * patch}
    model |= {"in_channels": channels, "num_classes": num_classes}
    codec = {"_target_": "autoencoder.VAECodec"}  # with the defaults of SD's, for 4 channels
    if channels in (1, 3):
        codec = {"_target_": "autoencoder.PixelCodec"}
    elif channels != 4:  # latents of an autoencoder that nobody names
        codec |= {"path": None, "scale": 1.0}
    data = {"name": "pixels" if channels in (1, 3) else "latents", "channels": channels, "input_size": tokens * patch}
    data |= {"num_classes": num_classes, "codec": codec}
    objective = dict(OBJECTIVES[family])
    takes = "velocity" if objective["_target_"] == "rf.RectifiedFlow" else "denoised"
    # The format is that of checkpoints/config.py, which refuses any other.
    values = {"format": 1, "model": model, "objective": objective, "sampler": {"takes": takes}, "data": data}
    return values if dropped is None else values | {"train": {"label_dropout": dropped}}
