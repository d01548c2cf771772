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


def settled(kind: str, scale: Channels | None, bias: Channels | None) -> tuple[Channels | None, Channels | None]:
    """(scale, bias) as meta.json holds them; ValueError where kind, scale and bias do not go together."""
    check_kind(kind)
    if kind == "sample_scaled":
        if scale is not None or bias is not None:
            raise ValueError("scale and bias are for the other kinds: in sample_scaled they are applied already")
        return None, None
    if scale is None:
        raise ValueError(f"latents of kind {kind} need a scale, and nothing says it: add scale=... (and bias=...)")
    return scale, 0.0 if bias is None else bias


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
    scale: float | torch.Tensor | None,
    bias: float | torch.Tensor | None,
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


def check_channels(name: str, value: Channels | None, channels: int) -> None:
    """Raises ValueError where a scale or bias is neither a number nor a list of one for each channel."""
    numbers = value if isinstance(value, list) else [value]
    fits = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers)
    if value is not None and not (fits and len(numbers) in (1, channels)):
        raise ValueError(f"{name}={value}; needed: a number, or a list of {channels}, one for each channel")


def per_channel(value: Channels | None) -> float | torch.Tensor | None:
    """A scale or bias of meta.json for `to_model_input`: a number as it is, a list as a (C, 1, 1) tensor."""
    return torch.tensor(value).view(-1, 1, 1) if isinstance(value, list) else value


def guess_kind(raw: torch.Tensor) -> tuple[str, str]:
    """(kind, reason) that a few stored arrays (B, C, h, w) look like; a guess, for where nothing says it."""
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
