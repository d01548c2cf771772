"""Guidance: weak + scale * (strong - weak). One rule; a method is a choice of the two branches.

    classifier-free (arXiv 2207.12598)         weak: no label
    independent condition (arXiv 2407.02687)   weak: a random label
    sparse (arXiv 2601.01608)                  weak: the same label, more tokens routed away
    autoguidance (arXiv 2406.02507)            weak: another checkpoint
    path drop (arXiv 2510.21986)               weak: no label, and the network without its middle
    internal (arXiv 2512.24176)                weak: the middle head, in the same call; in each of two branches
    interval (arXiv 2404.07724)                any of them, only for t in [lo, hi]

They combine. Both branches make the same kind of prediction, denoised or velocity, at the same (x, t).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import torch

import conditions
from contracts import MIDDLE, Condition, Network, Routing, Source
from routing_blocks import check_route, num_kept
from system import UserError
from system.settings import at_least, between, check_fields

Ratio = Annotated[float, between(0, 1)]  # of the tokens that are routed away
Time = Annotated[float, at_least(0)]


@dataclass(frozen=True)
class Guidance:
    """Settings of one guided prediction: the keys of configs/guidance/none.yaml.

    scale: 1 = no guidance: the weak branch is never called.
    gamma_strong, gamma_weak: the branches' selection ratios, in [0, 1); 0 = dense.
    scale_end, ...: where set, the setting moves from its value at noise to this one at data, along a half cosine.
    interval: (lo, hi) in the objective's own t; None = always.
    weak_label: "same", "none" (the null label) or "random".
    weak_ckpt: the weak branch's weights: a path, or "earliest" = the run's first checkpoint; None = the strong ones.
    weak_path: "drop" = the weak branch skips the deep path (SPRINT); None = it runs the whole network.
    cfg_channels: guide only the first so many channels; None = all.
    internal_scale: of each branch's own guidance by its middle head; 1 = off.

    Raises UserError for settings that cannot guide.
    """

    scale: Annotated[float, at_least(0)] = 1.0
    interval: tuple[Time, Time] | None = None
    gamma_strong: Ratio = 0.0
    gamma_weak: Ratio = 0.0
    weak_label: Literal["same", "none", "random"] = "none"
    scale_end: Annotated[float, at_least(0)] | None = None
    gamma_strong_end: Ratio | None = None
    gamma_weak_end: Ratio | None = None
    weak_ckpt: str | None = None
    cfg_channels: Annotated[int, at_least(1)] | None = None
    weak_path: Literal["drop"] | None = None
    internal_scale: Annotated[float, at_least(0)] = 1.0

    def __post_init__(self):
        check_fields(self)
        if self.interval is not None and self.interval[0] > self.interval[1]:
            raise UserError(f"interval={list(self.interval)}; needed: [lo, hi] with lo <= hi")
        if self.weak_path and max(self.ends("gamma_weak")) > 0:
            raise UserError("weak_path=drop leaves the weak branch no tokens to route; needed: gamma_weak=0")
        if self.on and self.weak_ckpt is None and self.weak_path is None:
            self.check_order()

    @property
    def alone(self) -> "Guidance":
        """These settings, without those that a subclass adds."""
        return Guidance(**{field.name: getattr(self, field.name) for field in fields(Guidance)})

    def check_order(self) -> None:
        """Raises UserError unless routing makes the weak branch the weaker one; equal ratios need different labels."""
        strong, weak = self.ends("gamma_strong"), self.ends("gamma_weak")
        if any(s > w for s, w in zip(strong, weak)) or (strong == weak and self.weak_label == "same"):
            raise UserError(
                "sparse guidance needs gamma_strong < gamma_weak (the weak branch routes more tokens away); "
                f"got {' to '.join(f'{s:g}' for s in strong)} and {' to '.join(f'{w:g}' for w in weak)}"
            )

    def ends(self, name: str) -> tuple[float, ...]:
        """A setting's values at pure noise and at data."""
        start, end = getattr(self, name), getattr(self, f"{name}_end")
        return (start, start if end is None else end)

    def at(self, name: str, t: float) -> float:
        """scale, gamma_strong or gamma_weak at the flow time t: 1 = noise, 0 = data."""
        start, end = self.ends(name)
        return start if start == end else end + (start - end) * (1 - math.cos(math.pi * float(t))) / 2

    @property
    def on(self) -> bool:
        """Whether the weak branch is ever called."""
        return self.ends("scale") != (1, 1)

    @property
    def routed(self) -> bool:
        return max(self.ends("gamma_strong")) > 0 or (self.on and max(self.ends("gamma_weak")) > 0)


def check_networks(guidance: Guidance, strong: Network, weak: Network) -> None:
    """Raises UserError where guidance needs what the two branches' networks were not trained for."""
    networks = (strong, weak)[: 2 if guidance.on else 1]
    for network in networks if guidance.internal_scale != 1 else ():
        block, sparse = network.middle_head, guidance.routed or guidance.weak_path
        if block is None:
            raise UserError("guidance=internal needs a network trained with model.middle_head=; this one has none")
        if sparse and any(route.sparse_from <= block <= route.end_layer_idx for route in network.routes):
            found = f"internal_scale={guidance.internal_scale:g} with routing, and the middle head lies inside a route"
            raise UserError(f"{found}; needed: gamma_strong=0, gamma_weak=0, weak_path=null, or internal_scale=1")
    trained = all(
        any(num_kept(net.num_tokens, route.selection_ratio) < net.num_tokens for route in net.routes)
        for net in (strong, weak)
    )
    if guidance.routed and not trained:
        raise UserError("guidance by routing needs a model trained with routes (model=tread); this one has none")
    for network, name in zip(networks, ("gamma_strong", "gamma_weak")):
        first, last = guidance.ends(name)
        for route in network.routes:
            if route.selection != "random" and first != last:
                found = f"{name} changes from {first:g} to {last:g}"
                raise UserError(f"{found}; selection={route.selection} needs one ratio")
            with user_mistakes(name):
                check_route(route, first, route.grid)
    if guidance.on and guidance.weak_path:
        with user_mistakes("weak_path"):
            weak.macs(Routing(drop_path=True))


@contextmanager
def user_mistakes(key: str) -> Iterator[None]:
    """A ValueError of the maths inside is a mistake in the setting `key`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def internal(net: Callable, scale: float, channels: int) -> Callable:
    """net(x, t, condition, hidden=), guided by its own middle head: v_mid + scale (v - v_mid), in one call.

    channels: of x; others, learned variances, are not guided. Every prediction is affine in what the network returns,
    so that the rule is the same on either.
    """

    def guided(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        out, states = net(x, t, condition, hidden=[MIDDLE])
        both = lambda x, t: (out, states[MIDDLE][0])
        return guide(net, net, scale, both=both, channels=channels)(x, t)

    return guided


@dataclass
class Branch:
    """One side of the rule, for one batch of images: x (B, C, h, w), t () -> prediction (B, C, h, w)."""

    predict: Callable  # predict(x, t, condition, routing) -> prediction
    condition: Callable[[], Condition]  # of the batch
    ratio: Callable  # t -> selection ratio
    masks: list[torch.Generator]  # of the routed tokens, one per image
    drop_path: bool = False
    internal: tuple[float, ...] = ()  # the scale of its own guidance by the middle head, for `predict`

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        routing = routing_at(self.ratio(t), self.masks, self.drop_path)
        return self.predict(x, t, self.condition(), routing, *self.internal)


def routing_at(ratio: float, masks: Source, drop_path: bool = False) -> Routing | None:
    return Routing(ratio, masks, drop_path=drop_path) if ratio > 0 or drop_path else None


def pair(strong: Branch, weak: Branch) -> Callable:
    """(x, t) -> both predictions, in one batch where both come from one network at one token count."""

    def both(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = strong.ratio(t)
        if strong.predict != weak.predict or ratio != weak.ratio(t) or strong.drop_path != weak.drop_path:
            return strong(x, t), weak(x, t)
        condition = conditions.join(strong.condition(), weak.condition())
        routing = routing_at(ratio, strong.masks + weak.masks)
        return strong.predict(torch.cat([x, x]), t, condition, routing, *strong.internal).chunk(2)

    return both


def guide(
    strong: Callable,  # (x, t) -> prediction (B, C, h, w)
    weak: Callable,  # (x, t) -> prediction
    scale: float | Callable,  # a number, or t -> number
    interval: tuple[float, float] | None = None,  # of t; None = always
    *,
    both: Callable | None = None,  # (x, t) -> (strong, weak) in one call; None = two calls
    channels: int | None = None,  # guide only the first so many; None = all
) -> Callable:
    """(x, t) -> guided prediction. `weak` is called only where scale != 1 and t is in `interval`."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        weight = scale(t) if callable(scale) else scale
        if weight == 1 or (interval is not None and not interval[0] <= t <= interval[1]):
            return strong(x, t)
        prediction, reference = both(x, t) if both is not None else (strong(x, t), weak(x, t))
        guided, by = prediction[:, :channels], reference[:, :channels]
        result = by + weight * (guided - by)
        return result if channels is None else torch.cat([result, prediction[:, channels:]], dim=1)

    return predict
