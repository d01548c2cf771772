"""Codecs: decode turns latents (B, C, h, w), scaled as the network sees them, into uint8 images (B, 3, H, W)."""

import torch

DECODE_AT_ONCE = 8 * 32 * 32  # latent pixels per call of the decoder: 8 images of 256 x 256


class PixelCodec:
    """No autoencoder: pixels [0, 255] <-> [-1, 1]. Grey images (C = 1) become three equal channels."""

    def to(self, device) -> "PixelCodec":
        return self

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        images = to_uint8(latents)
        return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class VAECodec:
    """A diffusers AutoencoderKL, by hub name or local path; scaled latent = scale * the VAE's latent.

    Raises OSError, at first use, where the VAE or the package diffusers is missing.
    """

    def __init__(self, path: str = "stabilityai/sd-vae-ft-ema", scale: float = 0.18215):
        self.path, self.scale, self.device, self._vae = path, scale, torch.device("cpu"), None

    def to(self, device) -> "VAECodec":
        self.device = torch.device(device)
        if self._vae is not None:
            self._vae.to(self.device)
        return self

    @property
    def vae(self) -> torch.nn.Module:
        """Loaded at first use: training on latents never needs it."""
        if self._vae is None:
            try:
                from diffusers import AutoencoderKL
            except ImportError:
                raise FileNotFoundError("decoding latents needs the package diffusers: pip install diffusers") from None
            try:
                self._vae = AutoencoderKL.from_pretrained(self.path).eval().requires_grad_(False).to(self.device)
            except OSError as error:
                raise FileNotFoundError(f"VAE {self.path!r} was not found: {str(error).splitlines()[0]}") from None
        return self._vae

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The posterior's mean and log variance, unscaled: uint8 (B, 3, H, W) -> (B, C, h, w) float32 each."""
        posterior = self.vae.encode(images.to(self.device).float() / 127.5 - 1).latent_dist
        return posterior.mean, posterior.logvar

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        latents = latents.to(self.device).float() / self.scale
        at_once = max(1, DECODE_AT_ONCE // latents.shape[-2:].numel())
        return torch.cat([to_uint8(self.vae.decode(part).sample) for part in latents.split(at_once)])


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] => uint8, rounded to nearest."""
    return (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
