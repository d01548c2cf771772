"""Samples on disk: one PNG per seed (images/000000/000042.png), a grid, samples.json and, if asked for, `samples.npz`.

Seed 42 of the third prompt is images/000002/000042.png. A PNG is written whole or not at all: where it exists, its seed
is done.
"""

import itertools
import json
import textwrap
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import conditions
from conditions import Condition
from system import UserError
from system.files import atomic_file, check_no_links, read_json, read_small, write_text_atomic
from system.limits import MEMBER_BYTES
from system.pictures import decode

MANIFEST = "samples.json"
WRITERS = 4  # threads; Pillow encodes without the interpreter's lock
READABLE = (64, 128)  # the least pixels of an image's width in a grid, and of one under a long label
LONG, MOST_LINES = 16, 8  # the most letters of a label that is not long; lines of a label
Key = int | tuple[int, int]  # of an image: its seed, or the number of its prompt and the seed


def image_path(folder: Path, key: Key) -> Path:
    group, seed = key if isinstance(key, tuple) else (key // 1000 * 1000, key)
    return folder / "images" / f"{group:06d}" / f"{seed:06d}.png"


def missing(folder: Path, seeds: Sequence[Key]) -> list[int]:
    """Positions in `seeds` whose image does not exist yet; a repeated seed counts once."""
    first = {seed: i for i, seed in reversed(list(enumerate(seeds)))}
    return sorted(i for seed, i in first.items() if not image_path(folder, seed).exists())


def read_manifest(folder: Path) -> dict:
    """What samples.json holds so far; {} where there is none."""
    path = folder / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    if manifest and not isinstance(manifest.get("settings"), dict):
        raise UserError(f"{path} is damaged: it has no settings; needed: another out=")
    return manifest


def begun_precision(folder: str | Path | None) -> str | None:
    """The precision of the images that an interrupted call has left in the folder; None where there are none."""
    return read_manifest(Path(folder)).get("settings", {}).get("precision") if folder else None


def reserve(folder: Path, settings: dict) -> dict:
    """The contents of samples.json so far. Raises UserError for images of other settings, and for links."""
    if (images := folder / "images").is_symlink():
        raise UserError(f"{images} is a link; needed: another out")
    if images.is_dir():
        check_no_links(images)
    now = json.loads(json.dumps(settings))
    written = read_manifest(folder) or {"settings": now}
    was = written["settings"]
    if keys := sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key)):
        differing = "; ".join(f"{key} was {was.get(key)}, is {now.get(key)}" for key in keys)
        raise UserError(f"{folder} holds images of other settings ({differing}); needed: another out=")
    return written


def write_manifest(folder: Path, manifest: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def save_image(image: np.ndarray, path: str | Path) -> None:
    """uint8 (H, W, 3) => PNG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, durable=False) as file:
        Image.fromarray(image).save(file, format="png")


def read_images(folder: Path, seeds: Sequence[Key]) -> Iterator[np.ndarray]:
    """The images of `seeds`, in order: uint8 (H, W, 3). Raises UserError for damaged ones, and where sizes differ."""
    first = None
    for path in (image_path(folder, seed) for seed in seeds):
        image = np.asarray(decode(read_small(path, MEMBER_BYTES), str(path)).convert("RGB"))
        first = image if first is None else first
        if image.shape != first.shape:
            raise UserError(f"{path} is {image.shape}, the first image {first.shape}; needed: another out=")
        yield image


def write_npz(folder: Path, seeds: Sequence[Key]) -> Path:
    """samples.npz, with one image in memory at a time: 50,000 of 256x256 pixels are 10 GB."""
    path = folder / "samples.npz"
    shape = (len(seeds), *next(read_images(folder, seeds[:1])).shape)
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for image in read_images(folder, seeds):
                member.write(image.tobytes())
    return path


def store(folder: Path, seeds: Sequence[Key], batches: Iterable[torch.Tensor]) -> None:
    """Writes the images of `seeds`, uint8 (B, 3, H, W), a batch while the next one is made.

    After an error of a writer or of `batches`, every image made so far has been written if it could be.
    """
    rest, writing = iter(seeds), []
    with ThreadPoolExecutor(WRITERS) as writers:
        for batch in batches:
            before, images = writing, batch.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
            writing = [writers.submit(save_image, image, image_path(folder, next(rest))) for image in images]
            for written in before:
                written.result()
        for written in writing:
            written.result()


def finish(folder: Path, seeds: Sequence[Key], manifest: dict, labels: Sequence[str] | None, each: int = 1) -> None:
    """Writes a grid of the first 400 images and samples.json, once all images of `seeds` are there.

    labels: of all images, as in save_grid. each: so many neighbours have the same, and stay together in a row.
    """
    images = torch.from_numpy(np.stack(list(read_images(folder, seeds[:400])))).permute(0, 3, 1, 2)  # (n, 3, H, W)
    columns = 10 if len(images) <= 100 else 20
    save_grid(images, folder / "grid.png", columns - columns % each if each < columns else columns, labels)
    write_manifest(folder, manifest)


def class_names(condition: Condition, names: Sequence[str] | None) -> list[str] | None:
    """The class of each image, by its name or number; None for conditions that are no classes."""
    classes = conditions.labels_of(condition)
    return None if classes is None else [names[i] if i < len(names or ()) else str(i) for i in classes.tolist()]


def save_grid(images: torch.Tensor, path: str | Path, columns: int, labels: Sequence[str] | None = None) -> None:
    """uint8 (n, 3, H, W) => one PNG, `columns` images wide, with two black pixels around each.

    Small images are enlarged, by a whole number. labels: of each, above it, or once above neighbours of the same.
    """
    columns = min(columns, len(images))
    rows = [range(first, min(first + columns, len(images))) for first in range(0, len(images), columns)]
    groups = [[[*alike] for _, alike in itertools.groupby(row, labels and labels.__getitem__)] for row in rows]
    long = labels and any(len(labels[group[0]]) > LONG * len(group) for row in groups for group in row)
    times = -(-READABLE[bool(long)] // images.shape[3])
    images = images.repeat_interleave(times, 2).repeat_interleave(times, 3)
    (_, _, H, W), top, tops, words = images.shape, 2, [], []
    font = label_font(max(13, W // 16)) if labels else None
    for row in groups:
        heights = [0]
        for first, *others in row if labels else ():
            lines = wrapped(labels[first], font, (1 + len(others)) * (W + 2) - 6)
            places = itertools.count(top, font.size + 3)
            words += [((first % columns * (W + 2) + 4, y), line) for y, line in zip(places, lines)]
            heights.append(len(lines) * (font.size + 3) + 3)
        tops.append(top + max(heights))
        top += max(heights) + H + 2
    grid = Image.new("RGB", (columns * (W + 2) + 2, top))
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        grid.paste(Image.fromarray(image), (i % columns * (W + 2) + 2, tops[i // columns]))
    for place, line in words:
        ImageDraw.Draw(grid).text(place, line, "white", font)
    save_image(np.asarray(grid), path)


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's DejaVu Sans, which has Greek and Cyrillic letters, too."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, the end of a very long one left out."""
    for letters in range(min(max(len(text), 3), width // 2), 2, -1):  # 3: those of "..."
        lines = textwrap.wrap(text, letters, max_lines=MOST_LINES, placeholder="...")
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return []
