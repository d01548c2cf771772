"""Codecs: decode turns latents (B, C, h, w), scaled as the network sees them, into uint8 images (B, 3, H, W)."""

from collections.abc import Sequence
from typing import Literal

import torch

from system import UserError, hub

SD_SCALE = 0.18215  # of the latents of Stable Diffusion's VAEs: 1 / their standard deviation
DECODE_AT_ONCE = 8 * 32 * 32  # latent pixels per call of the decoder: 8 images of 256 x 256


class Codec:
    """What turns latents, as the network sees them, into images: to(device), check(channels) and decode(latents)."""

    def to(self, device) -> "Codec":
        return self

    def check(self, channels: int) -> None:
        """Raises UserError where it cannot decode latents of so many channels."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w), scaled => uint8 (B, 3, H, W)."""
        raise NotImplementedError


class PixelCodec(Codec):
    """No autoencoder: pixels [0, 255] <-> [-1, 1]. Grey images (C = 1) become three equal channels."""

    def check(self, channels: int) -> None:
        """Raises UserError where latents of so many channels are no pixels."""
        if channels not in (1, 3):
            raise UserError(f"{channels} channels are no pixels; needed: codec.path=, the VAE that decodes them")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = to_uint8(latents)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class VAECodec(Codec):
    """A diffusers AutoencoderKL, by hub name or local path; scaled latent = scale * the VAE's latent + bias.

    scale, bias: a number, or a list with one per channel: for latents normalised by their mean and standard deviation,
    as VA-VAE's are, 1 / std and -mean / std. path, scale: None = nobody said which VAE. pixels: black and white, as the
    VAE has them. Raises UserError for lists of unequal lengths and, at first use, without a path or a scale, and
    where the VAE is missing or damaged; OSError where the package diffusers is.
    """

    def __init__(
        self,
        path: str | None = "stabilityai/sd-vae-ft-ema",
        scale: float | Sequence[float] | None = SD_SCALE,
        bias: float | Sequence[float] | None = 0.0,
        pixels: Literal["-1..1", "0..1"] | None = "-1..1",
    ):
        self.path, self.device, self._vae = None if scale is None else path, torch.device("cpu"), None
        self.pixels = pixels or "-1..1"
        scale, bias = 1.0 if scale is None else scale, 0.0 if bias is None else bias
        self.scale, self.bias = (per_channel(name, value) for name, value in (("scale", scale), ("bias", bias)))
        if not (self.scale != 0).all() or self.scale.ndim == self.bias.ndim == 3 and len(self.scale) != len(self.bias):
            raise UserError(f"codec.scale={scale}, codec.bias={bias}; needed: as many of both, no scale of 0")

    def to(self, device) -> "VAECodec":
        self.device = torch.device(device)
        if self._vae is not None:
            self._vae.to(self.device)
        return self

    @property
    def vae(self) -> torch.nn.Module:
        """Loaded at first use: training on latents never needs it."""
        if self.path is None:
            found = "nothing says which VAE these latents are of"
            raise UserError(f"{found}; needed: codec.path=, codec.scale=, codec.bias=")
        if self._vae is None:
            try:
                from diffusers import AutoencoderKL
            except ImportError:
                raise FileNotFoundError("decoding latents needs the package diffusers: pip install diffusers") from None
            with hub.refusals(f"VAE {self.path!r} was not found, or is damaged"):
                self._vae = AutoencoderKL.from_pretrained(self.path).eval().requires_grad_(False).to(self.device)
        return self._vae

    def check(self, channels: int) -> None:
        """Raises UserError where the VAE is of latents of another number of channels: before they are sampled."""
        numbers = {"latents": self.vae.config.latent_channels}
        numbers |= {name: len(value) for name, value in (("scale", self.scale), ("bias", self.bias)) if value.ndim}
        for name, number in numbers.items():
            if number != channels:
                found = f"the network makes latents of {channels} channels, the codec {self.path} has {number} {name}"
                raise UserError(f"{found}; needed: codec.path=, codec.scale= and codec.bias= of the same latents")

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The posterior's mean and log variance, unscaled: uint8 (B, 3, H, W) -> (B, C, h, w) float32 each."""
        pixels = images.to(self.device).float() / 127.5 - 1
        posterior = self.vae.encode(pixels if self.pixels == "-1..1" else pixels / 2 + 0.5).latent_dist
        return posterior.mean, posterior.logvar

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        latents = (latents.to(self.device).float() - self.bias.to(self.device)) / self.scale.to(self.device)
        at_once = max(1, DECODE_AT_ONCE // latents.shape[-2:].numel())
        decoded = (self.vae.decode(part).sample for part in latents.split(at_once))
        return torch.cat([to_uint8(part if self.pixels == "-1..1" else part * 2 - 1) for part in decoded])


def per_channel(name: str, value: float | Sequence[float]) -> torch.Tensor:
    """A number as () and a list as (C, 1, 1), float32. Raises UserError for anything else."""
    try:
        numbers = torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError):
        raise UserError(f"codec.{name}={value}; needed: a number, or a list with one per channel") from None
    if numbers.ndim > 1 or not numbers.isfinite().all():
        raise UserError(f"codec.{name}={value}; needed: a number, or a list with one per channel")
    return numbers[:, None, None] if numbers.ndim else numbers


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] => uint8, rounded to nearest. Raises UserError for numbers that are not finite: they would be black."""
    if not pixels.isfinite().all():
        raise UserError("the decoded images have pixels that are not finite; needed: the VAE of these latents")
    return (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
