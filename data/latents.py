"""A data set of latents, read in place from its shards: `open_latents(path)`."""

import contextlib
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data import kinds
from data.index import Index, load_index
from data.manifest import read_manifest, split_shards
from data.tar import member_name, split_name
from randomness import Generators

MAX_OPEN_SHARDS = 256
ON_ERROR = ("stop", "skip")


def open_latents(
    path: str | Path, *, split: str = "train", kind: str | None = None, on_error: str = "stop"
) -> "Latents":
    """The latents of one split of a data folder: shards with a meta.json (manifest.py), or CompVis's without one.

    kind: one of kinds.KINDS; None takes meta.json's, and sample_scaled where there is no meta.json.
    on_error: "stop" raises at damage; "skip" leaves damaged shards and samples out, reports each in one line and counts
    it in `Latents.faults`; a sample that turns bad later is replaced by the next good one.
    Raises ValueError for a folder that is missing or has no shards, for damage, and for a kind that does not fit.
    """
    folder = Path(path)
    if on_error not in ON_ERROR:
        raise ValueError(f"unknown data.on_error={on_error}; needed: one of {', '.join(ON_ERROR)}")
    if not folder.is_dir():
        raise ValueError(
            f"no data folder {folder}; needed: a folder of latent shards, see 'Your own data' in the README"
        )
    manifest = read_manifest(folder)
    shards = split_shards(folder, split, manifest)
    if not shards:
        raise ValueError(f"no {split} shards in {folder}; python -m data inspect {folder} says what is there")
    index = load_index(folder, split, shards, manifest)
    if index.faults and on_error == "stop" or not len(index.entries):
        more = f" (and {len(index.faults) - 1} more faults)" if len(index.faults) > 1 else ""
        raise ValueError(f"damaged data in {folder}: {index.faults[0]}{more}")
    return Latents(folder, manifest, index, kind or manifest.get("kind", "sample_scaled"), on_error)


class Latents:
    """Samples of a split; made by `open_latents`, read by many processes at once.

    shape: (C, h, w) of the model's input. stored_shape, dtype: of the arrays on the disk. labels: (n,) int32.
    num_classes: meta.json's, or the largest label + 1. meta: meta.json, {} without one. fingerprint: 16 hex digits that
    change with any sample, label, scale or kind. faults: a line for everything that was left out.
    """

    def __init__(self, folder: Path, manifest: dict, index: Index, kind: str, on_error: str):
        kinds.check_kind(kind)
        if kind != manifest.get("kind", kind):
            warn(f"data.kind={kind} overrides {manifest['kind']} of {folder}/meta.json")
        self.folder, self.meta, self.kind, self.on_error = folder, manifest, kind, on_error
        self.stored_shape, self.dtype = index.shape, getattr(torch, index.dtype)
        self.shape = kinds.model_shape(kind, index.shape)
        if kind != "sample_scaled" and manifest.get("scale") is None:
            raise ValueError(
                f"{folder} is to be read as {kind} and no meta.json says the scale; "
                f"python -m data index {folder} kind={kind} scale=... writes one"
            )
        for key in ("scale", "bias"):
            kinds.check_channels(f"{key} of {folder}", manifest.get(key), self.shape[0])
        self.labels = index.entries.labels
        self.num_classes = manifest.get("num_classes") or int(self.labels.max()) + 1
        self.fingerprint = _fingerprint(index, kind, manifest.get("scale"), manifest.get("bias"))
        self.faults: list[str] = []
        self.report(index.faults)
        self._index = index
        self._row_bytes = int(np.prod(index.shape)) * np.dtype(index.dtype).itemsize
        self._files: dict[int, int] = {}  # shard number -> file descriptor
        self._constants: dict[torch.device, tuple] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """raw (B, *stored_shape) of `dtype` and labels (B,) int64; damage is raised as ValueError or reported."""
        raw, y, faults = self.read_with_faults(indices)
        self.report(faults)
        return raw, y

    def read_with_faults(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """As `read`, with the lines of what was skipped: for loader processes, whose own reports nobody would count."""
        rows = np.empty((len(indices), self._row_bytes), np.uint8)
        used, faults = np.array(indices, np.int64), []
        for i, index in enumerate(used):
            fault = self._read_row(index, rows[i])
            while fault:
                if self.on_error == "stop":
                    raise ValueError(f"damaged data in {self.folder}: {fault}")
                faults.append(fault)
                used[i] = (used[i] + 1) % len(self)
                if used[i] == index:
                    raise ValueError(f"damaged data in {self.folder}: no readable sample is left; last: {fault}")
                fault = self._read_row(used[i], rows[i])
        raw = torch.from_numpy(rows).view(self.dtype).view(len(used), *self.stored_shape)
        return raw, torch.from_numpy(self.labels[used].astype(np.int64)), faults

    def will_need(self, indices: np.ndarray) -> None:
        """Asks the system to read these samples from the disk meanwhile, neighbours together. Only a hint."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        entries, order = self._index.entries, np.sort(indices)
        for run in np.split(order, np.flatnonzero(np.diff(order) != 1) + 1):
            for part in np.split(run, np.flatnonzero(np.diff(entries.offsets[run]) <= 0) + 1):  # where a shard ends
                start = int(entries.offsets[part[0]])
                end = int(entries.offsets[part[-1]]) + int(entries.headers[part[-1]]) + self._row_bytes
                with contextlib.suppress(OSError):
                    os.posix_fadvise(self._file(self._shard(part[0])), start, end - start, os.POSIX_FADV_WILLNEED)

    def report(self, faults: Sequence[str]) -> None:
        """Counts what was left out and says it once."""
        for fault in dict.fromkeys(faults):
            if fault not in self.faults:
                self.faults.append(fault)
                warn(f"left out (data.on_error=skip): {fault}")

    def to_model_input(self, raw: torch.Tensor, generators: Generators = None) -> torch.Tensor:
        """raw (B, *stored_shape), any device -> x (B, C, h, w) float32 there, scaled; moments are drawn afresh."""
        return kinds.to_model_input(raw, self.kind, *self._scale_and_bias(raw.device), generators)

    def keys(self, indices: Sequence[int]) -> list[str]:
        """The names of samples, read back from their shards; '?' where those are damaged or gone."""
        return [self._key(index) for index in indices]

    def _scale_and_bias(self, device: torch.device) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """As numbers or as (C, 1, 1) tensors, which are moved to the device once and not at every step."""
        if device not in self._constants:
            self._constants[device] = tuple(
                value.to(device) if isinstance(value, torch.Tensor) else value
                for value in (kinds.per_channel(self.meta.get(key)) for key in ("scale", "bias"))
            )
        return self._constants[device]

    def _read_row(self, index: int, row: np.ndarray) -> str | None:
        """Fills row (bytes,) with the numbers of a sample; a line that says what is wrong, None if nothing is."""
        entries = self._index.entries
        start = int(entries.offsets[index]) + int(entries.headers[index])
        try:
            count = os.preadv(self._file(self._shard(index)), [row], start)
        except OSError as error:
            return f"{self._shard_name(index)}: {error.strerror}"
        if count == len(row) and zlib.crc32(row) == entries.crcs[index]:
            return None
        what = "is cut off" if count < len(row) else "has changed since it was indexed"
        return f"{self._shard_name(index)}: sample {self._key(index)!r} at byte {entries.offsets[index]} {what}"

    def _key(self, index: int) -> str:
        try:
            return split_name(member_name(self._file(self._shard(index)), int(self._index.entries.offsets[index])))[0]
        except OSError:
            return "?"

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._index.ends, index, side="right"))

    def _shard_name(self, index: int) -> str:
        return self._index.shards[self._shard(index)]

    def _file(self, shard: int) -> int:
        """The file descriptor of a shard. Reads carry their offsets, so forked processes may share it."""
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.folder / self._index.shards[shard], os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}, "_constants": {}}  # what belongs to one process alone

    def __del__(self):
        for fd in self.__dict__.get("_files", {}).values():
            os.close(fd)


def warn(line: str) -> None:
    """To stderr, and not to a logger, which a launcher's settings may have switched off."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def _fingerprint(index: Index, *about: object) -> str:
    digest = hashlib.sha256(json.dumps([*about, index.shape, index.dtype]).encode())
    for column in (index.entries.crcs, index.entries.labels):
        digest.update(column.tobytes())
    return digest.hexdigest()[:16]
