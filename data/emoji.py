"""Emoji: the pictures of a bitmap colour font, and the English names of the package emoji as their captions.

The catalogue is every fully qualified sequence of that package which the font draws as one picture. Held out of
training, by rules that know neither the font nor the package's version:

tone    one in ten of the combinations of a person, a profession or a gesture with tones of skin and hair
pair    one in ten of the pairs of a profession or an activity with a gender, in all tones and directions

Of a base no more than one skin tone in five is held out, and of a profession no more than one gender: whatever a
held-out caption names is also named by captions that are seen.
"""

import re
import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, features

from system import UserError

FONTS = [
    Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),  # Debian's
    Path("/usr/share/fonts/noto/NotoColorEmoji.ttf"),
    Path("/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf"),
    Path("/System/Library/Fonts/Apple Color Emoji.ttc"),
]
HEIGHTS = (109, 160, 136, 128, 96, 64)  # of the bitmaps: Noto's, Apple's, others'
FEWEST = 1000  # pictures; a font of letters has some, too
ONE_IN, SALT = 10, b"c"  # with it the hashes below hold out nearly one in ten of each kind
SKIN, HAIR = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff", "\U0001f9b0\U0001f9b1\U0001f9b2\U0001f9b3"
TONE = re.compile(f"[{SKIN}]|\u200d[{HAIR}]")
UNTOLD = re.compile("\ufe0f|\u200d\u27a1")  # the emoji style; facing right
PERSON, MAN, WOMAN = "\U0001f9d1\U0001f468\U0001f469"
CHILDREN = "\U0001f466\U0001f467\U0001f9d2"
OF_A_PERSON = re.compile(f"([{PERSON}{MAN}{WOMAN}])(\u200d[^{PERSON}{MAN}{WOMAN}{CHILDREN}]+)")  # a firefighter
BY_A_SIGN = re.compile("(.+)\u200d([\u2642\u2640])")  # a man surfing


def find_font(source: str | Path | None = None) -> Path:
    """A font's file; None = that of this system. Raises UserError where there is none."""
    found = next((path for path in FONTS if path.is_file()), None) if source is None else Path(source)
    if found is None:
        cure = "apt-get install fonts-noto-color-emoji, or data.source=<a bitmap colour font's file>"
        raise UserError(f"no font of colour emoji is on this machine; needed: {cure}")
    if not found.is_file():
        raise UserError(f"data.source={source} is not there; needed: the file of a bitmap colour font")
    return found


def open_font(path: Path) -> ImageFont.FreeTypeFont:
    """Raises UserError where Pillow cannot draw sequences, or bitmaps of this font."""
    if not features.check("raqm"):
        raise UserError("this Pillow has no raqm, which joins sequences of emoji; needed: libraqm and fribidi")
    for height in HEIGHTS:
        try:
            return ImageFont.truetype(path, height, layout_engine=ImageFont.Layout.RAQM)
        except OSError:
            continue
    raise UserError(f"{path} is no font, or has no bitmaps that are {', '.join(map(str, HEIGHTS))} pixels high")


def names() -> dict[str, str]:
    """{fully qualified sequence: its English name}. Raises UserError where the package emoji is not installed."""
    try:
        import emoji
    except ImportError:
        raise UserError("the names of emoji need the package emoji: pip install emoji") from None
    whole, told = emoji.STATUS["fully_qualified"], sorted(emoji.EMOJI_DATA.items())
    return {sequence: about["en"].strip(":").replace("_", " ") for sequence, about in told if about["status"] == whole}


def catalogue(font: ImageFont.FreeTypeFont) -> dict[str, str]:
    """{sequence: caption} of what the font draws as one picture. Raises UserError where it draws hardly any."""
    known, width = names(), font.getlength("\U0001f600")
    drawn = (s for s in known if font.getlength(s) == width and font.getmask(s, "RGBA").getbbox())
    found = {sequence: known[sequence] for sequence in drawn}
    if len(found) < FEWEST:
        raise UserError(f"{font.path} draws {len(found)} of {len(known)} emoji; needed: a bitmap colour font of emoji")
    return found


def key(sequence: str) -> str:
    """The key of its sample: 1f469-200d-1f692."""
    return "-".join(f"{ord(character):x}" for character in sequence)


def sequence_of(key: str) -> str:
    """Raises UserError for the key of another data set's sample."""
    try:
        return b"".join(chr(int(code, 16)).encode() for code in key.split("-")).decode()
    except (ValueError, OverflowError):
        raise UserError(f"sample {key!r:.40} is no emoji; needed: the folder of data=emoji") from None


def draw(font: ImageFont.FreeTypeFont, sequence: str, height: int, width: int) -> np.ndarray:
    """The picture on white: uint8 (3, height, width)."""
    image = Image.new("RGB", font.getbbox(sequence)[2:], "white")
    ImageDraw.Draw(image).text((0, 0), sequence, font=font, embedded_color=True)
    return np.asarray(ImageOps.pad(image, (width, height), Image.Resampling.BICUBIC, "white")).transpose(2, 0, 1)


def parts(sequences: Iterable[str]) -> dict[str, str]:
    """{sequence: "seen", "tone" or "pair"}: whether and by which rule it is held out."""
    bases = {sequence: UNTOLD.sub("", TONE.sub("", sequence)) for sequence in sequences}
    genders = defaultdict(dict)  # {profession: {gender: base}}
    for base in set(bases.values()):
        if match := OF_A_PERSON.fullmatch(base):
            genders[match[2]][match[1]] = base
        elif match := BY_A_SIGN.fullmatch(base):
            genders[match[1]][match[2]] = base
            if match[1] in bases.values():
                genders[match[1]][PERSON] = match[1]
    pairs = set()
    for profession, several in genders.items():
        number = zlib.crc32(SALT + profession.encode()) % ONE_IN  # 0, 1 and 2 of 10 hold out a gender
        wanted = {0: (PERSON,), 1: (MAN, "\u2642"), 2: (WOMAN, "\u2640")}.get(number, ())
        pairs |= {base for gender, base in several.items() if gender in wanted and len(several) > 1}
    return {
        sequence: "pair" if base in pairs else "tone" if _has_held_out_tone(sequence, base) else "seen"
        for sequence, base in bases.items()
    }


def _has_held_out_tone(sequence: str, base: str) -> bool:
    number = zlib.crc32(SALT + base.encode())
    tones = [(SKIN + HAIR).index(tone[-1]) for tone in TONE.findall(sequence)]
    for tone in tones:
        number = number * 7 + tone
    return bool(tones) and number % ONE_IN == 0
