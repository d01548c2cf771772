"""Images at rest, as uint8 batches (B, 3, H, W): a folder, a zip, a tar, or an .npz with `arr_0` (uint8, NHWC)."""

import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.tree import Tree, open_tree

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
DECODERS = 8                                        # threads; Pillow decodes without the interpreter's lock


@dataclass
class Images:
    path: Path
    count: int
    read: Callable[[range], np.ndarray]             # rows -> uint8 (n, H, W, 3)

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int, rows: range) -> Iterator[torch.Tensor]:
        """uint8 (B, 3, H, W) batches of the images `rows`, in order."""
        for start in range(rows.start, rows.stop, batch_size):
            pixels = self.read(range(start, min(start + batch_size, rows.stop)))
            yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def open_images(path: str | Path) -> Images:
    """Images of a folder (searched through), a zip or a tar, in the order of their names, or of an .npz.

    Grey images become three equal channels, which is said. Raises ValueError where there are no images, and, when
    they are read, for what is not 8-bit grey or RGB and for mixed sizes.
    """
    path = Path(path)
    return _open_array(path) if path.suffix == ".npz" else _open_files(path)


def read_arrays(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Those arrays of an .npz that are among `keys`. Raises ValueError for a damaged file and for pickled objects."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys if key in arrays}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, TypeError) as error:
        if "allow_pickle" in str(error):
            raise ValueError(f"{path} holds pickled objects, which are never read; needed: plain arrays") from None
        raise ValueError(f"{path} is damaged or no .npz file ({error})") from None


def _open_array(path: Path) -> Images:
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    pixels = _map_array(path, "arr_0")
    if pixels is None:
        raise ValueError(f"{path} has no array arr_0; needed: uint8 (N, H, W, 3)")
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[3:] not in ((), (1,), (3,)):
        raise ValueError(f"{path}: arr_0 is {pixels.dtype} {pixels.shape}; needed: uint8 (N, H, W, 3), 0..255")
    if pixels.shape[3:] != (3,):
        _say_grey(path)
        pixels = np.broadcast_to(pixels.reshape(*pixels.shape[:3], 1), (*pixels.shape[:3], 3))
    return Images(path, len(pixels), lambda rows: pixels[rows.start : rows.stop])


def _map_array(path: Path, key: str) -> np.ndarray | None:
    """An array of an .npz as it lies in the file: 50,000 images (10 GB) take no memory. A compressed one is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{key}.npy" not in archive.namelist():
                return None
            info = archive.getinfo(f"{key}.npy")
            with archive.open(info) as member:
                np.lib.format.read_magic(member)
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
                header = member.tell()
        if info.compress_type != zipfile.ZIP_STORED or dtype.hasobject or fortran_order:
            return read_arrays(path, [key])[key]
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)  # of the member's own header: lengths of its name and of its extra field
            name, extra = struct.unpack("<HH", file.read(4))
        return np.memmap(path, dtype, "r", info.header_offset + 30 + name + extra + header, shape)
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
        raise ValueError(f"{path} is damaged or no .npz file ({error})") from None


def _open_files(path: Path) -> Images:
    tree = open_tree(path)
    names = [name for name in tree.names if Path(name).suffix.lower() in SUFFIXES]
    if not names:
        raise ValueError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")

    first = _decode(tree, names[0], path)
    if first.mode in ("L", "1"):
        _say_grey(path)

    def pixels(name: str) -> np.ndarray:
        image = _decode(tree, name, path)
        if image.size != first.size:
            raise ValueError(f"{path}: {name} is {_size(image)}, {names[0]} is {_size(first)}; needed: one size")
        return np.asarray(image.convert("RGB"))

    def read(rows: range) -> np.ndarray:
        with ThreadPoolExecutor(DECODERS) as pool:
            return np.stack(list(pool.map(pixels, names[rows.start : rows.stop])))

    return Images(path, len(names), read)


def _decode(tree: Tree, name: str, path: Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(tree.read(name)))
        image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {name} is no image or is damaged ({type(error).__name__})") from None
    if image.mode not in ("L", "RGB", "P", "1"):
        raise ValueError(f"{path}: {name} has mode {image.mode}; needed: 8-bit grey or RGB")
    return image


def _say_grey(path: Path) -> None:
    print(f"warning: {path} holds grey images, repeated to three channels", file=sys.stderr)


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
