"""Extractors: uint8 images (B, 3, H, W) -> the features that Frechet distances, precision and recall are computed in.

    mnist      a small classifier of digits, in assets/, trained by scripts/train_classifier.py
    fashion    the same of Fashion-MNIST
    inception  torch-fidelity's port of the 2015 TensorFlow graph: FID, sFID and Inception score of the ADM protocol
    dinov2     timm's DINOv2 ViT-L/14

Shapes: B images, D features, K classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from autoencoder import PixelCodec
from checkpoints.run_folder import load_strictly, read_tensors
from data import open_latents, prepare
from evaluation import inception
from system import UserError, hub
from system.files import sha256_once

ASSETS = Path(__file__).resolve().parents[1] / "assets"
CLASSIFIERS = {name: ASSETS / f"{name}_classifier.safetensors" for name in ("mnist", "fashion")}
DINOV2 = "vit_large_patch14_dinov2.lvd142m"


class Features(NamedTuple):
    """Features of one batch of images, float32."""

    pool: torch.Tensor  # (B, D)
    logits: torch.Tensor | None = None  # (B, K): classes, or Inception's logits without bias
    spatial: torch.Tensor | None = None  # (B, 2023): sFID
    clip: torch.Tensor | None = None  # (B,): CLIP scores, which evaluate.py adds


@dataclass(frozen=True, eq=False)  # hashed by identity, as a key of caches
class Extractor:
    """uint8 images, a tensor (B, 3, H, W) on any device or an array (B, H, W, 3) -> `Features` on its own device."""

    name: str
    net: nn.Module  # uint8 (B, 3, H, W) -> Features
    sha256: str  # of the weights file
    device: torch.device

    @property
    def num_features(self) -> int:
        return self.net.num_features

    @property
    def num_spatial(self) -> int | None:
        return self.net.num_spatial

    @torch.no_grad()
    def __call__(self, images: torch.Tensor | np.ndarray) -> Features:
        """Raises UserError for images of another type or shape."""
        images = torch.as_tensor(images)
        if images.ndim == 4 and images.shape[3] == 3 != images.shape[1]:
            images = images.permute(0, 3, 1, 2)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            found = f"images of {images.dtype} {tuple(images.shape)}"
            raise UserError(f"{found}; needed: torch.uint8 (B, 3, H, W), or an array (B, H, W, 3)")
        return self.net(images.to(self.device))


def load_extractor(
    name: str, weights: str | Path | None = None, sha256: str | None = None, *, device: torch.device | str = "cpu"
) -> Extractor:
    """An extractor by name: mnist, fashion, inception, dinov2.

    weights: a file; None = the shipped one (mnist, fashion) or the published one, downloaded once (inception, dinov2).
    sha256: required of that file; None = the published one's, where known (inception).
    Raises UserError for an unknown name and for weights that are missing, wrong or of another network.
    """
    if name not in (*CLASSIFIERS, "inception", "dinov2"):
        raise UserError(f"extractor={name}; needed: mnist, fashion, inception or dinov2")
    if weights is None:
        weights = CLASSIFIERS.get(name) or {"inception": inception.published_weights, "dinov2": dinov2_weights}[name]()
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"extractor_weights={path}: no such file")
    found = sha256_once(path)
    if found not in ([sha256] if sha256 else inception.TRUE_WEIGHTS if name == "inception" else [found]):
        raise UserError(f"{path} has sha256 {found}; needed: {sha256 or ' or '.join(inception.TRUE_WEIGHTS)}")
    net = {"inception": Inception, "dinov2": DinoV2}[name](path) if name not in CLASSIFIERS else Classifier()
    if name in CLASSIFIERS:
        load_strictly(net, read_tensors(path), str(path))
    return Extractor(name, net.eval().requires_grad_(False).to(device), found, torch.device(device))


class Inception(nn.Module):
    """torch-fidelity's port of the 2015 graph, with TensorFlow's resizing; images of any size.

    spatial: the first 7 channels of mixed_6/conv, 17 x 17, in TensorFlow's order (arXiv 2103.03841).
    """

    num_features = 2048
    num_spatial = 17 * 17 * 7

    def __init__(self, path: Path):
        super().__init__()
        self.net, self.seen = inception.load(path, ["2048", "logits_unbiased"]), []
        self.net.Mixed_6d.branch1x1.register_forward_hook(lambda conv, inputs, output: self.seen.append(output))

    def forward(self, images: torch.Tensor) -> Features:
        pool, logits = self.net(images)
        return Features(pool, logits, self.seen.pop()[:, :7].permute(0, 2, 3, 1).flatten(1))  # of (B, C, 17, 17)


class DinoV2(nn.Module):
    """The class token of timm's DINOv2 ViT-L/14 (arXiv 2306.04675); images are resized to 224 x 224, bicubic."""

    num_spatial = None

    def __init__(self, path: Path):
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UserError("extractor=dinov2 needs the package timm: pip install timm") from None
        self.net = timm.create_model(DINOV2, num_classes=0, dynamic_img_size=True)
        self.num_features = self.net.num_features
        load_strictly(self.net, read_tensors(path), str(path))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> Features:
        pixels = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True).clamp(0, 255) / 255
        return Features(self.net((pixels - self.mean) / self.std))


def dinov2_weights() -> Path:
    """timm's on the Hugging Face hub, downloaded once. Raises UserError where there is no such file."""
    with hub.refusals("no DINOv2 weights; needed: extractor_weights=<its model.safetensors>"):
        return hub.local(f"hf:timm/{DINOV2}/model.safetensors")


class Classifier(nn.Module):
    """Three convolutions and two linear layers, 93,482 parameters; features are the 64 inputs of the last layer.

    Images are 28 x 28, averaged over channels. Raises UserError for another size.
    """

    num_features = 64
    num_spatial = None

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            *_conv(1, 32), nn.MaxPool2d(2),
            *_conv(32, 64), nn.MaxPool2d(2),
            *_conv(64, 64), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 3 * 3, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> Features:
        pool = self.trunk(self.pixels(images))  # (B, 64)
        return Features(pool, self.head(pool))

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """The map before the second pooling, row by row: (B, 196, 64)."""
        return self.trunk[:7](self.pixels(images)).flatten(2).transpose(1, 2)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[2:] != (28, 28):
            raise UserError(f"images of {images.shape[3]}x{images.shape[2]} pixels; this classifier reads 28x28")
        return images.to(self.head.weight.device).float().mean(1, keepdim=True) / 127.5 - 1  # (B, 1, 28, 28)


def _conv(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()


def real_images(name: str, split: str, path: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What a shipped classifier is for, in the folder `path`, written on first use: uint8 (n, 3, 28, 28), labels (n,).

    mnist: train (4,500) or val (500). fashion: train (60,000) or val (10,000). The classifiers have not seen val.
    """
    prepare(name, path)
    latents = open_latents(path, split=split)
    raw, labels = latents.read(range(len(latents)))
    images = [PixelCodec().decode(latents.to_model_input(part, None))[:, :1] for part in raw.split(1000)]
    return torch.cat(images).expand(-1, 3, -1, -1), labels
