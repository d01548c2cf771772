"""DiT (arXiv 2212.09748): a transformer over latent patches, conditioned by adaLN-Zero, with TREAD's token routes.

State-dict keys are the official ones. Shapes: B batch, C channels, p patch size, N = h / p * w / p tokens, K tokens
kept inside a route, D width, H heads.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from conditions import Condition, Text
from contracts import MIDDLE, Network
from routing_blocks import block_tokens, resolve_routes
from routing_module import Route, Routing, run_blocks, scatter_tokens
from system import UserError
from system.kernels import attention, gelu, linear

# DiT's sizes (arXiv 2212.09748, Table 1), and XS for 28x28 digits on a laptop.
SIZES = {
    "XS": dict(depth=12, hidden_size=128, num_heads=4),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
}

TIME_WIDTH = 256  # of the sinusoidal time embedding


def numbers_of(size: str) -> dict[str, int]:
    """What DiT-XL/2 and the like name: XS, S, B, L or XL, at any patch size. Raises UserError for another name."""
    name, _, patch = size.removeprefix("DiT-").partition("/")
    if name not in SIZES or not patch.isdigit():
        raise UserError(f"model size {size!r}; needed: DiT-{{{','.join(SIZES)}}}/{{2,4,8}}, for example DiT-XL/2")
    return {"patch_size": int(patch), **SIZES[name]}


def sides_of(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


@dataclass(eq=False, repr=False)
class DiT(Network):
    """net(x, t, condition, *, routing=None, hidden=()), as in `contracts.Network`. A class label is 0..num_classes-1,
    or num_classes for "no label".

    The fields are the constructor's arguments. Raises UserError for sizes that do not divide, ValueError for routes
    that do not fit.
    """

    input_size: int | Sequence[int] = 32  # of x, h = w or (h, w)
    patch_size: int | None = None  # None = by size
    in_channels: int = 4
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float = 4.0
    num_classes: int | None = 1000
    learn_sigma: bool = True  # 2 * in_channels outputs, as in official DiT and SiT
    routes: Sequence[Route | Mapping] = ()
    fp32_after_route: bool = False  # the block after an active route runs without autocast, as in TREAD's own code
    size: str = "DiT-XL/2"
    condition: str = "class"  # or text, none
    text_width: int | None = None  # of a text's states
    text_length: int | None = None  # of a text, as `macs` counts
    pooled_text: bool = False  # the mean of a text's states modulates the blocks too, which it does not in PRX
    middle_head: int | None = None  # a second head predicts after this block (arXiv 2512.24176)
    # The input_size to whose sides the tokens' coordinates are scaled, that of a network which this one starts from.
    positions_from: int | Sequence[int] | None = None

    attends = True  # its blocks attend to a text's tokens; otherwise the text's mean modulates them

    def __post_init__(self):
        super().__init__()
        for name, number in numbers_of(self.size).items():
            if getattr(self, name) is None:
                setattr(self, name, number)
        D, depth, patch_size = self.hidden_size, self.depth, self.patch_size
        h, w = sides_of(self.input_size)
        old_h, old_w = sides_of(self.input_size if self.positions_from is None else self.positions_from)
        if min(h, w, old_h, old_w, patch_size, self.in_channels, D, depth, self.num_heads) < 1:
            raise UserError("each of DiT's sizes, from input_size to num_heads, must be at least 1")
        if h % patch_size or w % patch_size:
            raise UserError(f"input_size {self.input_size} is not divisible by patch_size {patch_size}")
        if D % self.num_heads or D % 4:
            raise UserError(f"hidden_size {D} must be divisible by num_heads ({self.num_heads}) and by 4")
        if (middle := self.middle_head) is not None and not 0 <= middle < depth:
            raise UserError(f"middle_head={middle}; needed: the number of a block, from 0 to {depth - 1}, or null")
        self.latent_shape, self.grid = (self.in_channels, h, w), (h // patch_size, w // patch_size)
        self.spacing = old_h / h, old_w / w  # of the tokens' coordinates, of rows and of columns
        self.num_tokens, self.name = math.prod(self.grid), self.size.removeprefix("DiT-").replace("/", "")
        self.out_channels = self.in_channels * 2 if self.learn_sigma else self.in_channels
        self.routes = resolve_routes(self.routes, depth, self.grid)

        self.x_embedder = PatchEmbed(patch_size, self.in_channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.text_length, self.reads_text = self.text_length or 1, self.condition == "text" and self.attends
        self.y_embedder, self.null_condition = self.condition_parts()
        if self.pooled_text and not self.reads_text:
            raise UserError("pooled_text=true is for networks that attend to texts; needed: pooled_text=false")
        modulated = self.pooled_text or not self.reads_text
        self.modulated = self.condition != "none" and modulated  # by the condition
        self.register_buffer("pos_embed", sincos_positions(D, *self.grid, self.spacing)[None])  # (1, N, D)
        self.blocks = nn.ModuleList([self.new_block() for _ in range(depth)])
        self.final_layer = FinalLayer(D, patch_size, self.out_channels)
        self.initialize_weights()
        if self.middle_head is not None:
            # deepcopy by itself copies the memory of weights, and fake ones (cost.step_memory) have none.
            weights = {id(p): nn.Parameter(p.detach().clone()) for p in self.final_layer.parameters()}
            self.middle_layer = deepcopy(self.final_layer, weights)  # which begins at zero
        for after in {route.end_layer_idx + 1 for route in self.routes} - {depth} if self.fp32_after_route else ():
            self.blocks[after].keeps_fp32 = True

    def condition_parts(self) -> tuple[nn.Module | None, Condition]:
        """What turns a condition into (B, D), and the null condition, which is on the CPU. Raises UserError."""
        if self.condition == "class":
            if not (self.num_classes or 0) > 0:
                raise UserError(f"num_classes={self.num_classes}; needed: at least 1, or another condition than class")
            null = torch.tensor([self.num_classes], device="cpu")
            return LabelEmbedder(self.num_classes, self.hidden_size), null
        if self.condition == "text":
            if not (self.text_width or 0) > 0:
                found = f"text_width={self.text_width}; needed: the width of the texts' states (data.text_width)"
                raise UserError(found)
            states = torch.zeros(1, self.text_length, self.text_width, device="cpu")
            null = Text(states, torch.zeros(1, self.text_length, dtype=torch.bool, device="cpu"))  # without tokens
            return TextEmbedder(self.text_width, self.hidden_size), null
        if self.condition != "none":
            raise UserError(f"condition={self.condition}; needed: class, text or none")
        return None, None

    def new_block(self) -> nn.Module:
        return Block(self.hidden_size, self.num_heads, self.mlp_ratio, self.text_size)

    @property
    def text_size(self) -> tuple[int, int] | None:
        """(width, number) of the tokens of a text that blocks attend to."""
        return (self.hidden_size, self.text_length) if self.reads_text else None

    def initialize_weights(self) -> None:
        """Xavier linear layers, zero biases, N(0, 0.02) embeddings; adaLN modulation and output start at zero."""
        xavier(self)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        if isinstance(self.y_embedder, LabelEmbedder):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for zeroed in [*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1]]:
            nn.init.zeros_(zeroed.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, condition: Condition, *, routing: Routing | None = None,
        hidden: Collection[int | str] = (),
    ):  # fmt: skip
        tokens, c, text = self.embed(x, t, condition)  # (B, N, D), (B, D), (B, T, D)
        blocks, asked, per_token = enumerate(self.blocks), self.blocks_of(hidden), self.token_context(tokens, c)
        tokens, states = run_blocks(blocks, tokens, (c, text), per_token, self.routes, routing, asked)
        return self.output(tokens, c, states, hidden)

    def embed(
        self, x: torch.Tensor, t: torch.Tensor, condition: Condition
    ) -> tuple[torch.Tensor, torch.Tensor, Text | None]:
        """Tokens (B, N, D), what modulates them, c (B, D), and the text that they attend to, of states (B, T, D)."""
        # Time embedding and output stay float32 under autocast: precision is cheap there, and visible in samples.
        with torch.autocast(x.device.type, enabled=False):
            c = self.t_embedder(t)
            if self.modulated:
                c = c + self.y_embedder(condition)
            text = self.y_embedder.tokens(condition) if self.reads_text else None
        return self.x_embedder(x) + self.pos_embed, c, text

    def output(
        self, tokens: torch.Tensor, c: torch.Tensor, states: dict, hidden: Collection[int | str] = ()
    ) -> torch.Tensor | tuple[torch.Tensor, dict]:
        """Tokens (B, N, D), c (B, D) -> (B, C_out, h, w), and the states of hidden blocks where there are any."""
        with torch.autocast(tokens.device.type, enabled=False):
            patches = self.final_layer(tokens.float(), c)  # (B, N, p * p * C_out)
            if MIDDLE in hidden:
                states = states | {MIDDLE: self.middle_output(*states[self.middle_head], c)}
        out = unpatchify(patches, self.patch_size, self.grid)
        return (out, states) if states else out

    def blocks_of(self, hidden: Collection[int | str]) -> Collection[int | str]:
        """`hidden`, with the block that the middle head needs."""
        return [*hidden, self.middle_head] if MIDDLE in hidden else hidden

    def middle_output(
        self, tokens: torch.Tensor, keep_ids: torch.Tensor | None, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As MIDDLE in `contracts.Network`, from the tokens (B, K, D) after the block: 0 where the head saw none."""
        patches, seen = self.middle_layer(tokens.float(), c), None  # (B, K, p * p * C_out)
        if keep_ids is not None:
            nothing = patches.new_zeros(len(patches), self.num_tokens, patches.shape[2])
            seen = nothing[..., :1].scatter(1, keep_ids[..., None], 1).expand(-1, -1, self.patch_size**2)
            seen = unpatchify(seen, self.patch_size, self.grid)  # (B, 1, h, w)
            patches = scatter_tokens(patches, keep_ids, nothing)  # (B, N, p * p * C_out)
        return unpatchify(patches, self.patch_size, self.grid), seen

    def positions(self) -> tuple[torch.Tensor, ...]:
        """Positional inputs of the blocks, (1, N, ...) each. DiT has none."""
        return ()

    def token_context(self, tokens: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What blocks take per token, (B or 1, N, ...) each: the positions."""
        return self.positions()

    @property
    def all_blocks(self) -> tuple[nn.Module, ...]:
        return (*self.blocks, self.final_layer, *([] if self.middle_head is None else [self.middle_layer]))

    def macs(self, routing: Routing | None = None) -> int:
        """By formula: matrix products and attention (DiT's "Gflops"), the middle head's included."""
        embed = self.num_tokens * self.x_embedder.proj.weight.numel() + weights_of(self.t_embedder)
        if isinstance(self.y_embedder, TextEmbedder):
            embed += weights_of(self.y_embedder) * (self.modulated + self.reads_text * self.text_length)
        linear, modulation = self.final_layer.linear.weight.numel(), weights_of(self.final_layer.adaLN_modulation)
        output = self.num_tokens * linear + modulation
        if self.middle_head is not None:
            output += self.tokens_seen(routing)[self.middle_head] * linear + modulation
        return embed + sum(self.block_macs(routing)) + output

    def tokens_seen(self, routing: Routing | None) -> list[int]:
        """The number of tokens that each block sees."""
        return block_tokens(self.routes, routing, len(self.blocks), self.num_tokens)

    def block_macs(self, routing: Routing | None) -> list[int]:
        """Multiply-adds of each block."""
        return [block.macs(n) for block, n in zip(self.blocks, self.tokens_seen(routing))]


def xavier(*modules: nn.Module) -> None:
    """Draws the weights of all linear layers within; their biases are zero."""
    for layer in (part for module in modules for part in module.modules() if isinstance(part, nn.Linear)):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def weights_of(module: nn.Module) -> int:
    """The number of its matrices' entries: multiply-adds per token."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


class Block(nn.Module):
    """Attention and MLP; the condition scales and shifts their inputs and gates their outputs (adaLN-Zero)."""

    left_to_adamw = ("adaLN_modulation", "attn.text_kv")
    keeps_fp32 = False

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, text: tuple[int, int] | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, text)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(
        self, x: torch.Tensor, c: torch.Tensor, text: Text | None = None, *positions: torch.Tensor
    ) -> torch.Tensor:
        """x (B, K, D), c (B, D), text of states (B, T, D), positions (B or 1, K, ...) each: `DiT.positions`
        -> (B, K, D)."""
        told = {} if text is None else {"text": text}  # mixers other than attention take no text
        modulation = self.adaLN_modulation(c)[:, None]  # (B, 1, 6 D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), *positions, **told)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def macs(self, num_tokens: int) -> int:
        """Multiply-adds at batch 1: (4 + 2 * mlp_ratio) D^2 per token in DiT's projections and MLP, and attention."""
        per_token = weights_of(self.attn) + weights_of(self.mlp)
        return num_tokens * per_token + self.attn.products(num_tokens) + weights_of(self.adaLN_modulation)


class Attention(nn.Module):
    """Attention of the tokens given to each other and, as in PRX (github.com/Photoroom/PRX), to a text's tokens.

    text: (width, number) of the text's tokens; they give keys and values here, and are never changed. Routed sequences
    are gathered, so there is a mask for padded texts alone.
    """

    text_length = 0

    def __init__(self, hidden_size: int, num_heads: int, text: tuple[int, int] | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        if text is not None:
            self.text_kv, self.text_length = nn.Linear(text[0], 2 * hidden_size, bias=False), text[1]
            width = hidden_size // num_heads
            self.q_norm, self.k_norm, self.text_norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(3))

    def forward(self, x: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """x (B, K, D), text of states (B, T, its width) -> (B, K, D)."""
        q, k, v = self.split(x)
        if text is not None:
            q, k = self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype)
        return self.attend(q, k, v, text)

    def split(self, x: torch.Tensor) -> torch.Tensor:  # (B, K, D) -> q, k, v: (3, B, H, K, D/H)
        return linear(x, self.qkv).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, text: Text | None) -> torch.Tensor:
        """q, k, v (B, H, K, D/H), text as above -> (B, K, D)."""
        mask = None
        if text is not None:
            states = self.text_kv(text.states).unflatten(-1, (2, self.num_heads, -1))  # (B, T, 2, H, D/H)
            text_k, text_v = states.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
            text_k = self.text_norm(text_k.float()).to(v.dtype)
            k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)  # (B, H, T + K, D/H)
            mask = F.pad(text.mask, (0, q.shape[2]), value=True)  # (B, T + K)
        return linear(attention(q, k, v, mask).transpose(1, 2).flatten(2), self.proj)

    def products(self, num_tokens: int) -> int:
        """Multiply-adds besides the weights times these tokens: q k^T, and its product with the values. A text's matrix
        counts with the text's own tokens instead."""
        T = self.text_length
        in_place = (T - num_tokens) * self.text_kv.weight.numel() if T else 0
        return 2 * num_tokens * (num_tokens + T) * self.proj.in_features + in_place


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(gelu(linear(x, self.fc1)), self.fc2)


class FinalLayer(nn.Module):
    left_to_adamw = ("linear", "adaLN_modulation")
    keeps_fp32 = True

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
        # Contiguous, or the first block would be compiled separately.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """An MLP of sinusoids of t: cosines, then sines, with periods up to 10000 * 2 pi."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_WIDTH, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: torch.Tensor) -> torch.Tensor:  # (B,) -> (B, D)
        angles = t.float()[:, None] * time_frequencies(t.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def time_frequencies(device: torch.device | str | None = None) -> torch.Tensor:
    """Angular frequencies (TIME_WIDTH / 2,), falling from 1."""
    half = TIME_WIDTH // 2
    return torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=device))


class LabelEmbedder(nn.Module):
    """One row per class, and a last one for "no label"."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: torch.Tensor) -> torch.Tensor:  # (B,) -> (B, D)
        return self.embedding_table(y)


class TextEmbedder(nn.Module):
    """A text's token states, or their mean, projected; "no text" has no tokens, and a mean of zero."""

    def __init__(self, text_width: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Linear(text_width, hidden_size)

    def forward(self, text: Text) -> torch.Tensor:  # states (B, T, D_text), mask (B, T) -> (B, D)
        mask = text.mask.to(text.states.device).unsqueeze(-1)  # (B, T, 1)
        total = torch.where(mask, text.states.float(), 0).sum(dim=1)
        return self.proj(total / mask.sum(dim=1).clamp(min=1))

    def tokens(self, text: Text) -> Text:  # states (B, T, D_text) -> (B, T, D)
        return Text(self.proj(text.states.float()), text.mask.to(text.states.device))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


def unpatchify(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """(B, N, p * p * C), the pixels of a patch row by row, channels last -> (B, C, h, w)."""
    pixels = patches.unflatten(1, grid).unflatten(3, (patch_size, patch_size, -1))  # (B, rows, columns, p, p, C)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def sincos_positions(
    hidden_size: int, rows: int, columns: int, spacing: tuple[float, float] = (1.0, 1.0)
) -> torch.Tensor:
    """Fixed 2-D positional embedding (N, D): the first half of D encodes the column, the second the row.

    spacing: of the coordinates, of rows and of columns.
    """
    omega = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    places = [torch.arange(n, dtype=torch.float64) * step for n, step in zip((rows, columns), spacing)]
    row, column = torch.meshgrid(*places, indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (column, row)]  # (N, D / 4) each
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1).float()
