"""Pictures in memory, decoded by Pillow: damaged ones and bombs are refused in one line."""

import struct
import zlib
from io import BytesIO

from PIL import Image

from system import UserError
from system.limits import PICTURE_PIXELS

# The readers of PICTURES: others start programs (PostScript), or are seldom tried.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
Image.MAX_IMAGE_PIXELS = None  # `decode` has the limit
# What Pillow raises at damaged files.
DAMAGED = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, RuntimeError, struct.error,
    zlib.error,
)  # fmt: skip


def decode(contents: bytes, source: str) -> Image.Image:
    """A picture as it is stored. Raises UserError, which begins with `source`, for a damaged or too large one."""
    try:
        image = Image.open(BytesIO(contents), formats=FORMATS)
        if image.width * image.height <= PICTURE_PIXELS:
            image.load()
            return image
    except DAMAGED as error:
        raise UserError(f"{source} is no image or is damaged ({type(error).__name__})") from None
    raise UserError(f"{source} has {image.width} x {image.height} pixels; at most {PICTURE_PIXELS} are accepted")
