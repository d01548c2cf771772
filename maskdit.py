"""MaskDiT (arXiv 2306.09305): an encoder of half the patches, and a small decoder of all of them.

    kept = encoder(kept tokens)                 `blocks`, K tokens of width D
    tokens = decoder_layer(kept)                to the decoder's width; a mask token in the other places
    output = decoder(tokens)                    `decoder_blocks`, N tokens

Its loss is the objective's error on the patches that the encoder saw, and a reconstruction of the noisy input on the
others (MAE). State-dict keys are the official ones; "no label" is a zero embedding.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dit import Block, Condition, DiT, FinalLayer, LabelEmbedder, block_tokens, sincos_positions, weights_of, xavier
from routing_module import Route, Routing, Source, gather_tokens, num_kept, run_blocks, scatter_tokens

DECODER = dict(decoder_hidden_size=512, decoder_depth=8, decoder_num_heads=16)  # at every published size
SMALL_DECODER = dict(decoder_hidden_size=64, decoder_depth=4, decoder_num_heads=2)  # XS's, in proportion to XL's


@dataclass(eq=False, repr=False)
class MaskDiT(DiT):
    """DiT's call and arguments, with the mask in place of routes, and the decoder.

    Raises ValueError for sizes that do not divide, and for a ratio that the selection does not allow.
    """

    learn_sigma: bool = field(default=False, init=False)
    routes: Sequence[Route] = field(init=False)
    fp32_after_route: bool = field(init=False)
    middle_head: int | None = field(init=False)
    selection_ratio: float = 0.5  # of the encoder's tokens in training; 0 = unmasked fine-tuning: no mask token learns
    selection: str = "random"
    mae_weight: float = 0.1  # of the reconstruction in the loss
    decoder_hidden_size: int | None = None  # None = by size
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None

    def __post_init__(self):
        self.routes = [Route(self.selection_ratio, 0, -1, self.selection)]
        super().__post_init__()
        D, small = self.hidden_size, self.size.removeprefix("DiT-").startswith("XS/")
        for name, number in (SMALL_DECODER if small else DECODER).items():
            if getattr(self, name) is None:
                setattr(self, name, number)
        width, heads = self.decoder_hidden_size, self.decoder_num_heads
        if min(width, self.decoder_depth, heads) < 1 or width % heads or width % 4:
            raise ValueError(f"decoder_hidden_size {width} must be divisible by decoder_num_heads ({heads}) and by 4")
        if self.in_channels * self.patch_size**2 == 1 and self.mae_weight:
            found = "mae_weight normalises patches, and this model's have one number each"
            raise ValueError(f"{found}; needed: mae_weight=0")
        if isinstance(self.y_embedder, LabelEmbedder):
            self.y_embedder = OneHotEmbedder(self.num_classes, D)
        self.decoder_layer = FinalLayer(D, 1, width)
        blocks = [Block(width, heads, self.mlp_ratio, self.text_size) for _ in range(self.decoder_depth)]
        self.decoder_blocks = nn.ModuleList(conditioned(block, D) for block in blocks)
        self.final_layer = conditioned(FinalLayer(width, self.patch_size, self.in_channels), D)
        self.register_buffer("decoder_pos_embed", sincos_positions(width, *self.grid, self.spacing)[None])
        masked = num_kept(self.num_tokens, self.selection_ratio) < self.num_tokens
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width), requires_grad=masked)
        self.initialize_decoder()

    def initialize_decoder(self) -> None:
        """As the blocks; the layer into the decoder starts at zero too, as in the authors' code."""
        xavier(self.decoder_layer, self.decoder_blocks, self.final_layer)
        for part in (self.decoder_layer, *self.decoder_blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        for layer in (self.decoder_layer, self.final_layer):
            nn.init.zeros_(layer.linear.weight)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, condition: Condition, *, routing: Routing | None = None,
        hidden: Collection[int] = (),
    ):  # fmt: skip
        tokens, c, text = self.embed(x, t, condition)  # (B, N, D), (B, D), (B, T, D)
        depth, keep_ids = len(self.blocks), None
        if routing is not None and (keep_ids := routing.draw(self.routes[0], tokens)) is not None:
            tokens = gather_tokens(tokens, keep_ids)  # (B, K, D)
        tokens, encoded = run_blocks(enumerate(self.blocks), tokens, (c, text), hidden=hidden)
        encoded = {i: (state, keep_ids) for i, (state, _) in encoded.items()}
        tokens = self.decoder_layer(tokens, c)  # (B, K, decoder's width)
        if keep_ids is not None:
            everywhere = self.mask_token.expand(len(tokens), self.num_tokens, -1)
            tokens = scatter_tokens(tokens, keep_ids, everywhere)  # (B, N, decoder's width)
        elif self.mask_token.requires_grad:
            tokens = tokens + 0 * self.mask_token  # DDP waits for its gradient in a dense step (train.dense_last), too
        tokens = tokens + self.decoder_pos_embed
        tokens, decoded = run_blocks(enumerate(self.decoder_blocks, depth), tokens, (c, text), hidden=hidden)
        return self.output(tokens, c, encoded | decoded)

    def training_routing(self, batch_size: int, generators: Source, device: torch.device) -> Routing:
        """With the mask, which is drawn before the noise, as in the authors' code."""
        tokens = torch.empty(batch_size, self.num_tokens, 0, device=device)
        return Routing(generators=generators, keep_ids=Routing(generators=generators).draw(self.routes[0], tokens))

    def reduce(
        self, error: torch.Tensor, x_t: torch.Tensor, denoised: torch.Tensor, routing: Routing | None
    ) -> torch.Tensor:
        """The mean error over the patches that the encoder saw, + mae_weight * the others' reconstruction error.

        What is to be reconstructed is the noisy input, each of its patches normalised. (B, C, h, w) each -> (B,).
        """
        keep_ids = routing.drawn[0] if routing is not None else None
        if keep_ids is None:
            return super().reduce(error, x_t, denoised, routing)
        visible = gather_tokens(patches_of(error, self.patch_size).mean(dim=-1), keep_ids).mean(dim=1)  # (B,)
        target = patches_of(x_t, self.patch_size)  # (B, N, C * p * p)
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        missed = (patches_of(denoised, self.patch_size) - target).square().mean(dim=-1)  # (B, N)
        masked = torch.ones_like(missed).scatter(1, keep_ids, 0)
        return visible + self.mae_weight * (missed * masked).sum(dim=1) / masked.sum(dim=1)

    @property
    def all_blocks(self) -> tuple[nn.Module, ...]:
        return (*self.blocks, *self.decoder_blocks, self.final_layer)

    def macs(self, routing: Routing | None = None) -> int:
        encoded = block_tokens(self.routes, routing, len(self.blocks), self.num_tokens)[0]
        layer = encoded * self.decoder_layer.linear.weight.numel() + weights_of(self.decoder_layer.adaLN_modulation)
        return super().macs(routing) + layer + sum(block.macs(self.num_tokens) for block in self.decoder_blocks)


class OneHotEmbedder(nn.Module):
    """A column per class; "no label" is zero."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Linear(num_classes, hidden_size, bias=False)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: torch.Tensor) -> torch.Tensor:  # (B,) -> (B, D)
        return F.embedding(y, F.pad(self.embedding_table.weight.T, (0, 0, 0, 1)))


def conditioned(module: nn.Module, width: int) -> nn.Module:
    """`module` with a condition of another width than its tokens'."""
    module.adaLN_modulation[1] = nn.Linear(width, module.adaLN_modulation[1].out_features)
    return module


def patches_of(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, C, h, w) -> (B, N, C * p * p)."""
    return F.unfold(x, patch_size, stride=patch_size).transpose(1, 2)
