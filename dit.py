"""DiT (arXiv 2212.09748): a transformer over latent patches, conditioned by adaLN-Zero, with TREAD's routes through it.

State-dict keys are the official ones. Shapes: B batch, C channels, N = (input_size / patch_size)^2 tokens, K tokens
that stay inside a route, D width, H heads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from routing_module import Route, Routing, draw_keep_ids, gather_tokens, num_kept, resolve_routes, scatter_tokens

# DiT's sizes (arXiv 2212.09748, Table 1), and one for 28x28 digits on a laptop.
SIZES = {
    "XS": dict(depth=12, hidden_size=128, num_heads=4),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}

TIME_WIDTH = 256  # sinusoids of the time embedding


def build(
    size: str,                                      # "DiT-XL/2": S, B, L, XL (or XS), patch 2, 4, 8
    *,
    input_size: int,
    in_channels: int,
    num_classes: int,
    learn_sigma: bool = False,                      # True = 2 * in_channels outputs, as official DiT and SiT
    routes: Sequence[Route | Mapping] = (),
    depth: int | None = None,                       # None = by `size`
    hidden_size: int | None = None,                 # None = by `size`
    num_heads: int | None = None,                   # None = by `size`
    fp32_after_route: bool = False,                 # the block behind each route in float32, as TREAD's own code has it
) -> "DiT":
    """A DiT by its name. Raises ValueError for a name that is not one."""
    return DiT(
        input_size=input_size,
        in_channels=in_channels,
        num_classes=num_classes,
        learn_sigma=learn_sigma,
        routes=routes,
        fp32_after_route=fp32_after_route,
        **named_shape(size, depth, hidden_size, num_heads),
    )


def named_shape(size: str, depth: int | None, hidden_size: int | None, num_heads: int | None) -> dict[str, int]:
    """patch_size, depth, hidden_size and num_heads of a name; numbers that are given override it. Raises ValueError."""
    own = dict(depth=depth, hidden_size=hidden_size, num_heads=num_heads)
    name, _, patch = size.removeprefix("DiT-").partition("/")
    if name not in SIZES or not patch.isdigit():
        raise ValueError(f"model size {size!r}; needed: DiT-{{{','.join(SIZES)}}}/{{2,4,8}}, for example DiT-XL/2")
    return SIZES[name] | {key: value for key, value in own.items() if value is not None} | {"patch_size": int(patch)}


class DiT(nn.Module):
    """net(x, t, y, *, routing=None): x (B, C, h, w), t (B,) in the objective's units, y (B,) int64 -> (B, C_out, h, w).

    y is 0..num_classes-1, or num_classes for "no label". routing=None is dense; `Routing(...)` switches the model's
    routes on. `training` decides nothing. Raises ValueError for sizes that do not divide and routes that do not fit.
    fp32_after_route: the block behind a route that is on runs without autocast, at the price `cost.py` prints.
    gradient_checkpointing, an attribute: blocks keep their input alone for the backward pass and are computed again.
    block: what makes a block of (hidden_size, num_heads, mlp_ratio); None = `Block`.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        routes: Sequence[Route | Mapping] = (),
        fp32_after_route: bool = False,
        block: Callable[[int, int, float], nn.Module] | None = None,
    ):
        super().__init__()
        if min(input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes) < 1:
            raise ValueError("each of DiT's sizes, from input_size to num_classes, must be at least 1")
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not divisible by patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} must be divisible by num_heads ({num_heads}) and by 4")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.num_classes = num_classes
        self.num_tokens = (input_size // patch_size) ** 2
        self.routes = resolve_routes(routes, depth)
        behind = {route.end_layer_idx + 1 for route in self.routes} - {depth}
        self.fp32_blocks = behind if fp32_after_route else set()
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.register_buffer("pos_embed", sincos_positions(hidden_size, input_size // patch_size)[None])  # (1, N, D)
        self.blocks = nn.ModuleList([(block or Block)(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier linears, zero biases, N(0, 0.02) embeddings, zeros where adaLN-Zero and the output start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for zeroed in [*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1]]:
            nn.init.zeros_(zeroed.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, *, routing: Routing | None = None):
        # Where precision is cheap and shows in the samples (time embedding, output), it is float32 under autocast too.
        with torch.autocast(x.device.type, enabled=False):
            c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        tokens = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        where = self.positions(None)

        routes = iter(self.routes if routing is not None else ())
        route = next(routes, None)
        fp32_blocks = self.fp32_blocks if routing is not None else ()
        for i, block in enumerate(self.blocks):
            if route is not None and i == route.start_layer_idx:
                full, keep_ids = tokens, self.draw_route(route, routing, tokens)
                if keep_ids is not None:
                    tokens, where = gather_tokens(tokens, keep_ids), self.positions(keep_ids)  # (B, K, D)
            with torch.autocast(x.device.type, enabled=False) if i in fp32_blocks else nullcontext():
                tokens = self.run(block, tokens, c, where)
            if route is not None and i == route.end_layer_idx:
                if keep_ids is not None:
                    tokens, where = scatter_tokens(tokens, keep_ids, full), self.positions(None)  # (B, N, D)
                route = next(routes, None)

        with torch.autocast(x.device.type, enabled=False):
            patches = self.final_layer(tokens.float(), c)  # (B, N, p * p * C_out)
        return unpatchify(patches, self.patch_size, self.out_channels)

    def run(self, block: nn.Module, tokens: torch.Tensor, c: torch.Tensor, where: tuple) -> torch.Tensor:
        """One block; under gradient checkpointing only its input is kept, and the backward pass runs it again."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(tokens, c, *where)
        # Blocks draw no random numbers, and keeping the generator's state would make the host wait for the device.
        return checkpoint(block, tokens, c, *where, use_reentrant=False, preserve_rng_state=False)

    def positions(self, keep_ids: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """What blocks need to know of where their tokens lie, of all (None) or those kept (B, K): nothing, in DiT."""
        return ()

    def draw_route(self, route: Route, routing: Routing, tokens: torch.Tensor) -> torch.Tensor | None:
        """keep_ids (B, K) for one route, or None where the ratio routes no token away."""
        ratio = route.selection_ratio if routing.selection_ratio is None else routing.selection_ratio
        B, N, _ = tokens.shape
        if num_kept(N, ratio) == N:
            return None
        return draw_keep_ids(B, N, ratio, generators=routing.generators, device=tokens.device)

    def macs(self, routing: Routing | None = None) -> int:
        """Multiply-adds of one forward pass at batch 1, by formula: matrix products and attention (DiT's "Gflops")."""
        D, N, patch = self.pos_embed.shape[-1], self.num_tokens, self.patch_size**2
        embed = N * D * patch * self.in_channels + TIME_WIDTH * D + D * D
        return embed + sum(self.block_macs(routing)) + N * D * patch * self.out_channels + 2 * D * D

    def block_macs(self, routing: Routing | None = None) -> list[int]:
        """Those of each block."""
        D, depth = self.pos_embed.shape[-1], len(self.blocks)
        tokens = [self.num_tokens] * depth
        for route in self.routes if routing is not None else ():
            ratio = route.selection_ratio if routing.selection_ratio is None else routing.selection_ratio
            for i in range(route.start_layer_idx, route.end_layer_idx + 1):
                tokens[i] = num_kept(self.num_tokens, ratio)
        block = self.blocks[0]
        matrices = [p for part in (block.attn, block.mlp) for p in part.parameters() if p.ndim == 2]
        per_token = sum(matrix.numel() for matrix in matrices)  # (4 + 2 * mlp_ratio) D^2, in DiT
        return [per_token * n + 2 * n * n * D + 6 * D * D for n in tokens]


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the condition (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor, *where: torch.Tensor) -> torch.Tensor:
        """x (B, K, D), c (B, D), where: `DiT.positions` -> (B, K, D)."""
        modulation = self.adaLN_modulation(c)[:, None]  # (B, 1, 6 D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), *where)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class Attention(nn.Module):
    """Self-attention over all tokens given; gathered tokens keep it dense, so there is never a mask."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, K, D)
        return self.attend(*self.split(x))

    def split(self, x: torch.Tensor) -> torch.Tensor:  # (B, K, D) -> q, k, v: (3, B, H, K, D/H)
        return linear(x, self.qkv).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # (B, H, K, D/H) -> (B, K, D)
        if q.device.type == "cpu":
            # Flash attention's backward on CPU is slow at DiT's lengths; the plain form is faster and compiles.
            out = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return linear(out.transpose(1, 2).flatten(2), self.proj)


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(gelu(linear(x, self.fc1)), self.fc2)


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:  # (B, N, D), (B, D) -> (B, N, p * p * C_out)
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, h, w) -> (B, N, D)
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # laid out as later, or block 0 is compiled apart


class TimestepEmbedder(nn.Module):
    """Sinusoids of t (cos then sin, periods up to 10000 * 2 pi) through an MLP."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: torch.Tensor) -> torch.Tensor:  # (B,) -> (B, D)
        angles = t.float()[:, None] * time_frequencies(t.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def time_frequencies(device: torch.device | str | None = None) -> torch.Tensor:
    """(TIME_WIDTH / 2,), falling from 1."""
    half = TIME_WIDTH // 2
    return torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=device))


class LabelEmbedder(nn.Module):
    """One row a class, and a last one for "no label"."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: torch.Tensor) -> torch.Tensor:  # (B,) -> (B, D)
        return self.embedding_table(y)


def linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """layer(x), its bias apart from the product where CPUs compile it."""
    if compiling_for_cpu(x):
        # As part of the product, a bias is first copied over the whole output. The loop that reads the output next
        # adds it for nothing.
        return F.linear(x, layer.weight) + layer.bias
    return layer(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form (arXiv 1606.08415)."""
    if compiling_for_cpu(x):
        return CpuGelu.apply(x, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)
    return F.gelu(x, approximate="tanh")


def compiling_for_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and torch.compiler.is_compiling()


class CpuGelu(torch.autograd.Function):
    """The same function for CPUs, where its exponential is what costs: taken once, for the value and for the slope.

    0.5 (1 + tanh u) = sigmoid(2 u), which compiles to a third of the time of tanh. What the backward pass keeps is the
    slope, in `slope_dtype`, in place of x.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, slope_dtype: torch.dtype) -> torch.Tensor:
        a, b = 2 * math.sqrt(2 / math.pi), 0.044715  # 2 u = a (x + b x^3)
        squared = x * x
        gate = torch.sigmoid(a * x * (1 + b * squared))
        slope = gate + gate * (1 - gate) * a * x * (1 + 3 * b * squared)
        ctx.save_for_backward(slope.to(slope_dtype))
        return x * gate

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slope,) = ctx.saved_tensors
        # torch.compile would rather keep x and take the exponential again; what a list operation reads, it keeps.
        return torch._foreach_mul([grad], [slope])[0], None


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


def unpatchify(patches: torch.Tensor, patch_size: int, channels: int) -> torch.Tensor:
    """(B, N, p * p * C), pixels of a patch row by row with channels last -> (B, C, h, w)."""
    B, N, _ = patches.shape
    side = math.isqrt(N)
    grid = patches.view(B, side, side, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(B, channels, side * patch_size, side * patch_size)


def sincos_positions(hidden_size: int, side: int) -> torch.Tensor:
    """Fixed 2-D positions (side * side, D): the first half of the width encodes the column, the second the row."""
    omega = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (column, row)]  # (N, D / 4) each
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1).float()
