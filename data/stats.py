"""Mean and standard deviation of the channels as the model sees them, and a word when they look wrong."""

from collections.abc import Iterable

import numpy as np
import torch

from data.kinds import guess_kind, is_moments
from data.latents import Latents
from randomness import seeded_generator

MAX_SAMPLES = 4096  # spread evenly over the set: enough for three digits
UNUSUAL = 2.5  # SD's latents are at 0.9 when scaled, 5 when not, 0.17 when scaled twice


def spread_evenly(count: int, at_most: int) -> np.ndarray:
    """Up to `at_most` different indices (n,) of 0..count-1, ascending."""
    return np.unique(np.linspace(0, count - 1, at_most).astype(np.int64))


def mean_and_std(batches: Iterable[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Of each channel, over batches x (B, C, h, w): two lists of C numbers."""
    count, total, square = 0, 0.0, 0.0
    for x in batches:
        x = x.double()
        count += x[:, 0].numel()
        total, square = total + x.sum(dim=(0, 2, 3)), square + x.square().sum(dim=(0, 2, 3))
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    return [round(v, 5) for v in mean.tolist()], [round(v, 5) for v in std.tolist()]


def channel_stats(latents: Latents, max_samples: int = MAX_SAMPLES) -> tuple[list[float], list[float]]:
    """Mean and std (C numbers each) of the model's input over at most `max_samples` samples."""
    chosen, generator = spread_evenly(len(latents), max_samples), seeded_generator("channel_stats")
    return mean_and_std(
        latents.to_model_input(latents.read(indices)[0], generator)
        for indices in np.array_split(chosen, -(-len(chosen) // 256))
    )


def scale_warning(latents: Latents, sigma_data: float) -> str | None:
    """A line for the start of training where the latents do not look like what they should be, else None.

    sigma_data: the standard deviation that the objective is set up for (EDM's sigma_data; 1 for a flow to N(0, 1)).
    """
    looks, reason = guess_kind(latents.read(spread_evenly(len(latents), 64))[0])
    if is_moments(looks) and not is_moments(latents.kind):
        return f"{latents.folder} is read as {latents.kind} but looks like {looks}: {reason} (set data.kind)"
    mean, std = (np.array(values) for values in channel_stats(latents, 256))
    overall = float(np.sqrt(np.mean(std**2 + mean**2) - np.mean(mean) ** 2))
    if sigma_data / UNUSUAL <= overall <= sigma_data * UNUSUAL:
        return None
    return (
        f"the latents in {latents.folder} have standard deviation {overall:.3g}, the objective expects about "
        f"{sigma_data:.3g}: is their scale right? (python -m data inspect {latents.folder})"
    )
