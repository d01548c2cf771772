"""Weights of other projects, and our own exports, as ckpt= takes them. Reading them runs no code.

    family   files                          the network's output                  loaded as
    dit      DiT, fast-DiT                  noise of 1000 linear-beta steps       ddpm.DDPM
    sit      SiT, LightningDiT              velocity, t = 1 is data               rf.RectifiedFlow, reversed (below)
    repa     REPA                           velocity, t = 1 is noise              rf.RectifiedFlow
    tread    TREAD                          EDM's F                               edm.EDM
    maskdit  MaskDiT                        EDM's F                               edm.EDM
    sprint   SPRINT                         velocity, t = 1 is noise              rf.RectifiedFlow, renamed (below)

A file's family follows from its layout, its arguments or its name (DiT-..., SiT-...); for any other, `ckpt=sit:FILE`
states it. SiT's time is reversed: v(x, t) = -v_SiT(x, 1 - t). Its weights are converted when they are read, exactly:
the last layer changes sign, and the first layer after the time embedding absorbs the reflection that takes cos(t w) and
sin(t w) to cos((1 - t) w) and sin((1 - t) w).

A MaskDiT's names are ours. A SPRINT's become ours when it is read, exactly (`from_sprint`):

    encoder_blocks, middle_blocks, decoder_blocks    blocks, counted through
    renoise_linear                                   fusion, [deep | shallow] in both
    mlp.fc1_g over mlp.fc1_x; mlp.fc2 beside them    mlp.w12; mlp.w3
    x_embedder.proj, of (channel, row, column)       x_embedder.proj, a convolution
    final_layer.linear, to (channel, row, column)    final_layer.linear, to (row, column, channel)
    no positions but rotary ones                     pos_embed, of zeros

It does not say its latents' side: 32, for 256 pixels; `ckpt=sprint64:FILE` states another.
"""

import argparse
import itertools
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from checkpoints.run_folder import in_todays_names
from dit import SIZES, TIME_WIDTH, time_frequencies
from system import UserError, cli
from system.instantiate import instantiate

OBJECTIVES = {
    "dit": ["objective=ddpm"],
    "sit": ["objective=rf", "objective.timesteps=uniform"],
    "repa": ["objective=rf", "objective.timesteps=uniform"],
    "tread": ["objective=edm"],
    "maskdit": ["objective=edm"],
    "sprint": ["objective=rf", "objective.timesteps=logit_normal"],
}
WEIGHTS_KEYS = {"ema": ("ema", "ema_state_dict"), "raw": ("model", "model_state_dict")}
CONFIG_KEY = "tread_config"  # the key of our exports' config, as YAML
# REPA's training heads; LightningDiT's and SPRINT's rotary angles, which we compute.
UNUSED = ("projectors.", "feat_rope.", "rel_pos_embed.")
SPRINT_PATCH = 2  # of all its models; the file has no shape that tells it


class Content(NamedTuple):
    """A file's tensors under our names, and what it says about itself."""

    tensors: dict[str, torch.Tensor]
    args: dict
    step: int


def read(
    path: Path, weights: str = "ema", family: str | None = None
) -> tuple[DictConfig, dict[str, torch.Tensor], int]:
    """(config, tensors, step) of a .pt or .safetensors file: the config has model, objective, sampler and data.

    weights: "ema" or "raw", where the file has both. family: None = as the file says. Raises UserError for a file that
    is damaged, needs code to load, has another architecture, or does not say what its network predicts.
    """
    if weights not in WEIGHTS_KEYS:
        raise UserError(f"weights={weights!r}; needed: ema or raw")
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_pt(path, weights)
    tensors = {key: value for key, value in content.tensors.items() if not key.startswith(UNUSED)}
    side = re.fullmatch(r"sprint(\d*)", family or "sprint")
    if any(key.startswith("encoder_blocks.") for key in tensors):
        if not side or int(side.group(1) or 32) % SPRINT_PATCH:
            raise UserError(
                f"{path} is a SPRINT, whose latents have an even side; needed: ckpt=sprint64:FILE for 64 x 64"
            )
        tensors, family = from_sprint(tensors, int(side.group(1) or 32)), "sprint"
    elif family and side:
        raise UserError(f"{path} is not a SPRINT; needed: ckpt=FILE, or another family in front")
    check_keys(tensors, path)
    family = family or family_of(content, path)
    config = own_config(content, path) or config_of(family, tensors, path)
    return config, reverse_time(tensors) if family == "sit" else tensors, content.step


def read_safetensors(path: Path) -> Content:
    """A safetensors file; our exports carry their config in its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file ({cli.one_line(error)})") from None
    return Content(our_names(tensors), metadata, int(metadata.get("step", 0)))


def read_pt(path: Path, weights: str) -> Content:
    """A file by torch.save: {model, ema, args}, TREAD's {model_state_dict, ema_state_dict}, or bare tensors."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # what official files have in `args`
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises a dozen kinds for files that are not its own
        asked = re.search(r"unsupported global:? (?:GLOBAL )?(\S+)", str(error), re.IGNORECASE)
        if asked:
            raise UserError(f"{path} needs code to load ({asked.group(1)}), which is never run") from None
        raise UserError(f"{path} is damaged or not a file of weights") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}; needed: a state dict or a checkpoint with one")
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
        return Content(our_names(tensors), {}, 0)
    args = loaded.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    if chosen.endswith("_state_dict"):  # TREAD's name
        args = {"layout": "tread", **args}
    step = next((loaded[key] for key in ("step", "steps") if isinstance(loaded.get(key), int)), 0)
    return Content(our_names(tensors), args, step)


def own_config(content: Content, path: Path) -> DictConfig | None:
    """The config of our own exports; None = another project's file. Raises UserError where it is damaged."""
    if CONFIG_KEY not in content.args:
        return None
    try:
        config = OmegaConf.create(content.args[CONFIG_KEY])
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{path}: its config is damaged ({cli.one_line(error)})") from None
    if not isinstance(config, DictConfig) or not {"model", "objective", "sampler", "data"} <= config.keys():
        raise UserError(f"{path}: its config is damaged; needed: model, objective, sampler and data")
    return in_todays_names(config)


def our_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without wrappers' prefixes: module. and _orig_mod. anywhere, and a preconditioner's model. in front."""
    wrappers = re.compile(r"(^|\.)((module|_orig_mod)\.)+")
    return {wrappers.sub(r"\1", key).removeprefix("model."): value for key, value in tensors.items()}


def family_of(content: Content, path: Path) -> str:
    """The project whose convention the output follows. Raises UserError where nothing says it."""
    args = content.args
    if str(args.get("layout")) in OBJECTIVES:
        return args["layout"]
    if is_maskdit(content.tensors):
        return "maskdit"
    if "enc_type" in args or any(key.startswith("projectors.") for key in content.tensors):
        return "repa"
    if "path_type" in args:
        found = (str(args["path_type"]).lower(), str(args.get("prediction")).lower())
        if found != ("linear", "velocity"):
            path_type, prediction = found
            raise UserError(f"{path} has path_type {path_type}, prediction {prediction}; needed: linear, velocity")
        return "sit"
    if is_lightning(content.tensors):
        return "sit"
    named = re.match(r"(dit|sit)\b", str(args.get("model", path.name)).lower().replace("_", "-"))
    if named:
        return named.group(1)
    raise UserError(
        f"{path} does not say what its network predicts; needed: its family as a prefix, ckpt=dit:FILE (DDPM's noise), "
        f"sit:FILE (velocity, t = 1 is data), repa:FILE (velocity, t = 1 is noise) or tread:FILE (EDM)"
    )


def check_keys(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raises UserError, with the keys that differ, for anything but our networks.

    Of the shapes it checks only those that this file relies on; `load_strictly` compares all of them.
    """
    depth = max(num_blocks(tensors), 1)
    sizes = dict(input_size=2, patch_size=2, in_channels=1, hidden_size=4, depth=depth, num_heads=1)
    if is_sprint(tensors):
        network = {"_target_": "sprint.Sprint", "selection": "random", **sprint_parts(tensors)}
        sizes["depth"] = max(depth, 5)
    elif is_maskdit(tensors):
        decoder_depth = max(num_blocks(tensors, "decoder_blocks."), 1)
        network = {"_target_": "maskdit.MaskDiT", "decoder_hidden_size": 4, "decoder_num_heads": 1}
        network |= {"decoder_depth": decoder_depth}
    elif is_lightning(tensors):
        network = {"_target_": "lightningdit.LightningDiT", "qk_norm": has_qk_norm(tensors)}
    else:
        network = {"_target_": "dit.DiT"}
    with torch.device("meta"):
        wanted = instantiate(OmegaConf.create(sizes | network)).state_dict()
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unknown:
        lists = [
            f"{len(keys)} {what}: {', '.join(keys[:6])}"
            for what, keys in (("missing", missing), ("unknown", unknown))
            if keys
        ]
        raise UserError(f"{path} is of another architecture than DiT; {'; '.join(lists)}")
    for key, like in wanted.items():
        found = tuple(tensors[key].shape)
        if len(found) != like.ndim or key == "t_embedder.mlp.0.weight" and found[1] != TIME_WIDTH:
            raise UserError(f"{path} is of another architecture than DiT; {key} has the shape {found}")


def is_lightning(tensors: dict[str, torch.Tensor]) -> bool:
    return "blocks.0.mlp.w12.weight" in tensors


def has_qk_norm(tensors: dict[str, torch.Tensor]) -> bool:
    return "blocks.0.attn.q_norm.weight" in tensors


def is_maskdit(tensors: dict[str, torch.Tensor]) -> bool:
    return any(key.startswith("decoder_") for key in tensors)


def is_sprint(tensors: dict[str, torch.Tensor]) -> bool:
    return "fusion.weight" in tensors


def sprint_parts(tensors: dict[str, torch.Tensor]) -> dict:
    """Sprint's arguments that its keys tell."""
    return {
        "norm": "rms" if "blocks.0.norm1.weight" in tensors else "layer",
        "mlp": "swiglu" if is_lightning(tensors) else "gelu",
        "qk_norm": has_qk_norm(tensors),
    }


def num_blocks(tensors: dict[str, torch.Tensor], prefix: str = "blocks.") -> int:
    return len({key.split(".")[1] for key in tensors if key.startswith(prefix)})


def from_sprint(tensors: dict[str, torch.Tensor], input_size: int) -> dict[str, torch.Tensor]:
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


def config_of(family: str, tensors: dict[str, torch.Tensor], path: Path) -> DictConfig:
    """The config that builds the network of these tensors, with the objective of its family."""
    width, channels, patch = tensors["x_embedder.proj.weight"].shape[:3]
    side = math.isqrt(tensors["pos_embed"].shape[1])
    outputs = tensors["final_layer.linear.weight"].shape[0] / patch**2
    sizes = {shape["hidden_size"]: name for name, shape in SIZES.items()}
    if width not in sizes or outputs not in (channels, 2 * channels):
        raise UserError(
            f"{path} has width {width} and {outputs:g} outputs for {channels} channels, patch {patch}; needed: one of "
            f"DiT's widths ({', '.join(map(str, sizes))}), which tell the heads, and one or two outputs a channel"
        )
    labels = tensors["y_embedder.embedding_table.weight"].shape
    config = cli.load_config("config", [
        *network_of(family, tensors), *OBJECTIVES[family],
        f"data={'mnist' if channels in (1, 3) else 'folder'}",  # pixels, or latents of SD's autoencoder,
        *["data.codec.path=null", "data.codec.scale=1.0"] * (channels not in (1, 3, 4)),  # or of one that nobody names
        f"data.channels={channels}", f"data.input_size={side * patch}",
        f"data.num_classes={labels[1] if is_maskdit(tensors) else labels[0] - 1}",
        f"model.size=DiT-{sizes[width]}/{patch}", f"model.depth={num_blocks(tensors)}",
        *[f"model.learn_sigma={outputs == 2 * channels}"] * (not is_maskdit(tensors)),
    ])  # fmt: skip
    OmegaConf.resolve(config)
    return OmegaConf.masked_copy(config, ["model", "objective", "sampler", "data"])


def network_of(family: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Overrides: the model, and those of its arguments that no other model has."""
    if is_sprint(tensors):
        inner = tensors["blocks.0.mlp.w3.weight" if is_lightning(tensors) else "blocks.0.mlp.fc2.weight"].shape[1]
        ratio = inner / tensors["pos_embed"].shape[2] * (1.5 if is_lightning(tensors) else 1)
        selection = "random" if math.isqrt(tensors["pos_embed"].shape[1]) % 2 else "structured"
        parts = sprint_parts(tensors) | {"mlp_ratio": ratio, "selection": selection, "rotary": True, "sincos": False}
        return ["model=sprint", *(f"model.{name}={value}" for name, value in parts.items())]
    if is_maskdit(tensors):
        # 16 heads at every width, as in its own code.
        shape = dict(
            hidden_size=tensors["mask_token"].shape[-1], depth=num_blocks(tensors, "decoder_blocks."), num_heads=16
        )
        return ["model=maskdit", *(f"model.decoder_{name}={value}" for name, value in shape.items())]
    if is_lightning(tensors):
        return ["model=lightningdit", f"model.qk_norm={has_qk_norm(tensors)}"]
    return ["model=tread" if family == "tread" else "model=dit"]


def reverse_time(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a velocity with time and sign reversed, v(x, t) -> -v(x, 1 - t); its own inverse.

    The reflected layer stays in float64, which the network rounds when it loads it: exact in both directions.
    """
    result = dict(tensors)
    w = time_frequencies().double()  # (F,)
    cos, sin = tensors["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)  # (D, F) each
    result["t_embedder.mlp.0.weight"] = torch.cat(
        [cos * w.cos() + sin * w.sin(), cos * w.sin() - sin * w.cos()], dim=1
    )  # (D, 2F)
    channels = tensors["x_embedder.proj.weight"].shape[1]
    patch = tensors["x_embedder.proj.weight"].shape[2] ** 2
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = tensors[key].unflatten(0, (patch, -1)).clone()  # (p * p, C_out, ...)
        rows[:, :channels] *= -1  # not the learned sigma, which has no sign
        result[key] = rows.flatten(0, 1)
    return result
