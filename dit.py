"""DiT (arXiv 2212.09748): a transformer over latent patches, conditioned by adaLN-Zero, with TREAD's token routes.

State-dict keys are the official ones. Shapes: B batch, C channels, p patch size, N = h / p * w / p tokens, K tokens
kept inside a route, D width, H heads.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

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


def shape_of(
    size: str, patch_size: int | None, hidden_size: int | None, depth: int | None, num_heads: int | None
) -> tuple[int, int, int, int]:
    """(patch_size, hidden_size, depth, num_heads): the numbers given, and those of `size` where they are None.

    size: DiT-XL/2 and the like: XS, S, B, L or XL, at any patch size. Raises UserError for another name.
    """
    name, _, patch = size.removeprefix("DiT-").partition("/")
    if name not in SIZES or not patch.isdigit():
        raise UserError(f"model size {size!r}; needed: DiT-{{{','.join(SIZES)}}}/{{2,4,8}}, for example DiT-XL/2")
    named = (int(patch), *(SIZES[name][key] for key in ("hidden_size", "depth", "num_heads")))
    given = (patch_size, hidden_size, depth, num_heads)
    return tuple(by_name if number is None else number for by_name, number in zip(named, given))


class DiT(Network):
    """net(x, t, condition, *, routing=None, hidden=()), as in `contracts.Network`. A class label is 0..num_classes-1,
    or num_classes for "no label".

    input_size: of x, h = w or (h, w). size: names patch_size, hidden_size, depth and num_heads, where they are None.
    learn_sigma: True = 2 * in_channels outputs, as in official DiT and SiT.
    fp32_after_route: the block after an active route runs without autocast, as in TREAD's own code.
    condition: "class", "text" or "none". text_width: of a text's states. text_length: of its tokens, as `macs` counts.
    pooled_text: the mean of a text's states modulates the blocks too, which it does not in PRX.
    block: builds a block from (hidden_size, num_heads, mlp_ratio) and, for texts, `text`; None = `Block`.
    middle_head: a second head predicts after this block, counted from 0 (arXiv 2512.24176); None = there is none.
    positions_from: the input_size of the network that this one starts from, to whose sides the tokens' coordinates are
        scaled; None = its own.
    Raises UserError for sizes that do not divide, ValueError for routes that do not fit.
    """

    attends = True  # its blocks attend to a text's tokens; otherwise the text's mean modulates them

    def __init__(
        self,
        input_size: int | Sequence[int] = 32,
        patch_size: int | None = None,
        in_channels: int = 4,
        hidden_size: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        num_classes: int | None = 1000,
        learn_sigma: bool = True,
        routes: Sequence[Route | Mapping] = (),
        fp32_after_route: bool = False,
        size: str = "DiT-XL/2",
        condition: str = "class",
        text_width: int | None = None,
        text_length: int | None = None,
        pooled_text: bool = False,
        block: Callable[..., nn.Module] | None = None,
        middle_head: int | None = None,
        positions_from: int | Sequence[int] | None = None,
    ):
        super().__init__()
        patch_size, hidden_size, depth, num_heads = shape_of(size, patch_size, hidden_size, depth, num_heads)
        h, w = (input_size, input_size) if isinstance(input_size, int) else input_size
        old_h, old_w = (positions_from,) * 2 if isinstance(positions_from, int) else positions_from or (h, w)
        if min(h, w, old_h, old_w, patch_size, in_channels, hidden_size, depth, num_heads) < 1:
            raise UserError("each of DiT's sizes, from input_size to num_heads, must be at least 1")
        if h % patch_size or w % patch_size:
            raise UserError(f"input_size {input_size} is not divisible by patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(f"hidden_size {hidden_size} must be divisible by num_heads ({num_heads}) and by 4")
        self.latent_shape, self.grid, self.patch_size = (
            (in_channels, h, w),
            (h // patch_size, w // patch_size),
            patch_size,
        )
        self.spacing = old_h / h, old_w / w  # of the tokens' coordinates, of rows and of columns
        self.num_tokens, self.name = math.prod(self.grid), size.removeprefix("DiT-").replace("/", "")
        self.hidden_size, self.num_heads, self.num_classes = hidden_size, num_heads, num_classes
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.routes = resolve_routes(routes, depth, self.grid)

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = condition_embedder(condition, num_classes, text_width, hidden_size)
        self.text_length, self.reads_text = text_length or 1, condition == "text" and self.attends
        if pooled_text and not self.reads_text:
            raise UserError("pooled_text=true is for networks that attend to texts; needed: pooled_text=false")
        self.modulated = condition != "none" and (pooled_text or not self.reads_text)  # by the condition
        self.null_condition = null_of(condition, num_classes, self.text_length, text_width)
        text = {"text": (hidden_size, self.text_length)} if self.reads_text else {}
        self.register_buffer("pos_embed", sincos_positions(hidden_size, *self.grid, self.spacing)[None])  # (1, N, D)
        self.blocks = nn.ModuleList([(block or Block)(hidden_size, num_heads, mlp_ratio, **text) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()
        if middle_head is not None:
            self.add_middle_head(middle_head)
        for after in {route.end_layer_idx + 1 for route in self.routes} - {depth} if fp32_after_route else ():
            self.blocks[after].keeps_fp32 = True

    def initialize_weights(self) -> None:
        """Xavier linear layers, zero biases, N(0, 0.02) embeddings; adaLN modulation and output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
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

    def add_middle_head(self, block: int) -> None:
        """After `block`, of the last one's kind. The other weights are drawn as without it."""
        if not 0 <= block < len(self.blocks):
            last = len(self.blocks) - 1
            raise UserError(f"middle_head={block}; needed: the number of a block, from 0 to {last}, or null for none")
        self.middle_head = block
        with torch.random.fork_rng(devices=[]):
            self.middle_layer = FinalLayer(self.hidden_size, self.patch_size, self.out_channels)
        for p in self.middle_layer.parameters():
            nn.init.zeros_(p)

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


def condition_embedder(
    condition: str, num_classes: int | None, text_width: int | None, hidden_size: int
) -> nn.Module | None:
    """What turns a condition into (B, D); None = there is none. Raises UserError for sizes that are missing."""
    if condition not in ("class", "text", "none"):
        raise UserError(f"condition={condition}; needed: class, text or none")
    if condition == "class" and not (num_classes or 0) > 0:
        raise UserError(f"num_classes={num_classes}; needed: at least 1, or another condition than class")
    if condition == "text" and not (text_width or 0) > 0:
        raise UserError(f"text_width={text_width}; needed: the width of the texts' states (data.text_width)")
    if condition == "class":
        return LabelEmbedder(num_classes, hidden_size)
    return TextEmbedder(text_width, hidden_size) if condition == "text" else None


def null_of(condition: str, num_classes: int | None, text_length: int, text_width: int | None) -> Condition:
    """The number of classes, or a text without tokens, which is as long as others; on the CPU, as `conditions` says."""
    if condition != "text":
        return torch.tensor([num_classes], device="cpu") if condition == "class" else None
    states = torch.zeros(1, text_length, text_width, device="cpu")
    return Text(states, torch.zeros(1, text_length, dtype=torch.bool, device="cpu"))


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
