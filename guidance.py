"""Guidance: weak + scale * (strong - weak). One rule; every method is a choice of the two branches.

    classifier-free     strong: label                 weak: no label
    sparse (2601.01608) strong: label, low ratio      weak: the same label, high ratio (routing is what weakens it)
    interval            any of them, on for t in [lo, hi] only (2404.07724)

A branch is (label or null, ratio); both are predictions of one kind at equal (x, t): denoised, velocity or noise alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from routing_module import check_ratio


@dataclass(frozen=True)
class Guidance:
    """Settings of one guided prediction.

    scale: 1 = no guidance, the weak branch is not called. interval: (lo, hi) in the objective's own t, None = always.
    gamma_strong, gamma_weak: selection ratios of the two branches in [0, 1), 0 = dense.
    weak_label: "same", or "none" = the null label. Raises ValueError for what cannot guide.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    gamma_strong: float = 0.0
    gamma_weak: float = 0.0
    weak_label: str = "none"

    def __post_init__(self):
        check_ratio(self.gamma_strong)
        check_ratio(self.gamma_weak)
        if self.weak_label not in ("same", "none"):
            raise ValueError(f"weak_label {self.weak_label!r}; needed: same or none")
        if self.scale != 1 and self.weak_label == "same" and self.gamma_strong >= self.gamma_weak:
            raise ValueError(
                "sparse guidance needs gamma_strong < gamma_weak (the weak branch routes more tokens away); "
                f"got {self.gamma_strong} and {self.gamma_weak}"
            )
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"guidance scale {self.scale}; needed: a finite number >= 0 (1 = off)")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"guidance interval {self.interval}; needed: [lo, hi] with lo <= hi")

    @property
    def routed(self) -> bool:
        return self.gamma_strong > 0 or (self.scale != 1 and self.gamma_weak > 0)


def guide(strong: Callable, weak: Callable, scale: float, interval: tuple[float, float] | None = None) -> Callable:
    """Two callables (x, t) -> prediction become one. `weak` is called only where scale != 1 and t lies in `interval`."""

    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        prediction = strong(x, t)
        if scale == 1 or (interval is not None and not interval[0] <= t <= interval[1]):
            return prediction
        reference = weak(x, t)
        return reference + scale * (prediction - reference)

    return guided
