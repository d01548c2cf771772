"""Pictures on disk, for encoding and for scoring: `open_images(path)`."""

import contextlib
import struct
import zipfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from data import archives
from data.archives import CAPTIONS, LABEL, PICTURES, Tree, split_name
from data.index import MAX_TEXTS
from data.packed import SPLITS, as_picture, open_pictures
from system import UserError, warn
from system.files import open_regular
from system.limits import CAPTION_LETTERS
from system.pictures import DAMAGED, decode

DECODERS = 8  # threads; Pillow decodes without the interpreter's lock


@dataclass
class Images:
    """Pictures in the order of their names. Reading one that cannot be decoded raises UserError."""

    path: Path
    names: list[str]
    tree: Tree

    def __len__(self) -> int:
        return len(self.names)

    def fetch(self, chosen: Sequence[int]) -> None:
        """Reads these pictures, and no others, into memory, where one by one would be slow: of parquet files."""
        if self.tree.fetch:
            self.tree.fetch([self.names[i] for i in chosen])

    def read(self, i: int) -> Image.Image:
        """Picture i as a viewer shows it: turned as its EXIF orientation says, 16 bits reduced to 8, in RGB.

        Transparency is dropped. Raises UserError for several frames and for 32-bit pixels, whose range is unknown.
        """
        image = self._decode(i)
        if getattr(image, "is_animated", False) and image.format != "MPO":  # whose others are a camera's previews
            raise UserError(f"{self.path}: {self.names[i]} has {image.n_frames} frames; needed: one")
        if image.mode in ("I", "F"):
            raise UserError(f"{self.path}: {self.names[i]} has mode {image.mode}; needed: 8 or 16 bits per channel")
        with contextlib.suppress(*DAMAGED, AttributeError):  # in EXIF, which is parsed and written anew
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")

    @property
    def others(self) -> list[str]:
        """What is left out: files that are neither pictures, nor labels, nor hidden."""
        known = {*self.names, *(name for name in self.tree.names if split_name(name)[1] in (LABEL, "json"))}
        return [name for name in self.tree.names if name not in known and not archives.is_hidden(name)]

    @property
    def labels(self) -> list[int]:
        """By dataset.json, by a `.cls` beside each picture, or by class folder. Raises UserError if any is missing."""
        return self._labels_and_classes[0]

    @cached_property
    def captions(self) -> list[list[str]]:
        """By the `.txt` beside each picture, one a line. Raises UserError where there is none."""
        files, found = set(self.tree.names), []
        for name in self.names:
            beside = f"{name.rpartition('.')[0]}.{CAPTIONS}"
            text = self.tree.read(beside).decode("utf-8-sig", "replace") if beside in files else ""
            found.append([line.strip() for line in text.split("\n") if line.strip()])
            if not 1 <= len(found[-1]) <= MAX_TEXTS:
                needed = f"1 to {MAX_TEXTS} lines in {beside}"
                raise UserError(f"{self.path}: picture {name} has {len(found[-1])} captions; needed: {needed}")
            if (longest := max(map(len, found[-1]))) > CAPTION_LETTERS:
                told = f"{self.path}: {beside} has a caption of {longest} letters"
                raise UserError(f"{told}; needed: at most {CAPTION_LETTERS}")
        return found

    @property
    def classes(self) -> list[str]:
        """The class folders, empty ones too: the first folders that differ. [] if the labels are given otherwise."""
        return self._labels_and_classes[1]

    def size(self, crop: int | None = None) -> tuple[int, int]:
        """(H, W) of `batches`."""
        return (crop, crop) if crop else self._decode(0).size[::-1]

    def batches(self, batch_size: int, rows: range, crop: int | None = None) -> Iterator[torch.Tensor]:
        """uint8 (B, 3, H, W) batches of the pictures `rows`, in order, for scoring: the pixels as they are stored, or
        squares of the side `crop`, as for encoding.

        Grey pictures become three equal channels, with a warning. Raises UserError, where they are not cropped, for
        anything but 8-bit grey or RGB, and for mixed sizes.
        """
        first = self._decode(0)
        if first.mode in ("L", "1"):
            warn(f"{self.path} holds grey images, repeated to three channels")

        def pixels(i: int) -> np.ndarray:
            if crop:
                return center_crop(self.read(i), crop).transpose(1, 2, 0)
            image = self._decode(i)
            if image.mode not in ("L", "RGB", "P", "1"):
                raise UserError(f"{self.path}: {self.names[i]} has mode {image.mode}; needed: 8-bit grey or RGB")
            if image.size != first.size:
                found, wanted = ("x".join(map(str, other.size)) for other in (image, first))
                named = f"{self.names[i]} is {found}, {self.names[0]} is {wanted}"
                raise UserError(f"{self.path}: {named}; needed: one size, or crop=SIDE, which makes squares of them")
            return np.asarray(image.convert("RGB"))

        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        for number, batch in enumerate(decoded_ahead(parts, pixels, DECODERS)):
            if number == 0 and batch.max() <= 1:
                told = f"the first {len(batch)} pictures of {self.path} hold no pixel above 1, of 255"
                warn(f"{told}: were numbers of 0..1 stored as uint8?")
            yield torch.from_numpy(batch.transpose(0, 3, 1, 2).copy())

    def squares(
        self, chosen: np.ndarray, size: int, batch_size: int, num_threads: int = DECODERS, gone: Container[int] = ()
    ) -> Iterator[tuple[list[int], np.ndarray, dict[int, str]]]:
        """Of batches of the chosen pictures their numbers, center crops uint8 (B, 3, size, size), and {number: what is
        wrong with it} of the damaged ones. These are black, and so are those that are `gone`, which are not read."""
        faults: dict[int, str] = {}

        def crop(i: int) -> np.ndarray:
            try:
                if i not in gone:
                    return center_crop(self.read(i), size)
            except UserError as error:
                faults[i] = str(error)
            return np.zeros((3, size, size), np.uint8)

        self.fetch([i for i in chosen.tolist() if i not in gone])
        batches = np.split(chosen, range(batch_size, len(chosen), batch_size))
        for batch, crops in zip(batches, decoded_ahead(batches, crop, num_threads)):
            yield batch.tolist(), crops, {i: faults[i] for i in batch.tolist() if i in faults}

    def _decode(self, i: int) -> Image.Image:
        return decode(self.tree.read(self.names[i]), f"{self.path}: {self.names[i]}")

    @cached_property
    def _labels_and_classes(self) -> tuple[list[int], list[str]]:
        labels = archives.dataset_json(self.path, self.tree)
        beside = {split_name(name)[0]: name for name in self.tree.names if split_name(name)[1] == LABEL}
        if labels is None and beside:
            pairs = ((name, beside.get(split_name(name)[0])) for name in self.names)
            said = ((name, label, self.tree.read(label)) for name, label in pairs if label)
            labels = {name: archives.parse_number(number, f"{self.path}: {label}") for name, label, number in said}
        if labels is not None:
            if (missing := next((name for name in self.names if name not in labels), None)) is not None:
                raise UserError(f"{self.path} has labels, but none for picture {missing}")
            return [labels[name] for name in self.names], []
        parts = [name.split("/")[:-1] for name in self.names]
        parts += [name.split("/") for name in self.tree.empty if any(parts)]
        while len({tuple(p[:1]) for p in parts}) == 1 and len({tuple(p) for p in parts}) > 1:
            parts = [p[1:] for p in parts]  # the first folder, as long as all share it
        folders = [p[0] if p else "" for p in parts]
        classes = sorted(set(folders))
        if len(classes) > 1 and set(SPLITS).issuperset(classes):
            raise UserError(f"{self.path} has {', '.join(classes)} as class folders; needed: the path of one split")
        number = {folder: i for i, folder in enumerate(classes)}
        return [number[folder] for folder in folders[: len(self.names)]], classes


def decoded_ahead(
    batches: Iterable[Sequence[int]], decode: Callable[[int], np.ndarray], num_threads: int
) -> Iterator[np.ndarray]:
    """For each batch of numbers the stack (B, ...) of what `decode` makes of them, the next one in threads."""
    with ThreadPoolExecutor(num_threads) as threads:
        ahead = []
        for batch in (*batches, ()):
            ahead.append([threads.submit(decode, i) for i in batch])
            if len(ahead) > 1 and (ready := ahead.pop(0)):
                yield np.stack([decoding.result() for decoding in ready])


def open_images(path: str | Path, split: str | None = None, beside: str = LABEL) -> Images:
    """The pictures of a folder, searched recursively, and whatever else open_pictures reads, or of an .npz.

    The .npz has `arr_0` (uint8, NHWC or NHW). split, beside: as in open_pictures. Raises UserError for no pictures.
    """
    path = Path(path)
    if path.suffix == ".npz":
        pixels = _map_array(path, "arr_0")
        names = [f"arr_0[{i}]" for i in range(len(pixels))]
        return Images(path, names, Tree(names, lambda name: as_picture(pixels[int(name[6:-1])])))
    tree = open_pictures(path, split, beside)
    names = [name for name in tree.names if archives.is_picture(name)]
    if not names:
        raise UserError(f"{path} holds no images ({', '.join(PICTURES)})")
    return Images(path, names, tree)


def _map_array(path: Path, key: str) -> np.ndarray:
    """uint8 (N, H, W, 3) or (N, H, W) of an .npz, mapped where it is in the file: 50,000 images are 10 GB.

    A compressed array is read into memory. Raises UserError where there is no such array.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there")
    mapped = None
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            info = next((info for info in archive.infolist() if info.filename == f"{key}.npy"), None)
            if info and info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + 26)  # of the member's own header: lengths of its name and extra field
                start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                mapped = np.memmap(path, np.uint8, "r", start, info.file_size)
    except archives.DAMAGED as error:
        raise UserError(f"{path} is damaged or no .npz file ({error})") from None
    if info is None:
        raise UserError(f"{path} has no array {key}; needed: uint8 (N, H, W, 3)")
    pixels = archives.read_arrays(path, [key])[key] if mapped is None else archives.read_npy(mapped, f"{path}: {key}")
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[3:] not in ((), (1,), (3,)):
        raise UserError(f"{path}: {key} is {pixels.dtype} {pixels.shape}; needed: uint8 (N, H, W, 3), 0..255")
    return pixels[..., 0] if pixels.shape[3:] == (1,) else pixels


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop (arXiv 2105.05233): box filter while twice too large, then bicubic -> uint8 (3, size, size)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size].transpose(2, 0, 1)
