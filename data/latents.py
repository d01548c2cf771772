"""A data set of latents and conditions, read in place (opened by `shards.open_latents`), and its channel statistics."""

import contextlib
import hashlib
import json
import math
import os
import shlex
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from conditions import Condition, Text, TextStats, normalize
from data.archives import sample_key
from data.encoding import LatentEncoding, guess_kind, is_moments, model_shape
from data.index import NO_MORE_FILES, TEXT_FIELDS, Index, describe_sample, refuse_low_limit
from randomness import Generators, seeded_generator
from system import UserError, warn

MAX_OPEN_SHARDS = 256
MAX_SAMPLES = 4096  # for statistics, spread evenly over the set: enough for three digits
UNUSUAL = 2.5  # SD's latents have standard deviation 0.9 when scaled, 5 when not, 0.17 when scaled twice


class Latents:
    """The samples of a split; several processes may read them at once.

    condition: what `read` gives beside latents: class, text or none, which ignores what else the shards hold.
    shape: (C, h, w) of the model's input. stored_shape, dtype: of the arrays on disk. meta: contents of meta.json, {}
    without one. labels: (n,) int32; num_classes: meta.json's, or the largest label + 1; both None without classes.
    text_length, text_width: what texts are padded to, and the width of their states; text_count: the most texts of a
    sample; all 0 without texts. text_stats: what texts are normalised by, None = they stay as they are. feature_shape:
    (N, D_t) of a teacher's features, which `read` gives too; None = it does not. fingerprint: 16 hex digits that change
    with any sample, label, text, feature read, scale, kind or text_stats. faults: a line for everything that was left
    out.
    Raises UserError for an encoding that does not fit the stored shape.
    """

    def __init__(
        self, folder: Path, manifest: dict, index: Index, encoding: LatentEncoding, on_error: str, condition: str,
        features: bool = False,
    ):  # fmt: skip
        self.folder, self.meta, self.encoding, self.on_error = folder, manifest, encoding, on_error
        self.kind, self.condition = encoding.kind, condition
        self.stored_shape, self.dtype = index.layout.shape, getattr(torch, index.layout.dtype)
        self.shape = model_shape(encoding.kind, self.stored_shape)
        encoding.check_channels(self.shape[0], f" of {folder}")
        self.labels = self.num_classes = self.text_stats = None
        self.text_length = self.text_width = self.text_count = 0
        if condition == "class":
            self.labels = index.entries["label"]
            self.num_classes = manifest.get("num_classes") or int(self.labels.max()) + 1
        elif condition == "text":
            self.text_length = manifest.get("text_length") or int(index.entries["length"].max())
            self.text_width, self.text_count = index.layout.text_width, index.layout.text_count or 1
        self.feature_shape = index.layout.feature_shape if features else None
        about = [encoding.kind, manifest.get("scale"), manifest.get("bias"), self.stored_shape, index.layout.dtype]
        digest = hashlib.sha256(json.dumps(about).encode())
        for name in ("crc", "label", "text_crc", "length", *(["feature_crc"] if features else [])):
            if name in index.entries.dtype.names:
                digest.update(index.entries[name].tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        self.faults: list[str] = []
        self.report(index.faults)
        self._index = index
        self._row_bytes = math.prod(self.stored_shape) * self.dtype.itemsize
        self._token_bytes = self.text_width * np.dtype(index.layout.text_dtype).itemsize if condition == "text" else 0
        self._feature_bytes = 2 * math.prod(self.feature_shape) if features else 0
        self._files: dict[int, int] = {}  # shard number -> file descriptor

    def __len__(self) -> int:
        return len(self._index.entries)

    def set_stats(self, stats: TextStats) -> None:
        """Has texts normalised by these statistics from now on."""
        self.text_stats = stats
        digest = hashlib.sha256(self.fingerprint.encode())
        for tensor in stats:
            digest.update(tensor.numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def read(
        self, indices: Sequence[int], faults: list[str] | None = None, draws: Sequence[float] | None = None
    ) -> tuple[torch.Tensor, Condition]:
        """raw (B, *stored_shape) of `dtype` and its condition, texts being padded with zeros to text_length; and a
        teacher's features (B, N, D_t) float16 where there is a feature_shape.

        draws: numbers from [0, 1), which choose one of a sample's texts each; None = the first of each.
        Damage raises UserError or, with on_error="skip", is reported: to the list `faults`, if there is one, by loader
        processes, whose own reports would be lost.
        """
        rows = np.empty((len(indices), self._row_bytes), np.uint8)
        texts = np.empty((len(indices), self.text_length, self._token_bytes), np.uint8)
        features = np.empty((len(indices), self._feature_bytes), np.uint8)
        used, skipped = np.array(indices, np.int64), []
        chosen = np.zeros(len(used)) if draws is None else draws
        for i, index in enumerate(used.tolist()):
            while fault := self._read_sample(int(used[i]), rows[i], texts[i], chosen[i], features[i]):
                if self.on_error == "stop":
                    raise UserError(f"damaged data in {self.folder}: {fault}")
                skipped.append(fault)
                used[i] = (used[i] + 1) % len(self)
                if used[i] == index:
                    raise UserError(f"damaged data in {self.folder}: no readable sample is left; last: {fault}")
        self.report(skipped) if faults is None else faults.extend(skipped)
        raw, condition = torch.from_numpy(rows).view(self.dtype).view(len(used), *self.stored_shape), None
        if self.condition == "class":
            condition = torch.from_numpy(self.labels[used].astype(np.int64))
        elif self.condition == "text":
            states = torch.from_numpy(texts).view(getattr(torch, self._index.layout.text_dtype))  # (B, T, D)
            slots = [self._slot(i, draw) for i, draw in zip(used.tolist(), chosen)]
            lengths = torch.from_numpy(self._index.entries["length"][used, slots])
            mask = torch.arange(self.text_length) < lengths[:, None]
            condition = normalize(Text(states, mask), self.text_stats)
        if self.feature_shape is None:
            return raw, condition
        return raw, condition, torch.from_numpy(features).view(torch.float16).view(len(used), *self.feature_shape)

    def conditions(self, count: int) -> Condition:
        """Up to `count` conditions, spread evenly over the set."""
        return self.read(spread_evenly(len(self), count))[1]

    def will_need(self, indices: np.ndarray) -> None:
        """Asks the system to read these samples ahead from disk, neighbours together. Only a hint."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        first, order = "offset" if self.feature_shape is None else "feature_offset", np.sort(indices)
        offsets = self._index.entries[first]
        most = self._row_bytes + self._feature_bytes + 4096  # headers
        most += self.text_count * (self.text_length * self._token_bytes + 1024)
        for run in np.split(order, np.flatnonzero(np.diff(order) != 1) + 1):
            step = np.diff(offsets[run])
            for part in np.split(run, np.flatnonzero((step <= 0) | (step > 2 * most)) + 1):  # shard ends; features
                start, end = int(offsets[part[0]]), int(offsets[part[-1]]) + most
                with contextlib.suppress(OSError):
                    os.posix_fadvise(self._file(self._shard(part[0])), start, end - start, os.POSIX_FADV_WILLNEED)

    def report(self, faults: Sequence[str]) -> None:
        """Records what was left out, and warns of each fault once."""
        for fault in dict.fromkeys(faults):
            if fault not in self.faults:
                self.faults.append(fault)
                warn(f"left out (data.on_error=skip): {fault}")

    def to_model_input(self, raw: torch.Tensor, generators: Generators = None) -> torch.Tensor:
        """raw (B, *stored_shape), any device -> x (B, C, h, w) float32 there, scaled; moments are sampled anew."""
        return self.encoding.to_model_input(raw, generators)

    def keys(self, indices: Sequence[int]) -> list[str]:
        """The names of samples, read back from their shards; '?' if a shard is damaged or gone."""
        shards, offsets = self._index.shards, self._index.entries["offset"]
        return [sample_key(self.folder / shards[self._shard(i)], int(offsets[i])) for i in indices]

    def _slot(self, index: int, draw: float) -> int:
        """Which of a sample's texts a number from [0, 1) chooses."""
        held = np.flatnonzero(self._index.entries["length"][index])
        return int(held[int(draw * len(held))])

    def _read_sample(
        self, index: int, row: np.ndarray, text: np.ndarray, draw: float, features: np.ndarray
    ) -> str | None:
        """Fills row, features (bytes,) and text (T, bytes of a token); returns a line on what is wrong, or None."""
        entry, shard = self._index.entries[index], self._shard(index)
        parts = [(row, entry["offset"] + entry["header"], entry["crc"])]
        if self.condition == "text":
            length, offset, header, crc = (entry[name][self._slot(index, draw)] for name, _ in TEXT_FIELDS)
            text[length:] = 0
            parts += [(text[:length].reshape(-1), offset + header, crc)]
        if self.feature_shape is not None:
            parts.append((features, entry["feature_offset"] + entry["feature_header"], entry["feature_crc"]))
        for numbers, start, crc in parts:
            try:
                count = os.preadv(self._file(shard), [numbers], int(start))
            except OSError as error:
                refuse_low_limit(error)
                return f"{self._index.shards[shard]}: {error.strerror}"
            if count < len(numbers) or zlib.crc32(numbers) != crc:
                what = "is cut off" if count < len(numbers) else "has changed since it was indexed"
                path = self.folder / self._index.shards[shard]
                return f"{path.name}: {describe_sample(path, int(entry['offset']))} {what}"
        return None

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._index.ends, index, side="right"))

    def _file(self, shard: int) -> int:
        """The file descriptor of a shard. Reads carry their offsets, so forked processes may share it."""
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            try:
                self._files[shard] = os.open(self.folder / self._index.shards[shard], os.O_RDONLY | os.O_NONBLOCK)
            except OSError as error:
                if error.errno not in NO_MORE_FILES or not self._files:
                    raise
                while self._files:  # a low `ulimit -n` leaves room for fewer
                    os.close(self._files.popitem()[1])
                return self._file(shard)
        return self._files[shard]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # file descriptors belong to one process

    def __del__(self):
        for fd in self.__dict__.get("_files", {}).values():
            os.close(fd)


def spread_evenly(count: int, at_most: int) -> np.ndarray:
    """Up to `at_most` different indices (n,) in 0..count-1, ascending."""
    return np.unique(np.linspace(0, count - 1, at_most).astype(np.int64))


def mean_and_std(batches: Iterable[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Of each channel over batches x (B, C, h, w): two lists of C numbers."""
    count, total, square = 0, 0.0, 0.0
    for x in batches:
        x = x.double()
        count += x[:, 0].numel()
        total, square = total + x.sum(dim=(0, 2, 3)), square + x.square().sum(dim=(0, 2, 3))
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    return [round(v, 5) for v in mean.tolist()], [round(v, 5) for v in std.tolist()]


def channel_stats(latents: Latents, max_samples: int = MAX_SAMPLES) -> tuple[list[float], list[float]]:
    """Mean and std (C numbers each) of the model's input over at most `max_samples` samples."""
    chosen, generator = spread_evenly(len(latents), max_samples), seeded_generator("channel_stats")
    parts = np.array_split(chosen, -(-len(chosen) // 256))
    return mean_and_std(latents.to_model_input(latents.read(part)[0], generator) for part in parts)


def text_stats(latents: Latents, max_samples: int = MAX_SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std (D,) of each dimension over the tokens of all texts of at most `max_samples` samples.

    Some dimensions of an encoder hardly vary: no std is below a hundredth of the median one.
    """
    chosen, tokens, total, square = spread_evenly(len(latents), max_samples), 0, 0.0, 0.0
    counts = (latents._index.entries["length"][chosen] > 0).sum(1)  # of each sample's texts
    for number in range(latents.text_count):
        having = counts > number
        draws = (number + 0.5) / counts[having]  # which choose text `number` of each sample that has one
        for start in range(0, len(draws), 256):
            part = slice(start, start + 256)
            text = latents.read(chosen[having][part], draws=draws[part])[1]
            states = text.states[text.mask].double()  # (tokens, D)
            tokens, total, square = tokens + len(states), total + states.sum(0), square + states.square().sum(0)
    mean = total / tokens
    std = (square / tokens - mean.square()).clamp(min=0).sqrt()
    return mean.float(), std.clamp(min=max(std.median().item() / 100, 1e-6)).float()


def scale_warning(latents: Latents, sigma_data: float) -> str | None:
    """A line to print before training if the latents' scale or kind looks wrong, else None.

    sigma_data: the standard deviation that the objective expects (EDM's sigma_data; 1 for a flow to N(0, 1)).
    """
    looks, reason = guess_kind(latents.read(spread_evenly(len(latents), 64))[0])
    if is_moments(looks) and not is_moments(latents.kind):
        return f"{latents.folder} is read as {latents.kind} but looks like {looks}: {reason} (set data.kind)"
    mean, std = (np.array(values) for values in channel_stats(latents, 256))
    overall = float(np.sqrt(np.mean(std**2 + mean**2) - np.mean(mean) ** 2))
    if sigma_data / UNUSUAL <= overall <= sigma_data * UNUSUAL:
        return None
    cure = f"is their scale right? (python -m data inspect {shlex.quote(str(latents.folder))})"
    found = f"the latents in {latents.folder} have standard deviation {overall:.3g}"
    return f"{found}, the objective expects about {sigma_data:.3g}: {cure}"
