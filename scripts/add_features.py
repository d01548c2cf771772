"""Adds a teacher's features, for alignment=repa, to latents: those of the pictures that the latents decode to.

    python scripts/add_features.py out=datasets/mnist-features
    python scripts/add_features.py data=folder data.path=LATENTS out=... teacher=vit_base_patch14_dinov2.lvd142m

The keys: configs/add_features.yaml. Where the pictures are still there, encode_latents.py features= is sharper.
An interrupted call continues where it stopped.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from autoencoder import Codec
from checkpoints.load import build_codec, load_strictly, read_tensors
from data import Latents, open_latents, prepare
from data.shards import finalize, read_manifest, reserve, shard_name, write_manifest, write_shard
from evaluation.features import ASSETS, CLASSIFIERS, Classifier
from randomness import seeded_generator
from system import UserError, cli
from system.settings import MISSING, parse

BATCH_SIZE, SHARD_SIZE = 50, 1500
TEACHERS = {name: ASSETS / f"{name}_teacher.safetensors" for name in CLASSIFIERS}  # they score nothing


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
    if not meta.get("codec") or not meta["counts"]:
        raise UserError(f"{path}/meta.json does not say which VAE decodes its latents; needed: its codec, and counts")
    if meta["condition"] == "text":
        raise UserError(f"{path} holds texts; needed: from the pictures, by encode_latents.py features=")
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
    """(key, array, label or None, features) of each of the chosen."""
    for part in (chosen[start : start + BATCH_SIZE] for start in range(0, len(chosen), BATCH_SIZE)):
        raw, condition = latents.read(part)
        keys = latents.keys(part)
        x = latents.to_model_input(raw, [seeded_generator("features", key) for key in keys])
        features = teacher(codec.decode(x)).half().cpu().numpy()  # (B, N, D_t)
        for i, key in enumerate(keys):
            yield key, raw[i].numpy(), None if condition is None else int(condition[i]), features[i]


def load_teacher(name: str, device: torch.device | str = "cpu") -> Callable:
    """A teacher by name: uint8 (B, 3, H, W) -> its features (B, N, D) float32, row by row.

    mnist, fashion: the map of a second classifier, of another seed and half of the data, before its second pooling:
    (B, 196, 64). Any other name is that of a ViT of timm: its last patch tokens, one for 16 x 16 pixels, of pictures
    that are normalised and then resized, bicubic, as REPA has them. Raises UserError where there are no such weights.
    """
    if name not in TEACHERS:
        return torch.no_grad()(PatchTokens(name).eval().to(device))
    path, net = TEACHERS[name], Classifier()
    if not path.is_file():
        raise UserError(f"no {path}; needed: python scripts/train_classifier.py data={name} teacher=true")
    load_strictly(net, read_tensors(path), str(path))
    return torch.no_grad()(net.eval().to(device).tokens)


class PatchTokens(torch.nn.Module):
    """A ViT of timm, with its published weights."""

    def __init__(self, name: str):
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UserError(f"features={name} needs the package timm: pip install timm") from None
        try:
            self.net = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True)
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            found = " ".join(str(error).split())[:200]
            raise UserError(f"features={name}: {found}; needed: a ViT of timm that has weights") from None
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.net.pretrained_cfg[key]).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images.to(self.mean.device).float() / 255 - self.mean) / self.std
        size = [side // 16 * patch for side, patch in zip(images.shape[2:], self.net.patch_embed.patch_size)]
        tokens = self.net.forward_features(F.interpolate(pixels, size, mode="bicubic"))
        return tokens[:, self.net.num_prefix_tokens :]  # without class and register tokens


if __name__ == "__main__":
    cli.command(main, __doc__)
