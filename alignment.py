"""Terms of the loss that align hidden tokens: with deeper ones of the same network, or with a teacher's features.

    layersync (arXiv 2510.12581)   - cos(h of `block`, h of `target`), the deeper one being constant
    repa      (arXiv 2410.06940)   - cos(projector(h of `block`), features), the projector being trained

Each is a mean over tokens, in [-1, 1] a sample, and is added to the loss times a weight: 0.2 and 0.5 as published.
Blocks are counted from 0: the papers' 8th and 16th are 7 and 15. Inside a route the term is on the kept tokens, at
which everything else is gathered. B batch, N tokens, K kept tokens, D width, D_t a teacher's width.
"""

from collections.abc import Callable, Collection

import torch
from torch import nn
from torch.nn.functional import normalize

from routing_module import Routing, gather_tokens

State = tuple[torch.Tensor, torch.Tensor | None]  # tokens (B, K, D), keep_ids (B, K), or None where all were kept


def layersync(h: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """h, target (B, K, D), of which only h has a gradient -> (B,)."""
    return -cosine(h, target.detach())


def repa(h: torch.Tensor, features: torch.Tensor, projector: Callable) -> torch.Tensor:
    """h (B, K, D), features (B, K, D_t), projector (B, K, D) -> (B, K, D_t) -> (B,)."""
    return -cosine(projector(h), features)


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(B, K, D) each -> the mean over tokens of the cosine over channels, (B,) float32."""
    return (normalize(a.float(), dim=-1) * normalize(b.float(), dim=-1)).sum(dim=-1).mean(dim=-1)


def make_projector(width: int, inner_width: int, teacher_width: int) -> nn.Module:
    """REPA's: three layers with SiLU between, (B, K, width) -> (B, K, teacher_width)."""
    widths = (width, inner_width, inner_width, teacher_width)
    layers = [nn.Linear(*pair) for pair in zip(widths, widths[1:])]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])


class Aligned(nn.Module):
    """A network and the projector of its alignment: what DDP wraps. Its call is the network's, with the features after
    the condition, and the states have the term times `weight` as "loss", (B,).

    block, target: the blocks whose tokens are aligned; target=None = with features instead, of teacher_width channels,
    through a projector of inner_width. Raises ValueError for blocks that the network, on the CPU, does not have, and
    for such whose tokens cannot be compared.
    """

    def __init__(
        self, net: nn.Module, weight: float, block: int, target: int | None = None, teacher_width: int | None = None,
        inner_width: int = 2048,
    ):  # fmt: skip
        super().__init__()
        self.net, self.weight, self.blocks = net, weight, (block,) if target is None else (block, target)
        with torch.no_grad():
            width = self.width_of_tokens()
        self.projector = None if teacher_width is None else make_projector(width, inner_width, teacher_width)
        self.feature_shape = None if teacher_width is None else (net.num_tokens, teacher_width)

    def width_of_tokens(self) -> int:
        """Of the aligned block. Raises ValueError where a sample of zeros, routed as in training, has no term."""
        x, routing = torch.zeros(1, *self.net.latent_shape), self.net.training_routing(1, torch.Generator(), "cpu")
        out = self.net(x, torch.ones(1), self.net.null_condition, routing=routing, hidden=self.blocks)
        states = out[1] if isinstance(out, tuple) else {}
        if missing := [str(i) for i in self.blocks if i not in states]:
            raise ValueError(f"alignment of block {' and '.join(missing)}, which the network does not have")
        h, target = on_same_tokens(*(states[i] for i in (self.blocks[0], self.blocks[-1])))
        if h.shape != target.shape:
            raise ValueError(f"alignment of blocks {self.blocks}, whose widths differ: {h.shape[2]}, {target.shape[2]}")
        return h.shape[2]

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, condition, features: torch.Tensor | None = None, *,
        routing: Routing | None = None, hidden: Collection[int | str] = (),
    ) -> tuple[torch.Tensor, dict]:  # fmt: skip
        """As `contracts.Network`; features (B, N, D_t)."""
        out, states = self.net(x, t, condition, routing=routing, hidden=[*hidden, *self.blocks])
        state, other = states[self.blocks[0]], (features, None) if self.projector else states[self.blocks[-1]]
        h, target = on_same_tokens(state, other)
        term = repa(h, target, self.projector) if self.projector else layersync(h, target)
        return out, states | {"loss": self.weight * term}


def on_same_tokens(state: State, other: State) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of both, (B, K, D) each: where one has all of them, those that the other has kept."""
    (h, kept), (target, others) = state, other
    if kept is not others and kept is not None and others is not None:
        raise ValueError("alignment of blocks in two routes, which keep other tokens; needed: both in one of them")
    if kept is None and others is not None:
        h = gather_tokens(h, others)
    elif others is None and kept is not None:
        target = gather_tokens(target, kept)
    return h, target
