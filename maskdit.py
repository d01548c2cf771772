"""MaskDiT (arXiv 2306.09305): an encoder of half the patches, and a small decoder of all of them.

    kept = encoder(kept tokens)                 `blocks`, K tokens of width D
    tokens = decoder_layer(kept)                to the decoder's width; a mask token in the other places
    output = decoder(tokens)                    `decoder_blocks`, N tokens

Its loss is the objective's error on the patches that the encoder saw, and a reconstruction of the noisy input on the
others (MAE). State-dict keys are the official ones; "no label" is a zero embedding.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from dit import Block, DiT, FinalLayer, modulate, sincos_positions, weights_of
from randomness import Generators
from routing_module import Route, Routing, draw_only_route, gather_tokens, num_kept, pad_tokens
from system import UserError

DECODER = dict(decoder_hidden_size=512, decoder_depth=8, decoder_num_heads=16)  # at every published size
SMALL_DECODER = dict(decoder_hidden_size=64, decoder_depth=4, decoder_num_heads=2)  # XS's, in proportion to XL's


class MaskDiT(DiT):
    """DiT's call and arguments, with the mask in place of routes, and the decoder.

    selection_ratio, selection: of the encoder's tokens in training, as in a Route; 0 = unmasked fine-tuning, in which
    the mask token is not trained. mae_weight: the reconstruction's weight in the loss.
    decoder_hidden_size, decoder_depth, decoder_num_heads: None = by `size`.

    Raises UserError for sizes that do not divide, and for a ratio that the selection does not allow.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int | None = None,
        in_channels: int = 4,
        hidden_size: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        selection_ratio: float = 0.5,
        selection: str = "random",
        mae_weight: float = 0.1,
        decoder_hidden_size: int | None = None,
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
        size: str = "DiT-XL/2",
    ):
        super().__init__(
            input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio, num_classes, False,
            [Route(selection_ratio, 0, -1, selection)], size=size,
        )  # fmt: skip
        named = SMALL_DECODER if size.removeprefix("DiT-").startswith("XS/") else DECODER
        given = (decoder_hidden_size, decoder_depth, decoder_num_heads)
        width, depth, heads = (number if by is None else by for number, by in zip(named.values(), given))
        if min(width, depth, heads) < 1 or width % heads or width % 4:
            raise UserError(f"decoder_hidden_size {width} must be divisible by decoder_num_heads ({heads}) and by 4")
        if in_channels * self.patch_size**2 == 1 and mae_weight:
            raise UserError(
                "mae_weight normalises patches, and this model's have one number each; needed: mae_weight=0"
            )
        D = self.pos_embed.shape[-1]
        self.mae_weight = mae_weight
        self.y_embedder = OneHotEmbedder(num_classes, D)
        self.decoder_layer = DecoderLayer(D, width)
        self.decoder_blocks = nn.ModuleList([conditioned(Block(width, heads, mlp_ratio), D) for _ in range(depth)])
        self.final_layer = conditioned(FinalLayer(width, self.patch_size, in_channels), D)
        self.register_buffer("decoder_pos_embed", sincos_positions(width, input_size // self.patch_size)[None])
        masked = num_kept(self.num_tokens, selection_ratio) < self.num_tokens
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width), requires_grad=masked)
        self.initialize_decoder()

    def initialize_decoder(self) -> None:
        """As the blocks; the layer into the decoder starts at zero too, as in the authors' code."""
        for part in (self.decoder_layer, self.decoder_blocks, self.final_layer):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        for part in (self.decoder_layer, *self.decoder_blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        for layer in (self.decoder_layer, self.final_layer):
            nn.init.zeros_(layer.linear.weight)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, *, routing: Routing | None = None):
        tokens, c = self.embed(x, t, y)  # (B, N, D), (B, D)
        keep_ids = draw_only_route(self.routes, routing, *tokens.shape[:2], tokens.device)
        if keep_ids is not None:
            tokens = gather_tokens(tokens, keep_ids)  # (B, K, D)
        for block in self.blocks:
            tokens = self.run(block, tokens, c, ())
        tokens = self.decoder_layer(tokens, c)  # (B, K, decoder's width)
        if keep_ids is not None:
            tokens = pad_tokens(tokens, keep_ids, self.mask_token, self.num_tokens)  # (B, N, decoder's width)
        tokens = tokens + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = self.run(block, tokens, c, ())
        return self.output(tokens, c)

    def training_loss(self, objective, net: Callable, x: torch.Tensor, y: torch.Tensor, generators: Generators = None):
        """DiT's, where nothing is masked; otherwise `masked_loss`, with one mask for the network and the loss."""
        keep_ids = draw_only_route(self.routes, Routing(generators=generators), len(x), self.num_tokens, x.device)
        if keep_ids is None:
            return super().training_loss(objective, net, x, y, generators)
        net = partial(net, routing=Routing(keep_ids=keep_ids))
        return objective.loss(net, x, y, generators, partial(self.masked_loss, keep_ids))

    def masked_loss(
        self, keep_ids: torch.Tensor, error: torch.Tensor, x_t: torch.Tensor, denoised: torch.Tensor
    ) -> torch.Tensor:
        """The mean error over the patches that the encoder saw, + mae_weight * the others' reconstruction error.

        keep_ids (B, K); the objective's error, noisy input and estimate of the data, (B, C, h, w) each -> (B,). What is
        to be reconstructed is the noisy input, each of its patches normalised.
        """
        visible = gather_tokens(patches_of(error, self.patch_size).mean(dim=-1), keep_ids).mean(dim=1)  # (B,)
        target = patches_of(x_t, self.patch_size)  # (B, N, C * p * p)
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        missed = (patches_of(denoised, self.patch_size) - target).square().mean(dim=-1)  # (B, N)
        hidden = torch.ones_like(missed).scatter(1, keep_ids, 0)
        return visible + self.mae_weight * (missed * hidden).sum(dim=1) / hidden.sum(dim=1)

    @property
    def all_blocks(self) -> tuple[nn.Module, ...]:
        return (*self.blocks, *self.decoder_blocks)

    def macs(self, routing: Routing | None = None) -> int:
        encoded = self.block_tokens(routing)[0]
        layer = encoded * self.decoder_layer.linear.weight.numel() + weights_of(self.decoder_layer.adaLN_modulation)
        return super().macs(routing) + layer


class OneHotEmbedder(nn.Module):
    """A column per class; "no label" is zero."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Linear(num_classes, hidden_size, bias=False)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: torch.Tensor) -> torch.Tensor:  # (B,) -> (B, D)
        return F.embedding(y, F.pad(self.embedding_table.weight.T, (0, 0, 0, 1)))


class DecoderLayer(nn.Module):
    def __init__(self, hidden_size: int, decoder_hidden_size: int):
        super().__init__()
        self.norm_decoder = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, decoder_hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:  # (B, K, D), (B, D) -> (B, K, decoder's width)
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_decoder(x), shift, scale))


def conditioned(module: nn.Module, width: int) -> nn.Module:
    """`module` with a condition of another width than its tokens'."""
    module.adaLN_modulation[1] = nn.Linear(width, module.adaLN_modulation[1].out_features)
    return module


def patches_of(x: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, C, h, w) -> (B, N, C * p * p)."""
    return F.unfold(x, patch_size, stride=patch_size).transpose(1, 2)
