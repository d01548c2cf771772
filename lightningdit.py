"""LightningDiT (arXiv 2501.01423): DiT with RMSNorm, SwiGLU, rotary positions and, optionally, QK-norm.

State-dict keys are that project's. Each kept token keeps the rotary angles of its own position: they are gathered with
the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dit import Attention, Block, DiT, Mlp, Routing, Text, modulate
from system import UserError
from system.kernels import linear


@dataclass(eq=False, repr=False)
class LightningDiT(DiT):
    """DiT's call, routes and arguments. Also raises UserError where a head's width is not divisible by 4."""

    input_size: int | Sequence[int] = 16
    in_channels: int = 32
    learn_sigma: bool = False
    size: str = "DiT-XL/1"
    qk_norm: bool = False  # of queries and keys: steadier in long bf16 runs, at some cost in FID; with texts, always
    norm: str = "rms"  # or layer, DiT's
    mlp: str = "swiglu"  # or gelu, DiT's; relu2: ReLU squared
    rotary: bool = True  # positions enter as the angles of queries and keys,
    sincos: bool = True  # and are added to the tokens
    # All blocks but the first mix their values v with the first's, v_1, gathered with their tokens in a route:
    # l v_1 + (1 - l) v, where each learns its l, from 0.5 (arXiv 2410.17897).
    value_residual: bool = False

    def __post_init__(self):
        if self.norm not in ("rms", "layer") or self.mlp not in ("swiglu", "gelu", "relu2"):
            raise UserError(f"norm={self.norm}, mlp={self.mlp}; needed: norm rms or layer, mlp swiglu, gelu or relu2")
        super().__post_init__()
        if self.hidden_size % (4 * self.num_heads):
            raise UserError(f"hidden_size {self.hidden_size} is not divisible by 4 x num_heads ({self.num_heads})")
        for head in self.all_blocks[len(self.blocks) :] if self.norm == "rms" else ():
            head.norm_final = nn.RMSNorm(self.hidden_size, eps=1e-6)
        if not self.sincos:
            self.pos_embed.zero_()
        for block in self.blocks[1:] if self.value_residual else ():
            block.attn.first_share = nn.Parameter(torch.tensor(0.5))
        angles = rotary_angles(self.hidden_size // self.num_heads, *self.grid, self.spacing)[None]  # (1, N, D/H)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def new_block(self) -> nn.Module:
        own = dict(qk_norm=self.qk_norm, norm=self.norm, mlp=self.mlp)
        return LightningBlock(self.hidden_size, self.num_heads, self.mlp_ratio, self.text_size, **own)

    def positions(self) -> tuple[torch.Tensor, ...]:
        """Cosine and sine of the tokens' angles, (1, N, D/H) each."""
        return (self.cos, self.sin) if self.rotary else ()

    def token_context(self, tokens: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Positions, and the first block's values (B, N, D)."""
        return (*self.positions(), self.blocks[0].values(tokens, c)) if self.value_residual else self.positions()

    def macs(self, routing: Routing | None = None) -> int:
        values = (self.num_tokens + 6) * self.hidden_size**2  # of the first block, for all: its modulation, and a third
        return super().macs(routing) + values * self.value_residual


class LightningBlock(Block):
    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, text: tuple[int, int] | None = None, *,
        qk_norm: bool, norm: str = "rms", mlp: str = "swiglu",
    ):  # fmt: skip
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.attn = RotaryAttention(hidden_size, num_heads, qk_norm, text)
        if norm == "rms":
            self.norm1 = nn.RMSNorm(hidden_size, eps=1e-6)
            self.norm2 = nn.RMSNorm(hidden_size, eps=1e-6)
        if mlp == "swiglu":
            self.mlp = SwiGLU(hidden_size, int(2 / 3 * int(hidden_size * mlp_ratio)))
        elif mlp == "relu2":
            self.mlp = SquaredReLU(hidden_size, int(hidden_size * mlp_ratio))

    def values(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Those of its attention: x (B, N, D), c (B, D) -> (B, N, D)."""
        shift, scale, *_ = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        weight, bias = (part.chunk(3)[2] for part in (self.attn.qkv.weight, self.attn.qkv.bias))
        return F.linear(modulate(self.norm1(x), shift, scale), weight, bias)


class RotaryAttention(Attention):
    """Attention with rotary positions (arXiv 2104.09864): queries and keys are rotated by their tokens' angles."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool, text: tuple[int, int] | None = None):
        super().__init__(hidden_size, num_heads, text)
        if text is None:
            self.q_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else nn.Identity()
            self.k_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.register_parameter("first_share", None)  # of the first block's values

    def forward(self, x: torch.Tensor, *per_token: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """x (B, K, D), per_token: cosine and sine (B or 1, K, D/H), or none, and the first block's values (B, K, D), or
        none, text of states (B, T, D) -> (B, K, D)."""
        q, k, v = self.split(x)  # (B, H, K, D/H)
        *angles, first = per_token if len(per_token) % 2 else (*per_token, None)
        if self.first_share is not None:
            first = first.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, K, D/H)
            v = (self.first_share * first.float() + (1 - self.first_share) * v.float()).to(v.dtype)
        q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if angles:
            cos, sin = (part[:, None] for part in angles)  # (B or 1, 1, K, D/H)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.attend(q.to(v.dtype), k.to(v.dtype), v, text)


class SquaredReLU(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(F.relu(linear(x, self.fc1)).square(), self.fc2)


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * inner_size)
        self.w3 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = linear(x, self.w12).chunk(2, dim=-1)
        return linear(F.silu(gate) * value, self.w3)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring pairs of x (..., D/H), as points in a plane, by their angles."""
    return Rotate.apply(x, cos, sin)


class Rotate(torch.autograd.Function):
    """Its gradient is the inverse rotation. Autograd would scatter it instead, which takes twice the time on CPUs."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, -sin), None, None


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin


def rotary_angles(head_size: int, rows: int, columns: int, spacing: tuple[float, float] = (1.0, 1.0)) -> torch.Tensor:
    """(N, head_size): the row's angles in the first half, the column's in the second, one per pair of x.

    spacing: of the coordinates, of rows and of columns.
    """
    frequency = 10000.0 ** -(torch.arange(head_size // 4, dtype=torch.float32) / (head_size // 4))
    row, column = (  # (rows, head_size / 2), (columns, head_size / 2)
        (torch.arange(n)[:, None] * step * frequency).repeat_interleave(2, dim=1)
        for n, step in zip((rows, columns), spacing)
    )
    both = row[:, None].expand(-1, columns, -1), column.expand(rows, -1, -1)
    return torch.cat(both, dim=-1).flatten(0, 1)
