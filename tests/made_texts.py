"""A text encoder in the place of a pretrained one: as many tokens as words, of numbers that the word gives."""

import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from conditions import Text
from data.shards import TextSource


@cache
def states_of(word: str, width: int) -> np.ndarray:
    """The last dimension is constant, as some of pretrained encoders nearly are."""
    states = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(width)
    return np.append(3 * states[:-1] + 1, 0.5).astype(np.float16)


@dataclass
class MadeEncoder:
    length: int = 6
    width: int = 8
    sha256: str = "0" * 64

    def __call__(self, captions) -> Text:
        states = np.zeros((len(captions), self.length, self.width), np.float16)
        mask = np.zeros(states.shape[:2], bool)
        for i, caption in enumerate(captions):
            for j, word in enumerate(["[start]", *caption.split()][: self.length]):
                states[i, j], mask[i, j] = states_of(word, self.width), True
        return Text(torch.from_numpy(states), torch.from_numpy(mask))

    @property
    def source(self) -> TextSource:
        return TextSource(self([""]).states[0, :1].numpy(), "made", self.sha256, self.length)
