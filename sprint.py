"""SPRINT (arXiv 2510.21986): most tokens skip the middle of the network, and a dense stream goes around it.

    shallow = f(x)                              2 blocks (encoder_depth), all N tokens
    deep = g(kept tokens of shallow)            the blocks between, K tokens, padded to N with a mask token
    output = h(fusion([deep | shallow]))        fusion 2 D -> D, then 2 blocks (decoder_depth), all N tokens

f, g and h are `blocks` in their order. In training some samples lose their whole deep stream to the mask token (path
drop), so the network predicts without g too: path-drop guidance takes that as its weak branch, at the price of f and h.
At selection_ratio 0 nothing is padded: the second stage and dense sampling use the same weights.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from dit import Condition, xavier
from lightningdit import LightningDiT
from randomness import uniform
from routing_module import Route, Routing, gather_tokens, run_blocks, scatter_tokens


@dataclass(eq=False, repr=False)
class Sprint(LightningDiT):
    """LightningDiT's call and arguments, and the sparse middle in place of routes.

    The defaults are the paper's SiT: DiT's LayerNorm, rotary positions alone, QK-norm, SwiGLU; with norm="layer",
    mlp="gelu", qk_norm=False, rotary=False it is DiT. Raises ValueError where encoder and decoder leave no block for g,
    and for a ratio that the selection does not allow.
    """

    input_size: int | Sequence[int] = 32
    in_channels: int = 4
    routes: Sequence[Route] = field(init=False)
    fp32_after_route: bool = field(init=False)
    size: str = "DiT-XL/2"
    qk_norm: bool = True
    norm: str = "layer"
    sincos: bool = False
    value_residual: bool = field(init=False)
    selection_ratio: float = 0.75  # of g's tokens in training, as in a Route
    selection: str = "structured"
    path_drop: float = 0.1  # the probability, per sample, that training replaces the deep stream by the mask token
    encoder_depth: int = 2  # the blocks of f
    decoder_depth: int = 2  # and of h

    def __post_init__(self):
        f, h, depth = self.encoder_depth, self.decoder_depth, self.depth
        if min(f, h) < 1 or depth is not None and depth <= f + h:
            found = f"SPRINT's {f} + {h} dense blocks leave none of {depth} for its sparse middle"
            raise ValueError(f"{found}; needed: 1 of each or more")
        if not 0 <= self.path_drop < 1:
            raise ValueError(f"path_drop {self.path_drop}; needed: a probability in [0, 1)")
        self.routes = [Route(self.selection_ratio, f, -1 - h, self.selection)]
        super().__post_init__()
        self.sparse = slice(f, -h)  # g's blocks
        self.fusion = nn.Linear(2 * self.hidden_size, self.hidden_size)
        xavier(self.fusion)
        # A buffer: in the authors' code it is not trained.
        self.register_buffer("mask_token", 0.02 * torch.randn(1, 1, self.hidden_size))

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, condition: Condition, *, routing: Routing | None = None,
        hidden: Collection[int | str] = (),
    ):  # fmt: skip
        tokens, *context = self.embed(x, t, condition)  # (B, N, D), (B, D), (B, T, D)
        blocks, asked = list(enumerate(self.blocks)), self.blocks_of(hidden)
        tokens, found = run_blocks(blocks[: self.sparse.start], tokens, context, self.positions(), hidden=asked)
        deep, inside = self.deep_stream(blocks[self.sparse], tokens, context, routing, asked)  # (B, N, D)
        # In the dtype of f's tokens, or the blocks of h would be compiled separately under autocast.
        tokens = self.fusion(torch.cat([deep, tokens], dim=-1)).to(tokens.dtype)  # (B, N, D)
        tokens, last = run_blocks(blocks[self.sparse.stop :], tokens, context, self.positions(), hidden=asked)
        return self.output(tokens, context[0], found | inside | last, hidden)

    def deep_stream(
        self, blocks: list, shallow: torch.Tensor, context: list, routing: Routing | None, hidden: Collection[int]
    ) -> tuple[torch.Tensor, dict]:
        """What g makes of the shallow stream (B, N, D): (B, N, D), the mask token in the places that g did not see."""
        if routing is not None and routing.drop_path:
            return self.mask_token.expand_as(shallow), {}
        tokens, positions, keep_ids = shallow, self.positions(), None
        if routing is not None and (keep_ids := routing.draw(self.routes[0], shallow)) is not None:
            tokens, *positions = (gather_tokens(part, keep_ids) for part in (shallow, *positions))  # (B, K, ...)
        tokens, states = run_blocks(blocks, tokens, context, positions, hidden=hidden)
        states = {i: (state, keep_ids) for i, (state, _) in states.items()}
        if keep_ids is not None:
            tokens = scatter_tokens(tokens, keep_ids, self.mask_token.expand_as(shallow))  # (B, N, D)
        if self.path_drop and routing is not None and routing.selection_ratio is None and routing.keep_ids is None:
            dropped = uniform((len(tokens),), routing.generators, device=tokens.device) < self.path_drop  # (B,)
            tokens = torch.where(dropped.view(-1, 1, 1), self.mask_token, tokens)
        return tokens, states

    def macs(self, routing: Routing | None = None) -> int:
        return super().macs(routing) + self.num_tokens * self.fusion.weight.numel()

    def tokens_seen(self, routing: Routing | None) -> list[int]:
        return super().tokens_seen(None if routing is not None and routing.drop_path else routing)

    def block_macs(self, routing: Routing | None) -> list[int]:
        macs, whole = super().block_macs(routing), routing is None or not routing.drop_path
        return macs if whole else macs[: self.sparse.start] + macs[self.sparse.stop :]
