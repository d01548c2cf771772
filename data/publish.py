"""What all makers of shards do first, claim the folder, and last, read the shards back and write meta.json."""

import json
from pathlib import Path

from data.files import atomic_file
from data.index import build_index, save_index
from data.kinds import Channels, settled
from data.latents import Latents, open_latents
from data.manifest import FLIPS, SPLITS, read_manifest, split_shards, write_manifest
from data.scan import file_sha256
from data.stats import channel_stats


def claim(folder: Path, recipe: dict) -> None:
    """Makes the folder and notes in it what it is for, so that an interrupted job goes on and no other mixes in.

    Raises ValueError where the folder was claimed for something else or holds shards that nobody claimed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / ".recipe.json"
    text = json.dumps(recipe, sort_keys=True)
    if note.exists():
        before = json.loads(note.read_text())
        changed = [key for key in recipe if recipe[key] != before.get(key)]
        if changed:
            key = changed[0]
            raise ValueError(
                f"{folder} was begun with {key}={before.get(key)}, not {recipe[key]}; needed: the same settings, or an "
                f"empty folder"
            )
    elif any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds other shards; needed: an empty folder")
    else:
        with atomic_file(note) as file:
            file.write(text.encode())


def publish(
    folder: Path,
    *,
    kind: str,
    scale: Channels | None = None,
    bias: Channels | None = None,
    codec: dict | None = None,
    codec_sha256: str | None = None,
    flip: str = "none",
    num_classes: int | None = None,
) -> dict:
    """Writes (and returns) meta.json for the shards in a folder, and the index of each split.

    Where there is a meta.json already, the shards are held against it, and the settings do not count.
    scale, bias: of z -> z * scale + bias (kinds.py); None for sample_scaled. num_classes: None = largest label + 1.
    Raises ValueError where a shard is damaged or there is none, and for settings that do not go together.
    """
    scale, bias = settled(kind, scale, bias)
    if flip not in FLIPS:
        raise ValueError(f"flip={flip}; needed: {' or '.join(FLIPS)}")
    known = read_manifest(folder)
    if known:
        for split in known["counts"]:
            open_latents(folder, split=split)
        return known
    manifest = {"shards": [], "shape": None, "dtype": None, "num_classes": num_classes}
    indices = {}
    for split in SPLITS:
        shards = split_shards(folder, split, {})
        if not shards:
            continue
        index = build_index(folder, shards, manifest)
        if index.faults:
            raise ValueError(f"damaged data in {folder}: {index.faults[0]}")
        manifest |= {"shape": list(index.shape), "dtype": index.dtype}
        manifest["shards"] += [
            {"name": name, "split": split, "n": n, "sha256": file_sha256(folder / name)}
            for name, n in zip(shards, index.counts.tolist())
        ]
        indices[split] = index
    if not indices:
        raise ValueError(f"no shards train-*.tar in {folder}")
    manifest |= {"kind": kind, "scale": scale, "bias": bias, "codec": codec, "codec_sha256": codec_sha256, "flip": flip}
    manifest["num_classes"] = num_classes or 1 + max(int(index.entries.labels.max()) for index in indices.values())
    manifest["counts"] = {split: len(index.entries) for split, index in indices.items()}
    first = next(iter(indices.values()))
    manifest["mean"], manifest["std"] = channel_stats(Latents(folder, manifest, first, kind, "stop"))
    for split, index in indices.items():
        save_index(folder, split, index, manifest)
    write_manifest(folder, manifest)
    return manifest
