"""A text encoder in the place of a pretrained one: as many tokens as words, of numbers that the word gives."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from conditions import Text
from data.shards import TextSource


@dataclass
class MadeEncoder:
    """The last dimension is constant, as some of pretrained encoders nearly are."""

    length: int = 6
    width: int = 8
    sha256: str = "0" * 64

    def __call__(self, captions) -> Text:
        states, mask = (
            np.zeros((len(captions), self.length, self.width), np.float16),
            np.zeros((len(captions), self.length), bool),
        )
        for i, caption in enumerate(captions):
            for j, word in enumerate(["[start]", *caption.split()][: self.length]):
                rng = np.random.default_rng(zlib.crc32(word.encode()))
                states[i, j, :-1], states[i, j, -1], mask[i, j] = 3 * rng.standard_normal(self.width - 1) + 1, 0.5, True
        return Text(torch.from_numpy(states), torch.from_numpy(mask))

    @property
    def source(self) -> TextSource:
        return TextSource(self([""]).states[0, :1].numpy(), "made", self.sha256, self.length)
