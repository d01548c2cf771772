"""Encodes pictures into latents, ready to train on, with any diffusers AutoencoderKL.

    python scripts/encode_latents.py images=photos/ out=datasets/photos vae=stabilityai/sd-vae-ft-ema
    python scripts/encode_latents.py images=photos/ out=... vae=... features=vit_base_patch14_dinov2.lvd142m
    python scripts/encode_latents.py images=hf:ILSVRC/imagenet-1k split=train out=... vae=... shard_size=32768
    accelerate launch --num_processes 8 scripts/encode_latents.py images=imagenet/train.zip out=... vae=... flip=both

With text=<encoder> (data/texts.py), the captions in the .txt beside each picture become texts, in place of its class.
The keys: configs/encode.yaml. Each process takes every n-th shard. A shard that exists in `out` is complete: after an
interruption the same command resumes, to the same bytes as an undisturbed run. Process 0 writes meta.json last.
"""

import contextlib
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from autoencoder import VAECodec
from data.archives import CAPTIONS, LABEL
from data.convert import entries, plan_shards
from data.encoding import LatentEncoding
from data.images import Images, open_images
from data.shards import TextSource, finalize, reserve, write_manifest, write_shard
from data.texts import Encoder, captioned, load_encoder
from randomness import seeded_generator
from scripts.add_features import load_teacher
from system import UserError, cli, hub, warn
from system.files import read_json, write_text_atomic
from system.limits import MEMBER_BYTES
from system.settings import Count, Names, Positive, above, parse
from system.tensors import weights_sha256

BEGUN = ".pictures.json"  # in the folder: {name of each picture that it was begun with: its label or captions}
UNRECORDED = ("out", "on_error", "num_threads", "timeout_s", "text_length")  # which change no byte


@dataclass(frozen=True)
class Encoding:
    """The settings in configs/encode.yaml."""

    images: str
    out: str
    vae: str
    split: Literal["train", "val", "test"] | None = None
    scale: Annotated[float, above(0)] = 0.18215
    size: Positive = 256
    kind: Literal["sample_scaled", "moments_logvar", "sample", "moments"] = "sample_scaled"
    classes: Names | None = None
    flip: Literal["none", "both"] = "none"
    dtype: Literal["float16", "float32"] = "float16"
    text: str | None = None
    text_length: Positive = 77
    val: Count = 0
    shard_size: Positive = 4096
    batch_size: Positive = 32
    features: str | None = None
    on_error: Literal["stop", "skip"] = "stop"
    num_threads: Positive = 8
    timeout_s: Positive = 600

    def __post_init__(self):
        short = {"sample": "sample_scaled", "moments": "moments_logvar"}  # older names of the two
        object.__setattr__(self, "kind", short.get(self.kind, self.kind))


@dataclass(frozen=True)
class Pictures:
    """What is encoded: pictures, the label or the captions of each, and the numbers of those that are gone."""

    images: Images
    told: list
    gone: frozenset[int] = frozenset()


def main(arguments: list[str]) -> None:
    cfg = parse(Encoding, cli.load_config("encode", arguments))
    # No process group: the work is split by rank, and its results meet as files.
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    path = hub.local(cfg.images, "dataset")
    images = open_images(path, cfg.split, CAPTIONS if cfg.text else LABEL)
    others = [name for name in images.others if not cfg.text or not name.endswith(f".{CAPTIONS}")]
    if rank == 0 and others:
        counts = Counter(Path(name).suffix for name in others)
        what = ", ".join(f"{n} {suffix or 'without a suffix'}" for suffix, n in counts.most_common())
        warn(f"{cfg.images}: files that are not pictures are left out: {what}")
    if cfg.classes and (cfg.text or any(images.classes)):
        found = "text=" if cfg.text else f"the folders of {cfg.images} name them"
        raise UserError(f"classes=, and {found}; needed: one of the two")
    if cfg.classes and max(images.labels) >= len(cfg.classes):
        raise UserError(f"classes= has {len(cfg.classes)} names, and {cfg.images} a label {max(images.labels)}")
    told = images.captions if cfg.text else images.labels
    folder = Path(cfg.out)
    pictures = as_begun(folder / BEGUN, Pictures(images, told))
    if rank == 0 and pictures.gone:
        first = pictures.images.names[min(pictures.gone)]
        warn(f"{cfg.images}: {len(pictures.gone)} pictures are gone since the start, and left out: {first} first")
    shards = plan_shards(len(pictures.told), cfg.shard_size, cfg.val)
    encoder = load_encoder(cfg.text, length=cfg.text_length, device=device()) if cfg.text else None
    teacher = load_teacher(cfg.features, device()) if cfg.features else None
    codec = VAECodec(cfg.vae, cfg.scale).to(device())
    vae_sha256 = weights_sha256(codec.vae)
    recipe = {"images": os.path.realpath(path), "vae": vae_sha256}
    recipe |= {"text_sha256": encoder and encoder.sha256, "text_length": encoder and encoder.length}
    recipe = {key: value for key, value in asdict(cfg).items() if key not in UNRECORDED} | recipe
    reserve(folder, recipe)
    if not (note := folder / BEGUN).exists():
        write_text_atomic(note, json.dumps(dict(zip(images.names, told))))
    mine = {name: chosen for name, chosen in list(shards.items())[rank::world_size] if not (folder / name).exists()}
    with tqdm(total=sum(map(len, mine.values())), unit="image", disable=None if rank == 0 else True) as progress:
        for name, chosen in mine.items():
            write_shard(folder / name, encode(codec, encoder, teacher, pictures, chosen, cfg, progress))
    if rank == 0:
        wait_for_shards(folder, list(shards), cfg.timeout_s)
        finish(folder, images, cfg, vae_sha256, encoder and encoder.source)


def encode(
    codec: VAECodec, encoder: Encoder | None, teacher: Callable | None, pictures: Pictures, chosen: np.ndarray,
    cfg: Encoding, progress: tqdm,
) -> Iterator[tuple]:  # fmt: skip
    """(key, array (C or 2C, h, w), label or captions) of each entry that the chosen pictures become; and features.

    Batches begin with the shard and noise is keyed by the picture: a shard's bytes depend on nothing outside it.
    Pictures that are gone are left out, and with on_error=skip damaged ones.
    """
    how = cfg.size, cfg.batch_size, cfg.num_threads, pictures.gone
    for batch, crops, faults in pictures.images.squares(chosen, *how):
        for fault in faults.values():
            if cfg.on_error == "stop":
                raise UserError(f"{fault}; needed: on_error=skip, or the picture deleted, to go on")
            warn(f"left out (on_error=skip): {fault}")
        pixels = torch.from_numpy(crops)  # (B, 3, size, size) uint8
        made: dict[str, tuple[np.ndarray, ...]] = {}  # array, and features where there is a teacher
        for mirrored, side in ((False, pixels), (True, pixels.flip(-1)))[: 2 if cfg.flip == "both" else 1]:
            keys = [entries(image, cfg.flip)[mirrored][0] for image in batch]
            features = [] if teacher is None else [teacher(side).half().cpu().numpy()]
            made |= zip(keys, zip(latents(codec, side, keys, cfg), *features))
        there = [image for image in batch if image not in faults and image not in pictures.gone]
        told = pictures.told if encoder is None else captioned(encoder, {i: pictures.told[i] for i in there})
        for image in there:
            for key, _ in entries(image, cfg.flip):
                yield key, made[key][0], told[image], *made[key][1:]
        progress.update(len(batch))


def as_begun(note: Path, found: Pictures) -> Pictures:
    """The pictures that an encoding was begun with, as its note has them: its shards number them. Some may be gone.

    Raises UserError where others have come since, or labels or captions have changed: a class folder was renamed.
    """
    if not note.exists():
        return found
    told, before = dict(zip(found.images.names, found.told)), read_json(note, MEMBER_BYTES)
    if changed := [name for name in told if name not in before or before[name] != told[name]]:
        was = f"had {before[changed[0]]!r:.60}" if changed[0] in before else "was not there"
        raise UserError(
            f"{changed[0]} {was} when {note.parent} was begun; needed: the same pictures, or an empty folder"
        )
    gone = frozenset(i for i, name in enumerate(before) if name not in told)
    return Pictures(replace(found.images, names=list(before)), list(before.values()), gone)


def latents(codec: VAECodec, pixels: torch.Tensor, keys: list[str], cfg: Encoding) -> np.ndarray:
    """pixels (B, 3, size, size) uint8 -> scaled samples (B, C, h, w), or unscaled moments (B, 2C, h, w), as stored."""
    out = torch.cat(codec.moments(pixels), dim=1)  # (B, 2C, h, w)
    if cfg.kind == "sample_scaled":
        noise = [seeded_generator("encode", key) for key in keys]
        out = LatentEncoding("moments_logvar", cfg.scale).to_model_input(out.cpu(), noise)  # (B, C, h, w)
    return out.cpu().numpy().astype(cfg.dtype)


def wait_for_shards(folder: Path, names: list[str], timeout_s: float) -> None:
    """Returns when all shards exist. Raises UserError if no file in the folder has grown or appeared for `timeout_s`.

    A launcher ends the processes of its own machine when one of them fails, but not those of other machines.
    """
    sizes, since = {}, time.monotonic()
    while missing := [name for name in names if not (folder / name).exists()]:
        found = {}
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a temporary file that has just become a shard
                found[path.name] = path.stat().st_size
        if found != sizes:
            sizes, since = found, time.monotonic()
        elif time.monotonic() - since > timeout_s:
            raise UserError(
                f"{folder}: {len(missing)} shards are missing, {missing[0]} first, and none has grown for {timeout_s} s"
                ": has another process died? The same command resumes"
            )
        time.sleep(0.2)


def finish(folder: Path, images: Images, cfg: Encoding, vae_sha256: str, texts: TextSource | None) -> None:
    """Process 0, when all shards exist: meta.json, and what to do next."""
    codec = {"_target_": "autoencoder.VAECodec", "path": cfg.vae, "scale": cfg.scale}
    encoding = LatentEncoding(cfg.kind, None if cfg.kind == "sample_scaled" else cfg.scale)
    classes = cfg.classes or (images.classes if texts is None and any(images.classes) else None)
    about = dict(codec=codec, codec_sha256=vae_sha256, flip=cfg.flip, num_classes=classes, condition=texts)
    manifest = finalize(folder, encoding, **about)
    if cfg.features is not None:
        write_manifest(folder, manifest | {"teacher": cfg.features})
    held = "with texts" if texts else f"{manifest['num_classes']} classes"
    found = f"{folder}: {manifest['counts']}, {held}"
    print(f"{found}; look: python -m data inspect {shlex.quote(str(folder))}")


def device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    cli.command(main, __doc__)
