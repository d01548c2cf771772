"""Adds a teacher's features, for alignment=repa, to latents: those of the pictures that the latents decode to.

    python scripts/add_features.py out=datasets/mnist-features
    python scripts/add_features.py data=folder data.path=LATENTS out=... teacher=vit_base_patch14_dinov2.lvd142m

The keys: configs/add_features.yaml. Pictures that are still there give sharper features: encode_latents.py features=.
An interrupted call continues where it stopped.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conditions
from autoencoder import Codec
from checkpoints.load import build_codec
from data import Latents, open_latents, prepare
from data.shards import finalize, read_manifest, reserve, shard_name, write_manifest, write_shard
from evaluation.features import load_teacher
from randomness import seeded_generator
from system import UserError, cli
from system.settings import MISSING, parse

BATCH_SIZE, SHARD_SIZE = 50, 1500


@dataclass(frozen=True)
class Addition:
    """The settings in configs/add_features.yaml."""

    data: dict[str, Any]
    out: str
    teacher: str


def main(arguments: list[str]) -> None:
    cfg = parse(Addition, cli.load_config("add_features", arguments))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path, out, teacher = cfg.data["path"], Path(cfg.out), load_teacher(cfg.teacher, device)
    if path == MISSING:
        raise UserError("data.path is missing; needed: a folder of latents (docs/data.md)")
    if cfg.data["prepare"] is not None:
        prepare(cfg.data["prepare"], path, cfg.data.get("source"))
    meta = read_manifest(Path(path))
    if not meta.get("codec"):
        raise UserError(f"{path}/meta.json does not say which VAE decodes its latents; needed: its codec")
    codec, how = build_codec(meta["codec"], device), {key: meta[key] for key in ("codec", "codec_sha256", "flip")}
    reserve(out, {"path": str(Path(path).resolve()), "teacher": cfg.teacher})
    for split in meta["counts"]:
        latents = open_latents(path, split=split, condition=meta["condition"])
        for number, start in enumerate(range(0, len(latents), SHARD_SIZE)):
            chosen, shard = range(start, min(start + SHARD_SIZE, len(latents))), out / shard_name(split, number)
            if not shard.exists():
                write_shard(shard, samples(latents, chosen, codec, teacher))
    classes = meta.get("classes") or meta["num_classes"]
    made = finalize(out, latents.encoding, **how, num_classes=classes, condition=meta["condition"])
    write_manifest(out, made | {"teacher": cfg.teacher})
    print(f"{out}: {made['counts']}, with features of {cfg.teacher}, {made['feature_shape']}")


def samples(latents: Latents, chosen: range, codec: Codec, teacher: Callable) -> Iterator[tuple]:
    """(key, array, label or text or None, features) of each of the chosen."""
    for part in (chosen[start : start + BATCH_SIZE] for start in range(0, len(chosen), BATCH_SIZE)):
        raw, condition = latents.read(part)
        keys = latents.keys(part)
        x = latents.to_model_input(raw, [seeded_generator("features", key) for key in keys])
        features = teacher(codec.decode(x)).half().cpu().numpy()  # (B, N, D_t)
        for i, key in enumerate(keys):
            yield key, raw[i].numpy(), told(conditions.rows(condition, [i])), features[i]


def told(one: conditions.Condition) -> int | np.ndarray | None:
    """A condition of one row, as shards hold it."""
    if isinstance(one, conditions.Text):
        return one.states[one.mask].numpy()
    return None if one is None else int(one)


if __name__ == "__main__":
    cli.command(main, __doc__)
