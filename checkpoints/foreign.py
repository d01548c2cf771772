"""Weights of other projects, and our own exports, as ckpt= takes them. Reading them runs no code.

    family   files                          the network's output                  loaded as
    dit      DiT, fast-DiT                  noise of 1000 linear-beta steps       ddpm.DDPM
    sit      SiT, LightningDiT              velocity, t = 1 is data               rf.RectifiedFlow, reversed (below)
    repa     REPA                           velocity, t = 1 is noise              rf.RectifiedFlow
    tread    TREAD                          EDM's F                               edm.EDM

A file's family follows from its layout, its arguments or its name (DiT-..., SiT-...); for any other, `ckpt=sit:FILE`
states it. SiT's time is reversed: v(x, t) = -v_SiT(x, 1 - t). Its weights are converted when they are read, exactly:
the last layer changes sign, and the first layer after the time embedding absorbs the reflection that takes cos(t w) and
sin(t w) to cos((1 - t) w) and sin((1 - t) w).
"""

import argparse
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
from dit import SIZES, TIME_WIDTH, DiT, time_frequencies
from lightningdit import LightningDiT
from system import UserError, cli

OBJECTIVES = {
    "dit": ["objective=ddpm"],
    "sit": ["objective=rf", "objective.timesteps=uniform"],
    "repa": ["objective=rf", "objective.timesteps=uniform"],
    "tread": ["objective=edm"],
}
WEIGHTS_KEYS = {"ema": ("ema", "ema_state_dict"), "raw": ("model", "model_state_dict")}
CONFIG_KEY = "tread_config"  # the key of our exports' config, as YAML
UNUSED = ("projectors.", "feat_rope.")  # REPA's training heads; LightningDiT's rotary angles, which we compute


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
    """Raises UserError, with the keys that differ, for anything but DiT's network and LightningDiT's.

    Of the shapes it checks only those that this file relies on; `load_strictly` compares all of them.
    """
    if any(key.startswith(("decoder_", "mask_token")) for key in tensors):
        raise UserError(
            f"{path} is a MaskDiT: its decoder is a second network of another width, which is not built here; "
            f"needed: a DiT, SiT, REPA or TREAD file"
        )
    depth = max(num_blocks(tensors), 1)
    with torch.device("meta"):
        if is_lightning(tensors):
            wanted = LightningDiT(2, 2, 1, 4, depth, 1, qk_norm=has_qk_norm(tensors)).state_dict()
        else:
            wanted = DiT(2, 2, 1, 4, depth, 1).state_dict()
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


def num_blocks(tensors: dict[str, torch.Tensor]) -> int:
    return len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})


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
    model = "lightningdit" if is_lightning(tensors) else "tread" if family == "tread" else "dit"
    config = cli.load_config("config", [
        f"model={model}", *OBJECTIVES[family],
        f"data={'mnist' if channels in (1, 3) else 'folder'}",  # pixels, or latents of SD's autoencoder,
        *["data.codec.path=null", "data.codec.scale=1.0"] * (channels not in (1, 3, 4)),  # or of one that nobody names
        f"data.channels={channels}", f"data.input_size={side * patch}",
        f"data.num_classes={tensors['y_embedder.embedding_table.weight'].shape[0] - 1}",
        f"model.size=DiT-{sizes[width]}/{patch}", f"model.depth={num_blocks(tensors)}",
        f"model.learn_sigma={outputs == 2 * channels}", *["model.qk_norm=true"] * has_qk_norm(tensors),
    ])  # fmt: skip
    OmegaConf.resolve(config)
    return OmegaConf.masked_copy(config, ["model", "objective", "sampler", "data"])


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
