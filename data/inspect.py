"""What is at a path: `python -m data inspect PATH`. Our shards are read whole; of other formats, a sample."""

import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data.archives import ARRAY, members, split_name
from data.encoding import LatentEncoding, guess_kind, is_moments, model_shape
from data.foreign import open_source
from data.index import build_index, cached_index, find_layout
from data.latents import Latents, mean_and_std, spread_evenly
from data.shards import SPLITS, read_encoding, read_manifest, split_shards
from randomness import seeded_generator
from system import UserError
from system.files import open_regular
from system.limits import CLASSES

MAX_ARRAYS, MAX_LABELS = 1024, 100_000  # at most so many are examined


def inspect(path: str | Path) -> dict:
    """A report on the latents at a path. Raises UserError if there are none.

    Keys: path, format, counts {split: entries}, kind, reason, stored_shape, dtype, shape, mean, std (C numbers each, of
    the model's input; of the stored numbers if the scale is unknown), flip, condition, for classes num_classes,
    labels (the number of each class; of a sample if the format is not ours) and classes (their names, if known), for
    texts text_width, text_length, text_count and text_encoder (None if unknown), wrong (a line for every fault), next
    (what to do with them).
    """
    path = Path(path)
    return _inspect_shards(path) if path.is_dir() and has_latent_shards(path) else _inspect_source(path)


def has_latent_shards(folder: Path) -> bool:
    """Whether there is a meta.json, or a tar whose first array is one of ours."""
    if read_manifest(folder):
        return True
    for shard in sorted(folder.glob("*.tar")):
        with open_regular(shard) as file:
            extensions = (split_name(member.name)[1] for member in members(file, []))
            if first := next((extension for extension in extensions if extension in (ARRAY, "latent")), None):
                return first == ARRAY
    return False


def _inspect_shards(folder: Path) -> dict:
    manifest = read_manifest(folder)
    shards = {split: names for split in SPLITS if (names := split_shards(folder, split, manifest))}
    known = manifest or asdict(find_layout([folder / name for names in shards.values() for name in names]))
    indices = {split: build_index(folder, names, known, cached_index(folder, split)) for split, names in shards.items()}
    wrong = [fault for index in indices.values() for fault in index.faults]
    index = next((index for index in indices.values() if len(index.entries)), None)
    if index is None:
        raise UserError(f"no sample in {folder}: {wrong[0] if wrong else 'no tar has train or val in its name'}")
    index.faults = []  # they are in the report
    latents = Latents(folder, manifest, index, read_encoding(folder, manifest), "stop", "none")
    report = {
        "path": str(folder),
        "format": "shards" if manifest else "shards without meta.json",
        "counts": {split: len(index.entries) for split, index in indices.items()},
        **_describe(latents.read(spread_evenly(len(latents), MAX_ARRAYS))[0], manifest, "meta.json"),
        "flip": manifest.get("flip", "none"),
        "condition": index.layout.condition,
        "wrong": wrong,
    }
    channels, height, width = report["shape"]
    size = height if height == width else f"[{height},{width}]"
    settings = [f"data.path={folder}", f"data.channels={channels}", f"data.input_size={size}"]
    entries = np.concatenate([part.entries for part in indices.values()])
    if report["condition"] == "class":
        num_classes = manifest.get("num_classes") or int(entries["label"].max()) + 1
        report |= {"num_classes": num_classes, "labels": np.bincount(entries["label"], minlength=num_classes).tolist()}
        report["classes"] = manifest.get("classes")
        settings += [f"data.num_classes={num_classes}"]
    else:
        settings += [f"data.condition={report['condition']}", "data.num_classes=null"]
    if report["condition"] == "text":
        length = manifest.get("text_length") or int(entries["length"].max())
        report |= {"text_width": index.layout.text_width, "text_length": length}
        report |= {"text_count": index.layout.text_count or 1, "text_encoder": manifest.get("text_encoder")}
        settings += [f"data.text_width={report['text_width']}", f"data.text_length={length}"]
    if manifest or report["kind"] == "sample_scaled":
        return report | {"next": f"python train.py data=folder {shlex.join(settings)}"}
    return report | {"next": f"python -m data index {shlex.quote(str(folder))} kind={report['kind']} scale=..."}


def _inspect_source(path: Path) -> dict:
    source = open_source(path)
    wrong: list[str] = []
    arrays: list[np.ndarray] = []
    for i in spread_evenly(source.count, MAX_ARRAYS).tolist():
        try:
            array = source.array(i, False)
            if arrays and array.shape != arrays[0].shape:
                raise UserError(f"{path}: image {i} is {array.shape}, others are {arrays[0].shape}")
            arrays.append(array)
        except UserError as error:
            wrong.append(str(error))
    if not arrays:
        raise UserError(f"no readable array in {path}: {wrong[0]}")
    raw = torch.from_numpy(np.stack(arrays))
    report = _describe(raw, vars(source), f"given by the format {source.format}")
    wrong += [] if torch.isfinite(raw).all() else [f"{path}: some numbers are not finite"]
    labels = [source.label(i) for i in spread_evenly(source.count, MAX_LABELS).tolist()] if source.label else [0]
    sound = 0 <= min(labels) <= max(labels) < CLASSES
    wrong += [] if sound else [f"{path}: labels {min(labels)}..{max(labels)}; needed: of 0..{CLASSES - 1}"]
    held = {"condition": "class", "num_classes": max(labels) + 1}
    held["labels"] = np.bincount(labels).tolist() if sound else []
    if source.texts:
        first = source.texts(0)
        held = {"condition": "text", "text_width": first[0].shape[1], "text_length": max(map(len, first))}
        held |= {"text_count": len(first), "text_encoder": None}
    kind = f" kind={report['kind']}" if source.kind is None else ""
    scale = " scale=..." if source.scale is None and report["kind"] != "sample_scaled" else ""
    return {
        "path": str(path),
        "format": source.format,
        "counts": {"train": (source.count - source.val) * (2 if source.flip == "both" else 1)}
        | ({"val": source.val} if source.val else {}),
        **report,
        "flip": source.flip,
        **held,
        "wrong": wrong,
        "next": f"python -m data convert {shlex.quote(str(path))} NEW_FOLDER format={source.format}{kind}{scale}",
    }


def _describe(raw: torch.Tensor, given: dict, by: str) -> dict:
    """Kind, shapes and statistics of stored arrays (B, C or 2C, h, w); a kind that is not `given` is guessed."""
    guess, reason = guess_kind(raw)
    if kind := given.get("kind"):
        reason = f"{by}; but they look like {guess}: {reason}" if is_moments(guess) != is_moments(kind) else by
    kind, x = kind or guess, raw.float()
    if kind != "sample_scaled" and given.get("scale") is not None:
        x = LatentEncoding(kind, given["scale"], given["bias"]).to_model_input(raw, seeded_generator("inspect"))
    mean, std = mean_and_std([x])
    shapes = {"stored_shape": list(raw.shape[1:]), "dtype": str(raw.dtype).removeprefix("torch.")}
    shapes["shape"] = list(model_shape(kind, raw.shape[1:]))
    return {"kind": kind, "reason": reason, **shapes, "mean": mean, "std": std}


def as_text(report: dict) -> str:
    """The report of `inspect` as text."""
    held = report["condition"]
    if held == "class":
        counts = {label: n for label, n in enumerate(report["labels"]) if n}
        least, most = min(counts.values(), default=0), max(counts.values(), default=0)
        held = f"{len(counts)} of {report['num_classes']} classes, {least} to {most} each"
        if len(counts) <= 20:
            names = report.get("classes") or range(len(report["labels"]))
            held += ": " + " ".join(f"{names[label]}:{n}" for label, n in counts.items())
    elif held == "text":
        several = f", up to {report['text_count']} of a sample" if report["text_count"] > 1 else ""
        made = f", made by {report['text_encoder']}" if report["text_encoder"] else ""
        held = f"texts of up to {report['text_length']} tokens of width {report['text_width']}{several}{made}"
    lines = {key: report[key] for key in ("path", "format")} | {
        "kind": f"{report['kind']} ({report['reason']})",
        "entries": ", ".join(f"{split} {n}" for split, n in report["counts"].items()) + f"; flip {report['flip']}",
        "stored": f"{report['dtype']} {tuple(report['stored_shape'])}; the model sees {tuple(report['shape'])}",
    }
    lines |= {key: " ".join(f"{value:.3f}" for value in report[key]) for key in ("mean", "std")}
    held = " ".join(held.split())  # a class or an encoder may be named by several lines
    lines |= {"condition": held, "wrong": "\n          ".join(report["wrong"]) or "nothing", "next": report["next"]}
    return "\n".join(f"{name:<9} {value}" for name, value in lines.items())
