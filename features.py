"""Images into features: what Frechet distances, precision and recall are measured in.

    mnist      a small classifier of digits, shipped in assets/, trained by scripts/train_mnist_classifier.py
    inception  the 2015 TensorFlow graph as torch-fidelity ported it: FID, sFID and Inception score of the ADM protocol

An extractor takes uint8 (B, 3, H, W) and gives `Features`. Letters: B images, D features, K classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

import checkpoint
from autoencoder import PixelCodec
from data import open_latents, prepare_mnist

MNIST_WEIGHTS = Path(__file__).resolve().parent / "assets" / "mnist_classifier.safetensors"


class Features(NamedTuple):
    """Of one batch of images, float32."""

    pool: torch.Tensor                              # (B, D)
    logits: torch.Tensor | None = None              # (B, K): classes, or Inception's logits without bias
    spatial: torch.Tensor | None = None             # (B, 2023): sFID


@dataclass
class Extractor:
    """Calling it turns uint8 images (B, 3, H, W) on any device into `Features` on its own."""

    name: str
    net: nn.Module                                  # uint8 (B, 3, H, W) -> Features
    sha256: str                                     # of the weights file
    device: torch.device

    @property
    def num_features(self) -> int:
        return self.net.num_features

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3, images.shape
        return self.net(images.to(self.device))


def load_extractor(name: str, *, device: torch.device | str = "cpu") -> Extractor:
    """An extractor by name. Raises ValueError for an unknown name or for weights that are missing or wrong."""
    if name == "mnist":
        net, path = MnistClassifier(), MNIST_WEIGHTS
        checkpoint.load_strictly(net, checkpoint.read_tensors(path), str(path))
    else:
        raise ValueError(f"extractor {name!r}; needed: mnist")
    return Extractor(name, net.eval().requires_grad_(False).to(device), checkpoint.sha256(path), torch.device(device))


class MnistClassifier(nn.Module):
    """Three convolutions and two linear layers, 93,482 parameters; the features are the 64 numbers before the last layer.

    Input is 28 x 28; the grey value is the mean over channels. Raises ValueError for images of another size.
    """

    num_features = 64

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            *_conv(1, 32), nn.MaxPool2d(2), *_conv(32, 64), nn.MaxPool2d(2), *_conv(64, 64), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 3 * 3, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> Features:
        if images.shape[2:] != (28, 28):
            raise ValueError(f"images of {images.shape[3]}x{images.shape[2]} pixels; the mnist extractor reads 28x28")
        pixels = images.float().mean(1, keepdim=True) / 127.5 - 1  # (B, 1, 28, 28)
        pool = self.trunk(pixels)  # (B, 64)
        return Features(pool, self.head(pool))


def _conv(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()


def digits(split: str, path: str | Path = "datasets/mnist") -> tuple[torch.Tensor, torch.Tensor]:
    """The embedded digits, put into the folder `path` on first use: uint8 (n, 3, 28, 28), labels (n,) int64.

    split: "train" (4,500) or "val" (500, which the shipped classifier has not seen).
    """
    prepare_mnist(path)
    latents = open_latents(path, split=split)
    raw, labels = latents.read(range(len(latents)))
    return PixelCodec().decode(latents.to_model_input(raw, None)), labels
