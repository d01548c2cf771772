"""Images that lie somewhere: a folder, a zip, or an .npz with `arr_0` (uint8, NHWC), as uint8 batches (B, 3, H, W)."""

import io
import logging
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
DECODERS = 8                                        # threads; Pillow decodes without the interpreter's lock

log = logging.getLogger(__name__)


class Images:
    """`len()` and `batches(batch_size, rows)`; made by `open_images`. `read(rows)` gives uint8 (n, H, W) or (n, H, W, C)."""

    def __init__(self, path: Path, count: int, read):
        self.path, self.count, self.read, self.said = path, count, read, False

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int, rows: range) -> Iterator[torch.Tensor]:
        """uint8 (B, 3, H, W) batches of the images `rows`, in order."""
        for start in range(rows.start, rows.stop, batch_size):
            pixels = self.read(range(start, min(start + batch_size, rows.stop)))  # (B, H, W) or (B, H, W, C)
            grey = pixels.ndim == 3 or pixels.shape[-1] == 1
            if grey and not self.said:
                log.warning("%s: grey images, repeated to three channels", self.path)
                self.said = True
            if grey:
                pixels = np.repeat(pixels.reshape(*pixels.shape[:3], 1), 3, axis=-1)
            yield torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def open_images(path: str | Path) -> Images:
    """Images of a folder (searched through, in the order of their names), a zip or an .npz.

    Raises ValueError where there are none, and, when they are read, for what is not 8-bit grey or RGB and for mixed sizes.
    """
    path = Path(path)
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        return _files(path, names, lambda name: name.read_bytes())
    if not path.is_file():
        raise ValueError(f"no images at {path}; needed: a folder, a .zip or an .npz with arr_0")
    if path.suffix == ".npz":
        pixels = read_arrays(path, ["arr_0"]).get("arr_0")
        if pixels is None:
            raise ValueError(f"{path} has no array arr_0; needed: uint8 (N, H, W, 3)")
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[3] not in (1, 3)):
            raise ValueError(f"{path}: arr_0 is {pixels.dtype} {pixels.shape}; needed: uint8 (N, H, W, 3), 0..255")
        return Images(path, len(pixels), lambda rows: pixels[rows.start : rows.stop])
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        names = sorted(name for name in archive.namelist() if Path(name).suffix.lower() in SUFFIXES)
        return _files(path, names, archive.read)
    raise ValueError(f"{path} is neither a folder nor a .zip nor an .npz")


def read_arrays(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Those arrays of an .npz that are among `keys`. Raises ValueError for a damaged file and for pickled objects."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys if key in arrays}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, AttributeError) as error:
        if "allow_pickle" in str(error):
            raise ValueError(f"{path} holds pickled objects, which are never read; needed: an .npz of plain arrays") from None
        raise ValueError(f"{path} is damaged or no .npz file ({error})") from None


def _files(path: Path, names: list, read_bytes) -> Images:
    """Image files with one size, named by `names`, whose contents `read_bytes` gives."""
    if not names:
        raise ValueError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
    size = _decode(names[0], read_bytes(names[0])).shape[:2]

    def decode(name) -> np.ndarray:
        pixels = _decode(name, read_bytes(name))
        if pixels.shape[:2] != size:
            raise ValueError(f"{name} is {_size(pixels)}, {names[0]} is {size[1]}x{size[0]}; needed: one size")
        return pixels

    def read(rows: range) -> np.ndarray:
        with ThreadPoolExecutor(DECODERS) as pool:
            decoded = list(pool.map(decode, names[rows.start : rows.stop]))
        if len({pixels.ndim for pixels in decoded}) > 1:  # grey and colour in one batch
            decoded = [pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1) for pixels in decoded]
        return np.stack(decoded)

    return Images(path, len(names), read)


def _decode(name, contents: bytes) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3)."""
    try:
        with Image.open(io.BytesIO(contents)) as image:
            if image.mode not in ("L", "RGB", "P", "1"):
                raise ValueError(f"{name} has mode {image.mode}; needed: 8-bit grey or RGB")
            return np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError):
        raise ValueError(f"{name} is no image or is damaged") from None


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"
