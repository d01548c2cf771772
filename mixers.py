"""Token mixers in place of attention, on DiT's skeleton, each routed by its nature. All but attention are O(N).

    pom         polynomial mixer (arXiv 2604.06129): a gated mean over tokens of a polynomial of each     any tokens
    linear      ReLU linear attention, as in SANA (arXiv 2410.10629)                                      any tokens
    ssd         Mamba-2's state space (arXiv 2405.21060), scanned forward and backward, row by row        their order
    ssd_zigzag  the same, scanned one way, along path i mod 8 in block i (ZigMa, arXiv 2403.13802)        their ranks
    rwkv        bidirectional WKV (arXiv 2404.04478) with shifts on the grid and a squared-ReLU MLP       their grid

What a mixer needs of the kept tokens, the last column, comes as `Mixer.positions`, gathered with them. B batch, N
tokens, K tokens given, D width, E = 2 D, S state, H heads, P = E / H.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from dit import Block, DiT, modulate
from routing_module import CELLS, gather_tokens, scatter_tokens

LINEAR_HEAD, SSD_HEAD, SSD_STATE, CHUNK = 32, 64, 64, 64  # channels, channels, numbers per channel, tokens at once
MAX_DECAY = 30  # of BiWKV over the whole sequence: beyond it, sums in float32 are not exact


@dataclass(eq=False, repr=False)
class Mixer(DiT):
    """DiT's call, routes and arguments, but for heads, whose width is the mixer's. mixer: as listed above.

    A text's mean modulates the blocks, as a class does: they have no attention in which its tokens could take part.
    Also raises ValueError for another mixer, for widths that it cannot divide and a selection that it cannot take.
    """

    num_heads: int = field(default=1, init=False)
    pooled_text: bool = field(init=False)
    middle_head: int | None = field(init=False)
    mixer: str = "pom"

    attends = False

    def __post_init__(self):
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer={self.mixer}; needed: {', '.join(MIXERS)}")
        super().__post_init__()
        self.per_token: torch.Tensor | None
        self.register_buffer("per_token", None, persistent=False)
        if self.mixer == "rwkv":
            self.per_token = torch.arange(self.num_tokens)[None]  # (1, N)
            self.shift_and_start()
        elif self.mixer == "ssd_zigzag":
            self.per_token = zigzag_ranks(*self.grid)[None]  # (1, N, 8)
            for i, block in enumerate(self.blocks):
                block.attn.path.fill_(i % 8)
        elif self.mixer == "ssd" and any(route.selection == "cells" for route in self.routes):
            found = "selection=cells orders tokens by cell, and mixer=ssd scans them row by row"
            raise ValueError(f"{found}; needed: another selection, or mixer=ssd_zigzag, which sorts them")

    def new_block(self) -> nn.Module:
        kind = RwkvBlock if self.mixer == "rwkv" else MixerBlock
        return kind(self.hidden_size, self.num_heads, self.mlp_ratio, MIXERS[self.mixer])

    def shift_and_start(self) -> None:
        """Tells RWKV's blocks on which grid they shift, and starts their decays and mixes by layer and channel."""
        for i, block in enumerate(self.blocks):
            around = [route.selection for route in self.routes if route.start_layer_idx <= i <= route.end_layer_idx]
            for part in (block.attn, block.mlp):
                part.grid, part.selection = self.grid, str((*around, "random")[0])  # a function's: none of those below
                part.start(i, len(self.blocks))

    def positions(self) -> tuple[torch.Tensor, ...]:
        """RWKV: the tokens' places on the grid, (1, N); ssd_zigzag: their ranks in each path, (1, N, 8); or none."""
        return () if self.per_token is None else (self.per_token,)


class MixerBlock(Block):
    """DiT's block; `mixer` builds, from the width, what stands in place of attention."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, mixer: Callable[[int], nn.Module]):
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.attn = mixer(hidden_size)


# Mixers that need nothing of their tokens


class PolynomialMixer(nn.Module):
    def __init__(self, hidden_size: int, degree: int = 2, expand: int = 2):
        super().__init__()
        width = expand * hidden_size
        self.po = nn.Linear(hidden_size, width, bias=False)
        self.se = nn.Linear(hidden_size, width)
        self.ag = nn.Linear(width, hidden_size, bias=False)
        # Of three dimensions, as it is no matrix for Muon.
        self.coefficients = nn.Parameter(torch.randn(degree, 1, width).clamp(-1e-3, 1e-3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, K, D)
        h = F.leaky_relu(self.po(x).float(), 0.01).clamp(-0.1, 6)  # (B, K, 2 D)
        polynomial = torch.zeros_like(h)
        for c in self.coefficients.flip(0):  # Horner's rule: c_1 h + c_2 h^2 + ...
            polynomial = h * (c + polynomial)
        return self.ag(F.hardsigmoid(self.se(x)) * polynomial.mean(dim=1, keepdim=True))

    def products(self, num_tokens: int) -> int:
        return 0


class LinearAttention(nn.Module):
    def __init__(self, hidden_size: int):
        super().__init__()
        self.heads = heads_of(hidden_size, LINEAR_HEAD)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, K, D)
        q, k, v = self.qkv(x).float().unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, K, 32) each
        with torch.autocast(x.device.type, enabled=False):
            v = F.pad(v, (0, 1), value=1.0)  # the last column sums the weights
            out = q.relu() @ (k.relu().mT @ v)  # (B, H, K, 33)
            out = out[..., :-1] / (out[..., -1:] + 1e-8)
        return self.proj(out.transpose(1, 2).flatten(2))

    def products(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.proj.in_features * (LINEAR_HEAD + 1)


def heads_of(width: int, head: int) -> int:
    """Raises ValueError where heads of that width do not divide it."""
    if width % head:
        raise ValueError(f"hidden_size={width}; needed: a multiple of {head}, for this mixer's heads")
    return width // head


# A mixer that needs an order


class StateSpace(nn.Module):
    """Its scans' sum, gated by z. directions: 2 = rows forward and backward, 1 = along a path of `zigzag_ranks`."""

    def __init__(self, hidden_size: int, directions: int):
        super().__init__()
        self.inner = 2 * hidden_size
        self.scans = nn.ModuleList([Scan(self.inner, heads_of(hidden_size, SSD_HEAD // 2)) for _ in range(directions)])
        own = 2 * SSD_STATE + self.inner // SSD_HEAD  # B, C and dt of each direction; x and z are shared
        self.in_proj = nn.Linear(hidden_size, 2 * self.inner + directions * own, bias=False)
        self.norm = nn.RMSNorm(self.inner, eps=1e-5)
        self.out_proj = nn.Linear(self.inner, hidden_size, bias=False)
        self.register_buffer("path", torch.zeros(1, dtype=torch.int64), persistent=False)  # a tensor: one graph for all

    def forward(self, x: torch.Tensor, *ranks: torch.Tensor) -> torch.Tensor:
        """x (B, K, D), ranks (B or 1, K, 8) where there are paths -> (B, K, D)."""
        z, u, rest = self.in_proj(x).split([self.inner, self.inner, self.in_proj.out_features - 2 * self.inner], dim=-1)
        scanned = [torch.cat([u, own], dim=-1) for own in rest.chunk(len(self.scans), dim=-1)]  # (B, K, E + 2 S + H)
        if ranks:
            rank = ranks[0].index_select(-1, self.path).squeeze(-1)  # (B or 1, K)
            order = rank.argsort(dim=1).expand(len(x), -1)
            y = self.scans[0](gather_tokens(scanned[0], order))
            y = gather_tokens(y, order.argsort(dim=1))  # (B, K, E)
        else:
            y = self.scans[0](scanned[0]) + self.scans[1](scanned[1].flip(1)).flip(1)
        return self.out_proj(self.norm(y * F.silu(z.float())))

    def products(self, num_tokens: int) -> int:
        count, length = chunks(num_tokens)
        per_token = length * (SSD_STATE + self.inner) + 2 * SSD_STATE * self.inner
        return len(self.scans) * count * length * per_token


class Scan(nn.Module):
    """One direction: a causal convolution over 4 tokens, then the state space."""

    def __init__(self, inner: int, heads: int):
        super().__init__()
        self.inner, self.heads, channels = inner, heads, inner + 2 * SSD_STATE
        self.taps = nn.Parameter(torch.empty(4, 1, channels).uniform_(-0.5, 0.5))  # the last is the token's own
        self.taps_bias = nn.Parameter(torch.empty(channels).uniform_(-0.5, 0.5))
        dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, K, E + 2 S + H) in scan order -> (B, K, E) float32
        x, dt = x.float().split([self.inner + 2 * SSD_STATE, self.heads], dim=-1)
        K, padded = x.shape[1], F.pad(x, (0, 0, 3, 0))
        x = F.silu(self.taps_bias + sum(padded[:, i : i + K] * tap for i, tap in enumerate(self.taps)))
        x, b, c = x.split([self.inner, SSD_STATE, SSD_STATE], dim=-1)
        x, dt = x.unflatten(-1, (self.heads, -1)), F.softplus(dt + self.dt_bias)  # (B, K, H, P), (B, K, H)
        y = state_space(x * dt.unsqueeze(-1), -dt * self.A_log.exp(), b, c) + self.D[:, None] * x
        return y.flatten(2)


def state_space(x: torch.Tensor, log_decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """y_t = c_t h_t with h_t = exp(log_decay_t) h_{t-1} + b_t x_t, in chunks (arXiv 2405.21060, section 6).

    x (B, K, H, P), log_decay (B, K, H) <= 0, b and c (B, K, S) -> (B, K, H, P), in float32 or above but for products.
    """
    K, (count, length) = x.shape[1], chunks(x.shape[1])  # length = Q
    x, log_decay = (F.pad(part, (0, 0) * (part.ndim - 2) + (0, count * length - K)) for part in (x, log_decay))
    b, c = (F.pad(part, (0, 0, 0, count * length - K)).unflatten(1, (count, length)) for part in (b, c))
    x = x.unflatten(1, (count, length)).transpose(2, 3)  # (B, chunks, H, Q, P)
    total = log_decay.unflatten(1, (count, length)).transpose(2, 3).cumsum(dim=-1)  # (B, chunks, H, Q)
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()  # (B, chunks, H, Q, Q)
    within = ((c @ b.mT).unsqueeze(2) * decay) @ x  # (B, chunks, H, Q, P)
    left = (total[..., -1:] - total).exp().unsqueeze(-1)  # what is left of each token at its chunk's end
    added = b.mT.unsqueeze(2) @ (x * left)  # (B, chunks, H, S, P)
    state, before = torch.zeros_like(added[:, 0], dtype=total.dtype), []
    for i in range(count):
        before.append(state)
        state = state * total[:, i, :, -1, None, None].exp() + added[:, i]
    carried = (c.unsqueeze(2) @ torch.stack(before, dim=1)) * total.exp().unsqueeze(-1)  # (B, chunks, H, Q, P)
    return (within + carried).transpose(2, 3).flatten(1, 2)[:, :K]


def chunks(num_tokens: int) -> tuple[int, int]:
    """(number, length) of equal chunks of at most CHUNK tokens that hold all of them."""
    count = -(-num_tokens // CHUNK)
    return count, -(-num_tokens // count)


def zigzag_ranks(rows: int, columns: int) -> torch.Tensor:
    """Each token's rank in 8 paths, (N, 8): snakes along rows, then along columns, from each of the four corners."""
    ids, paths = torch.arange(rows * columns).view(rows, columns), []
    for grid in (ids, ids.T):
        for corner in ((), (0,), (1,), (0, 1)):
            snake = grid.flip(corner).clone()
            snake[1::2] = snake[1::2].flip(1)
            paths.append(snake.flatten().argsort())
    return torch.stack(paths, dim=1)


# A mixer that needs an order and a grid


class RwkvBlock(MixerBlock):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, mixer: Callable[[int], nn.Module]):
        super().__init__(hidden_size, num_heads, mlp_ratio, mixer)
        self.mlp = ChannelMix(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x: torch.Tensor, c: torch.Tensor, text: None, ids: torch.Tensor) -> torch.Tensor:
        """x (B, K, D), c (B, D), ids (B or 1, K): the tokens' places on the grid -> (B, K, D)."""
        modulation = self.adaLN_modulation(c)[:, None]  # (B, 1, 6 D)
        shift_att, scale_att, gate_att, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x = x + gate_att * self.attn(modulate(self.norm1(x), shift_att, scale_att), ids)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp), ids)


class Shifted(nn.Module):
    """Mixes each token with its neighbours. Whole rows or columns, and one token per cell, form a smaller grid; other
    tokens stay where they are, and neighbours that were routed away count as zeros."""

    grid: tuple[int, int]
    selection: str  # of the route around it; "random" where there is none

    def mixed(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x (B, K, D), ids (B or 1, K) -> (inputs, B, K, D), by `mix` (inputs, 1, 1, D)."""
        (rows, columns), K = self.grid, x.shape[1]
        if K == rows * columns or self.selection == "rows":  # all tokens first: one graph, however routes select
            near = q_shift(x, columns)
        elif self.selection == "columns":
            near = q_shift(x, K // rows)
        elif self.selection == "cells":
            near = q_shift(x, columns // CELLS[rows * columns // K][1])
        else:
            ids = ids.expand(len(x), -1)
            whole = scatter_tokens(x, ids, x.new_zeros(len(x), rows * columns, x.shape[2]))
            near = gather_tokens(q_shift(whole, columns), ids)
        return near + (x - near) * self.mix


def q_shift(x: torch.Tensor, columns: int) -> torch.Tensor:
    """(B, rows * columns, D): its quarters from the left, right, upper and lower neighbour; zeros beyond the border."""
    left, right, above, below = x.unflatten(1, (-1, columns)).chunk(4, dim=-1)  # (B, rows, columns, D / 4)
    left, right = F.pad(left, (0, 0, 1, -1)), F.pad(right, (0, 0, -1, 1))
    above, below = F.pad(above, (0, 0, 0, 0, 1, -1)), F.pad(below, (0, 0, 0, 0, -1, 1))
    return torch.cat([left, right, above, below], dim=-1).flatten(1, 2)


class SpatialMix(Shifted):
    def __init__(self, hidden_size: int):
        super().__init__()
        square = partial(nn.Linear, hidden_size, hidden_size, bias=False)
        self.key, self.value, self.receptance, self.output = square(), square(), square(), square()
        self.decay, self.first = (nn.Parameter(torch.empty(hidden_size)) for _ in range(2))
        self.mix = nn.Parameter(torch.empty(3, 1, 1, hidden_size))

    @torch.no_grad()
    def start(self, layer: int, depth: int) -> None:
        """Diffusion-RWKV's initialization, by layer and channel."""
        a, b, width = layer / max(depth - 1, 1), 1 - layer / depth, len(self.decay)
        channel = torch.arange(width)
        self.decay.copy_(-5 + 8 * (channel / (width - 1)) ** (0.7 + 1.3 * a))
        self.first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        share = (channel / width) ** b
        self.mix.copy_(torch.stack([share, share + 0.3 * a, share.sqrt()]).view(3, 1, 1, -1))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # (B, K, D), (B or 1, K)
        (k, v, r), K = self.mixed(x, ids), x.shape[1]
        decay = self.decay.clamp(-MAX_DECAY, MAX_DECAY)
        y = biwkv(decay / K, self.first / K, self.key(k).float(), self.value(v).float())
        return self.output(self.receptance(r).sigmoid() * y)

    def products(self, num_tokens: int) -> int:
        return 0


class ChannelMix(Shifted):
    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.key = nn.Linear(hidden_size, inner_size, bias=False)
        self.receptance = nn.Linear(hidden_size, hidden_size, bias=False)
        self.value = nn.Linear(inner_size, hidden_size, bias=False)
        self.mix = nn.Parameter(torch.empty(2, 1, 1, hidden_size))

    @torch.no_grad()
    def start(self, layer: int, depth: int) -> None:
        self.mix.copy_((torch.arange(self.mix.shape[-1]) / self.mix.shape[-1]) ** (1 - layer / depth))

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:  # (B, K, D), (B or 1, K)
        k, r = self.mixed(x, ids)
        return self.receptance(r).sigmoid() * self.value(self.key(k).relu().square())


def biwkv(w: torch.Tensor, u: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Means of the values, of weights exp(k_i - (|t - i| - 1) w) for i != t and exp(u + k_t) for i = t, in O(K).

    w, u (D,) with |w| K <= MAX_DECAY, k, v (B, K, D) of float32 or above -> (B, K, D).
    """
    K = k.shape[1]
    k = k - k.amax(dim=1, keepdim=True)  # cancels
    place = w * (torch.arange(K, device=k.device, dtype=k.dtype)[:, None] - K / 2)  # (K, D); its origin cancels
    back = (w - place).exp()  # (K, D): exp(-w (t - 1))

    def left(values: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        weights = (k + place).exp()
        sums = torch.stack([weights * values, weights]).cumsum(dim=2)  # (2, B, K, D)
        return F.pad(sums, (0, 0, 1, -1)) * back  # of the tokens before each

    own = (u + k).exp()
    above, below = left(v, k) + left(v.flip(1), k.flip(1)).flip(2) + torch.stack([own * v, own])
    return above / below


MIXERS = {
    "pom": PolynomialMixer,
    "linear": LinearAttention,
    "rwkv": SpatialMix,
    "ssd": partial(StateSpace, directions=2),
    "ssd_zigzag": partial(StateSpace, directions=1),
}
