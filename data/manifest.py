"""`meta.json`: what a folder of shards holds. Written last, so that where it lies the shards are complete.

kind, scale, bias     kinds.py; scale and bias are numbers or one number a channel (null for sample_scaled: applied)
codec                 what turns latents into pixels, as encoding recorded it; null where nobody knows
codec_sha256          of its weights, null where nobody knows
shape, dtype          of each stored array
num_classes           labels are 0..num_classes-1
flip                  "none", or "both": every image has a second entry, its mirror image's latent
counts                {split: entries}
mean, std             of each channel of the model's input
shards                [{name, split, n, sha256}]
"""

import json
from pathlib import Path

from data.files import atomic_file
from data.kinds import check_kind

SPLITS, FLIPS = ("train", "val"), ("none", "both")
FILE_NAME = "meta.json"
KEYS = "kind scale bias codec codec_sha256 shape dtype num_classes flip counts mean std shards".split()
SHARD_KEYS = "name split n sha256".split()


def read_manifest(folder: Path) -> dict:
    """The manifest of a data folder, {} where there is none; ValueError where it is not one."""
    path = folder / FILE_NAME
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    missing = [key for key in KEYS if key not in manifest] if isinstance(manifest, dict) else KEYS
    if not missing:
        missing = [key for key in SHARD_KEYS for shard in manifest["shards"] if key not in shard]
    if missing:
        raise ValueError(
            f"{path} does not say {missing[0]}; remove it, and python -m data index {folder} writes a new one"
        )
    for shard in manifest["shards"]:
        if Path(shard["name"]).name != shard["name"]:
            raise ValueError(f"{path} names a shard {shard['name']!r}; needed: the name of a file in that folder")
    check_kind(manifest["kind"])
    return manifest


def write_manifest(folder: Path, manifest: dict) -> None:
    assert sorted(manifest) == sorted(KEYS), sorted(manifest)
    with atomic_file(folder / FILE_NAME) as file:
        file.write(json.dumps(manifest, indent=1).encode() + b"\n")


def split_shards(folder: Path, split: str, manifest: dict) -> list[str]:
    """Names of a split's shards: those that the manifest lists, or without one every tar with the split in its name."""
    if manifest:
        return [shard["name"] for shard in manifest["shards"] if shard["split"] == split]
    return sorted(path.name for path in folder.glob("*.tar") if split in path.name)


def has_split(path: str | Path, split: str) -> bool:
    """Whether a data folder has shards of this split."""
    folder = Path(path)
    return folder.is_dir() and bool(split_shards(folder, split, read_manifest(folder)))
