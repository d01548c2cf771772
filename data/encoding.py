"""The latent encoding: what the stored numbers are, and how they become the model's input x.

    sample_scaled    x itself: a sample of the autoencoder's posterior, already scaled (DiT's convention)
    sample_raw       an unscaled sample z:           x = z * scale + bias
    moments_logvar   mean, then log variance:        z = mean + exp(clamp(logvar, -30, 20) / 2) * noise, then as above
    mean_std         mean, then standard deviation:  z = mean + std * noise, then as above

Moments are sampled anew at every use. `scale` and `bias` are numbers, or lists with one number per channel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import get_args

import torch

from randomness import Generators, normal
from system import UserError
from system.settings import Kind, PerChannel

LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution clamps to it too


@dataclass(frozen=True)
class LatentEncoding:
    """scale, bias: None for sample_scaled; a missing bias is 0. Raises UserError for other sets and unknown kinds."""

    kind: str
    scale: PerChannel | list[float] | None = None
    bias: PerChannel | list[float] | None = None

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise UserError(f"unknown kind of latents {self.kind!r}; needed: one of {', '.join(get_args(Kind))}")
        if self.kind == "sample_scaled":
            if self.scale is not None or self.bias is not None:
                raise UserError("scale and bias are for the other kinds: in sample_scaled they are applied already")
        elif self.scale is None:
            raise UserError(f"latents of kind {self.kind} need a scale: add scale=... (and bias=...)")
        elif self.bias is None:
            object.__setattr__(self, "bias", 0.0)

    def check_channels(self, channels: int, place: str = "") -> None:
        """Raises UserError unless scale and bias are numbers or have one number for each of the model's channels."""
        for name, value in (("scale", self.scale), ("bias", self.bias)):
            numbers = value if isinstance(value, (list, tuple)) else [value]
            valid = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers)
            if value is not None and not (valid and len(numbers) in (1, channels)):
                needed = f"a number, or a list of {channels}, one for each channel"
                raise UserError(f"{name}{place}={value}; needed: {needed}")

    def to_model_input(self, raw: torch.Tensor, generators: Generators = None) -> torch.Tensor:
        """raw (B, C or 2C, h, w), any float dtype -> x (B, C, h, w) float32 on the same device."""
        raw = raw.float()
        if self.kind == "sample_scaled":
            return raw
        if is_moments(self.kind):
            mean, spread = raw.chunk(2, dim=1)  # (B, C, h, w) each
            std = spread if self.kind == "mean_std" else spread.clamp(*LOGVAR_RANGE).mul(0.5).exp()
            raw = mean + std * normal(mean.shape, generators, device=raw.device)
        scale, bias = (
            _per_channel(tuple(value), raw.device) if isinstance(value, (list, tuple)) else value
            for value in (self.scale, self.bias)
        )
        return raw * scale + bias


def is_moments(kind: str) -> bool:
    return kind in ("moments_logvar", "mean_std")


def model_shape(kind: str, stored_shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, h, w) of the model's input for latents stored as (C, h, w), or as (2C, h, w) for moments."""
    if len(stored_shape) != 3 or (is_moments(kind) and stored_shape[0] % 2):
        needed = "(2C, h, w)" if is_moments(kind) else "(C, h, w)"
        raise UserError(f"latents of kind {kind} are stored as {needed}; these are {tuple(stored_shape)}")
    channels, height, width = stored_shape
    return (channels // 2 if is_moments(kind) else channels), height, width


@lru_cache(maxsize=16)  # copied to the device once, not at every step
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device).view(-1, 1, 1)  # (C, 1, 1)


def guess_kind(raw: torch.Tensor) -> tuple[str, str]:
    """(kind, reason) that a few stored arrays (B, C, h, w) suggest; a guess, for when it is not recorded."""
    raw = raw.float()
    if raw.shape[1] % 2 == 0:
        spread = raw[:, raw.shape[1] // 2 :]
        if spread.min() >= 0:
            return "mean_std", "no number in the second half of the channels is negative, as of standard deviations"
        if (spread < 0).float().mean() > 0.9 and spread.mean() < -2:
            return "moments_logvar", f"the second half of the channels is near {spread.mean():.1f}, as of log variances"
    std = raw.std()
    if std > 2:
        return "sample_raw", f"their standard deviation is {std:.3g}: no scale has been applied"
    return "sample_scaled", f"their standard deviation is {std:.3g}"
