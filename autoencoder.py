"""Codecs between pixels and latents, and the only owner of scale factors, in both directions.

    encode: uint8 (B, 3, H, W) => latents (B, C, h, w) float32, as the network sees them
    decode: latents (B, C, h, w) => uint8 (B, 3, H, W)
"""

import torch

DECODE_AT_ONCE = 8 * 32 * 32  # of a batch's latent pixels: 8 images of 256 x 256, whatever the batch


class PixelCodec:
    """Pixels as they are: [0, 255] <-> [-1, 1]; grey images (C = 1) become three equal channels."""

    name = "pixels"

    def to(self, device) -> "PixelCodec":
        return self

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images.float() / 127.5 - 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = to_uint8(latents)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class VAECodec:
    """A diffusers AutoencoderKL, by hub name or local path. Scaled latent = scale * latent of the VAE.

    Raises ValueError where the VAE is not found.
    """

    name = "vae"

    def __init__(self, path: str = "stabilityai/sd-vae-ft-ema", scale: float = 0.18215):
        self.path, self.scale, self.device, self._vae = path, scale, torch.device("cpu"), None

    def to(self, device) -> "VAECodec":
        self.device = torch.device(device)
        if self._vae is not None:
            self._vae.to(self.device)
        return self

    @property
    def vae(self) -> torch.nn.Module:
        """Loaded when first needed: training on latents never needs it."""
        if self._vae is None:
            try:
                from diffusers import AutoencoderKL
            except ImportError:
                raise ValueError("pixels <-> latents needs the package diffusers: pip install diffusers") from None
            try:
                self._vae = AutoencoderKL.from_pretrained(self.path).eval().requires_grad_(False).to(self.device)
            except OSError as error:
                raise ValueError(f"VAE {self.path!r} was not found: {str(error).splitlines()[0]}") from None
        return self._vae

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the posterior, unscaled: uint8 (B, 3, H, W) -> two of (B, C, h, w) float32."""
        posterior = self.vae.encode(images.to(self.device).float() / 127.5 - 1).latent_dist
        return posterior.mean, posterior.logvar

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """The posterior's mean, scaled."""
        return self.moments(images)[0] * self.scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents.to(self.device).float() / self.scale
        at_once = max(1, DECODE_AT_ONCE // latents.shape[-2:].numel())
        return torch.cat([to_uint8(self.vae.decode(part).sample) for part in latents.split(at_once)])


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] => uint8, rounded to nearest."""
    return (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
