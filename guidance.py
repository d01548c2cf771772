"""Guidance: weak + scale * (strong - weak). One rule; every method is a choice of the two branches.

    classifier-free (2207.12598)   weak: no label
    independent (2407.02687)       weak: a label drawn at random
    sparse (2601.01608)            weak: the same label, more tokens routed away
    autoguidance (2406.02507)      weak: another checkpoint
    interval (2404.07724)          any of them, on for t in [lo, hi] only

They combine. Both branches predict one kind of thing at equal (x, t), denoised or velocity alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from randomness import Generators
from routing_module import Routing, check_ratio


@dataclass(frozen=True)
class Guidance:
    """Settings of one guided prediction: the keys of configs/guidance/none.yaml.

    scale: 1 = no guidance, the weak branch is not called. gamma_strong, gamma_weak: the branches' selection ratios, in
    [0, 1), 0 = dense. A number at `<name>_end` makes the setting go there along a half cosine, from noise to data.
    interval: (lo, hi) in the objective's own t, None = always. weak_label: "same", "none" = the null one, or "random".
    weak_ckpt: weights of the weak branch: a path, or "earliest" = the run's own first checkpoint; None = the same ones.
    cfg_channels: guide only the first so many channels; None = all. Raises ValueError for what cannot guide.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    gamma_strong: float = 0.0
    gamma_weak: float = 0.0
    weak_label: str = "none"
    scale_end: float | None = None
    gamma_strong_end: float | None = None
    gamma_weak_end: float | None = None
    weak_ckpt: str | None = None
    cfg_channels: int | None = None

    def __post_init__(self):
        for name in ("gamma_strong", "gamma_weak"):
            for ratio in self.ends(name):
                check_ratio(ratio)
        if not all(0 <= scale < math.inf for scale in self.ends("scale")):
            raise ValueError(f"guidance scale {self.scale}; needed: a finite number >= 0 (1 = off)")
        if self.weak_label not in ("same", "none", "random"):
            raise ValueError(f"weak_label {self.weak_label!r}; needed: same, none or random")
        if self.interval is not None and not (len(self.interval) == 2 and 0 <= self.interval[0] <= self.interval[1]):
            raise ValueError(f"guidance interval {list(self.interval)}; needed: [lo, hi] with 0 <= lo <= hi")
        if self.cfg_channels is not None and self.cfg_channels < 1:
            raise ValueError(f"cfg_channels {self.cfg_channels}; needed: at least 1, or null = all")
        if self.on and self.weak_ckpt is None:
            self.check_order()

    def check_order(self) -> None:
        """Raises ValueError unless routing makes the weak branch the weaker one; equal ratios need another label."""
        strong, weak = self.ends("gamma_strong"), self.ends("gamma_weak")
        if any(s > w for s, w in zip(strong, weak)) or (strong == weak and self.weak_label == "same"):
            raise ValueError(
                "sparse guidance needs gamma_strong < gamma_weak (the weak branch routes more tokens away); "
                f"got {' to '.join(f'{s:g}' for s in strong)} and {' to '.join(f'{w:g}' for w in weak)}"
            )

    def ends(self, name: str) -> tuple[float, ...]:
        """A setting's values at pure noise and at data; one where it does not change."""
        start, end = getattr(self, name), getattr(self, f"{name}_end")
        return (start, start if end is None else end)

    def at(self, name: str, t: float) -> float:
        """scale, gamma_strong or gamma_weak at a flow's time t, 1 = noise and 0 = data."""
        start, end = self.ends(name)
        return start if start == end else end + (start - end) * (1 - math.cos(math.pi * float(t))) / 2

    @property
    def on(self) -> bool:
        """Whether the weak branch is ever called."""
        return self.ends("scale") != (1, 1)

    @property
    def routed(self) -> bool:
        return max(self.ends("gamma_strong")) > 0 or (self.on and max(self.ends("gamma_weak")) > 0)


@dataclass
class Branch:
    """One side of the rule, for one batch of images. Calling it: x (B, C, h, w), t () -> prediction (B, C, h, w)."""

    predict: Callable                               # predict(x, t, y, routing) -> prediction; one a network
    label: Callable                                 # () -> (B,) int64
    ratio: Callable                                 # t -> share of tokens routed away
    masks: list[torch.Generator]                    # one for each image

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.predict(x, t, self.label(), routing(self.ratio(t), self.masks))


def routing(ratio: float, masks: Generators) -> Routing | None:
    return Routing(ratio, masks) if ratio > 0 else None


def pair(strong: Branch, weak: Branch) -> Callable:
    """(x, t) -> both predictions, by one batch where one network sees equally many tokens in the two."""

    def both(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = strong.ratio(t)
        if strong.predict != weak.predict or ratio != weak.ratio(t):
            return strong(x, t), weak(x, t)
        labels = torch.cat([strong.label(), weak.label()])
        return strong.predict(torch.cat([x, x]), t, labels, routing(ratio, strong.masks + weak.masks)).chunk(2)

    return both


def guide(
    strong: Callable,                               # (x, t) -> prediction (B, C, h, w)
    weak: Callable,                                 # (x, t) -> prediction
    scale: float | Callable,                        # a number, or t -> number
    interval: tuple[float, float] | None = None,    # of t; None = always
    *,
    both: Callable | None = None,                   # (x, t) -> (strong, weak), where one call can give the two
    channels: int | None = None,                    # guide the first so many; the others are strong's. None = all
) -> Callable:
    """Two callables become one (x, t) -> prediction. `weak` is called only where scale != 1 and t is in `interval`."""

    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        weight = scale(t) if callable(scale) else scale
        if weight == 1 or (interval is not None and not interval[0] <= t <= interval[1]):
            return strong(x, t)
        prediction, reference = both(x, t) if both is not None else (strong(x, t), weak(x, t))
        result = reference + weight * (prediction - reference)
        return result if channels is None else torch.cat([result[:, :channels], prediction[:, channels:]], dim=1)

    return guided
