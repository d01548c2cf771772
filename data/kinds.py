"""What the stored numbers are, and how they become the model's input x.

    sample_scaled    x itself: a sample of the autoencoder's posterior, scale already applied (DiT's convention)
    sample_raw       a sample z without scale:       x = z * scale + bias
    moments_logvar   mean, then log variance:        z = mean + exp(clamp(logvar, -30, 20) / 2) * noise, then as above
    mean_std         mean, then standard deviation:  z = mean + std * noise, then as above

Moments are drawn afresh at every use. `scale` and `bias` are numbers, or (C, 1, 1) tensors with one number a channel.
"""

from collections.abc import Sequence

import torch

from randomness import Generators, normal

KINDS = ("sample_scaled", "sample_raw", "moments_logvar", "mean_std")
Channels = float | list[float]  # as in meta.json
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution clamps there too


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of latents {kind!r}; needed: one of {', '.join(KINDS)}")


def is_moments(kind: str) -> bool:
    return kind in ("moments_logvar", "mean_std")


def model_shape(kind: str, stored_shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, h, w) of the model's input for latents stored as (C, h, w), or as (2C, h, w) for moments."""
    if len(stored_shape) != 3 or (is_moments(kind) and stored_shape[0] % 2):
        needed = "(2C, h, w)" if is_moments(kind) else "(C, h, w)"
        raise ValueError(f"latents of kind {kind} are stored as {needed}; these are {tuple(stored_shape)}")
    channels, height, width = stored_shape
    return (channels // 2 if is_moments(kind) else channels), height, width


def to_model_input(
    raw: torch.Tensor,
    kind: str,
    scale: float | torch.Tensor,
    bias: float | torch.Tensor,
    generators: Generators = None,
) -> torch.Tensor:
    """raw (B, C or 2C, h, w), any float dtype -> x (B, C, h, w) float32 on the same device."""
    raw = raw.float()
    if kind == "sample_scaled":
        return raw
    if is_moments(kind):
        mean, spread = raw.chunk(2, dim=1)  # (B, C, h, w) each
        std = spread if kind == "mean_std" else spread.clamp(*LOGVAR_RANGE).mul(0.5).exp()
        raw = mean + std * normal(mean.shape, generators, device=raw.device)
    return raw * scale + bias
