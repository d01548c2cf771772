"""The parts of a diffusers `DiTPipeline` that draw what one of our DiTs draws."""

import torch

from dit import DiT
from system import UserError

# The last line of the loop: diffusers spaces the frequencies of DiT's time embedding by 1/127 of their range, official
# DiT, and so this network, by 1/128. It holds for the DiT weights that diffusers hosts, too.
PIPELINE_USE = """
    from diffusers import DiTPipeline
    pipeline = DiTPipeline.from_pretrained("this folder")
    for block in pipeline.transformer.transformer_blocks:  # time frequencies as trained; without it, images differ
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    pipeline(class_labels=[0, 1, 2], guidance_scale=1.5, num_inference_steps=50).images[0]
""".strip("\n")
NULL_LABEL = 1000  # DiTPipeline's, whatever the number of classes
# DiTTransformer2DModel's names, and ours
OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}  # fmt: skip
INSIDE = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0", "norm1.linear": "blocks.{}.adaLN_modulation.1",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2", "attn1.to_out.0": "blocks.{}.attn.proj",
    "ff.net.0.proj": "blocks.{}.mlp.fc1", "ff.net.2": "blocks.{}.mlp.fc2",
}  # fmt: skip


def transformer_of(model: DiT, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The DiTTransformer2DModel of a DiT for labels and square latents, with these weights of it."""
    from diffusers import DiTTransformer2DModel

    channels, side, _ = model.latent_shape
    width, depth = model.hidden_size, len(model.blocks)
    if len(tensors["blocks.0.mlp.fc1.weight"]) != 4 * width:
        raise UserError("format=diffusers needs a DiT of mlp_ratio 4")
    transformer = DiTTransformer2DModel(
        num_attention_heads=model.num_heads, attention_head_dim=width // model.num_heads, in_channels=channels,
        out_channels=model.out_channels, num_layers=depth, sample_size=side, patch_size=model.patch_size,
        num_embeds_ada_norm=NULL_LABEL, norm_eps=1e-6, norm_num_groups=1,
    )  # fmt: skip
    transformer.load_state_dict(diffusers_layout(tensors, depth, model.num_classes))
    return transformer.to(tensors["x_embedder.proj.weight"].dtype)


def diffusers_layout(tensors: dict[str, torch.Tensor], depth: int, num_classes: int) -> dict[str, torch.Tensor]:
    """DiT's tensors under DiTTransformer2DModel's names, where each block has time and label embeddings of its own."""
    labels = tensors["y_embedder.embedding_table.weight"]  # (classes + 1, D), the null label last
    table = labels.new_zeros(NULL_LABEL + 1, labels.shape[1])
    table[:num_classes], table[NULL_LABEL] = labels[:num_classes], labels[num_classes]
    layout, names = {}, dict(OUTSIDE)
    for i in range(depth):
        theirs = f"transformer_blocks.{i}"
        names |= {f"{theirs}.{name}": ours.format(i) for name, ours in INSIDE.items()}
        layout[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = table
        for part in ("weight", "bias"):
            qkv = tensors[f"blocks.{i}.attn.qkv.{part}"].chunk(3)
            layout |= {f"{theirs}.attn1.to_{name}.{part}": value for name, value in zip("qkv", qkv)}
    return layout | {f"{t}.{part}": tensors[f"{o}.{part}"] for t, o in names.items() for part in ("weight", "bias")}


def pixel_vae(channels: int) -> torch.nn.Module:
    """An AutoencoderKL whose decoder hands pixels (B, C, h, w) on, a grey one three times, to 1e-3 of [-1, 1].

    Its one GroupNorm cannot be left out. Two constant channels, +M and -M, outweigh the pixels in it, so it divides by
    nearly a constant, and tell the mean that it has subtracted; far from 0, SiLU is the identity.
    """
    from diffusers import AutoencoderKL

    M, shift, width, colors = 256.0, 16.0, channels + 2, 3 if channels == 1 else channels
    vae = AutoencoderKL(
        in_channels=colors, out_channels=colors, latent_channels=channels, block_out_channels=(width,),
        norm_num_groups=1, layers_per_block=1, scaling_factor=1.0, mid_block_add_attention=False, use_quant_conv=False,
        use_post_quant_conv=False,
    ).requires_grad_(False)  # fmt: skip
    for p in vae.parameters():
        p.zero_()
    decoder, std = vae.decoder, M * (2 / width) ** 0.5
    for c in range(channels):
        decoder.conv_in.weight[c, c, 1, 1] = 1
    decoder.conv_in.bias[-2:] = torch.tensor([M, -M])
    decoder.conv_norm_out.weight.fill_(std)
    decoder.conv_norm_out.bias[:] = torch.tensor([shift] * channels + [M + shift] * 2)
    for color in range(colors):
        decoder.conv_out.weight[color, color % channels, 1, 1] = 1
        decoder.conv_out.weight[color, -2:, 1, 1] = -0.5  # the mean, with the sign that it was subtracted with
        decoder.conv_out.bias[color] = M  # - shift + (M + shift)
    return vae
