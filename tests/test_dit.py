"""The backbone is the published one: keys, counts, arithmetic, initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F

from dit import SIZES, Block, DiT, build
from routing_module import Routing


def official_keys(depth):
    """The state-dict keys of the published DiT and SiT files."""
    keys = {"pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias", "y_embedder.embedding_table.weight"}
    keys |= {f"t_embedder.mlp.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    keys |= {f"final_layer.{m}.{p}" for m in ("linear", "adaLN_modulation.1") for p in ("weight", "bias")}
    for i in range(depth):
        for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            keys |= {f"blocks.{i}.{m}.{p}" for p in ("weight", "bias")}
    return keys


@pytest.mark.parametrize(
    "size, params, gmacs, routed",
    [("S/2", 33, 6.06, None), ("B/2", 130, 23.01, 0.7013), ("L/2", 458, 80.71, None), ("XL/2", 675, 118.64, 0.5828)],
)
def test_counts_are_the_published_ones(size, params, gmacs, routed):
    routes = [dict(selection_ratio=0.5, start_layer_idx=2, end_layer_idx=-4)]
    with torch.device("meta"):
        net = build(f"DiT-{size}", input_size=32, in_channels=4, num_classes=1000, learn_sigma=True, routes=routes)
    assert net.state_dict().keys() == official_keys(SIZES[size.split("/")[0]]["depth"])
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == params
    assert net.macs() / 1e9 == pytest.approx(gmacs, rel=1e-3)
    if routed:
        assert net.macs(Routing()) / net.macs() == pytest.approx(routed, abs=5e-4)


def test_formula_counts_what_the_network_multiplies():
    from torch.utils.flop_counter import FlopCounterMode

    net = DiT(8, 2, 3, 64, 5, 4, num_classes=7, learn_sigma=True, routes=[dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=3)])
    x, t, y = torch.randn(1, 3, 8, 8), torch.rand(1), torch.zeros(1, dtype=torch.int64)
    for routing in (None, Routing(), Routing(0.75)):
        with FlopCounterMode(display=False) as counter:
            net(x, t, y, routing=routing)
        assert counter.get_total_flops() == 2 * net.macs(routing)


def test_initialisation_is_dits():
    torch.manual_seed(0)
    net = build("DiT-S/2", input_size=16, in_channels=4, num_classes=10)
    for name, p in net.named_parameters():
        if name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
            assert not p.any(), name
    qkv = net.blocks[0].attn.qkv.weight
    assert qkv.abs().max() <= math.sqrt(6 / (384 + 3 * 384)) and qkv.std() > 0.9 * math.sqrt(2 / (4 * 384))
    assert net.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert net.y_embedder.embedding_table.weight.shape == (11, 384)
    x, t, y = torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 10])
    assert not net(x, t, y).any()  # adaLN-Zero: the network starts as zero


def test_positions_encode_column_first():
    net = DiT(8, 2, 1, 32, 1, 2)
    position = net.pos_embed[0].view(4, 4, 32)  # (row, column, D)
    assert torch.equal(position[0, :, :16], position[3, :, :16])  # the first half does not know the row
    assert torch.equal(position[:, 0, 16:], position[:, 3, 16:])  # the second half does not know the column
    omega = 10000 ** -(torch.arange(8) / 8)
    torch.testing.assert_close(position[0, 3, :8], torch.sin(3 * omega))
    torch.testing.assert_close(position[0, 3, 8:16], torch.cos(3 * omega))


def test_timestep_embedding_is_cos_then_sin():
    net = DiT(8, 2, 1, 32, 1, 2)
    seen = []
    net.t_embedder.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net.t_embedder(torch.tensor([3.0]))
    frequencies = 10000 ** -(torch.arange(128) / 128)
    torch.testing.assert_close(seen[0], torch.cat([torch.cos(3 * frequencies), torch.sin(3 * frequencies)])[None])


def test_block_is_the_published_arithmetic():
    torch.manual_seed(0)
    block, x, c = Block(32, 4, 4.0), torch.randn(2, 9, 32), torch.randn(2, 32)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.2)
    w = dict(block.named_parameters())
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        F.silu(c) @ w["adaLN_modulation.1.weight"].T + w["adaLN_modulation.1.bias"]
    )[:, None].chunk(6, -1)

    def norm(v):
        return (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    h = norm(x) * (1 + scale1) + shift1
    q, k, v = (h @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).chunk(3, -1)
    heads = []
    for i in range(4):
        s = slice(8 * i, 8 * i + 8)
        heads.append(torch.softmax(q[..., s] @ k[..., s].mT / math.sqrt(8), -1) @ v[..., s])
    a = x + gate1 * (torch.cat(heads, -1) @ w["attn.proj.weight"].T + w["attn.proj.bias"])
    h = norm(a) * (1 + scale2) + shift2
    h = h @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    expected = a + gate2 * (h @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])
    torch.testing.assert_close(block(x, c), expected, rtol=1e-5, atol=1e-5)


def test_patches_return_to_their_places():
    net = DiT(8, 2, 3, 32, 1, 2, learn_sigma=False)
    x = torch.randn(2, 3, 8, 8)
    # A patch's 12 numbers in the order of the final layer: row, column, channel.
    with torch.no_grad():
        patches = x.view(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 12)
    from dit import unpatchify

    assert torch.equal(unpatchify(patches, 2, 3), x)
    assert net(x, torch.rand(2), torch.tensor([0, 1])).shape == x.shape


@pytest.mark.parametrize("bad", ["DiT-M/2", "DiT-XL", "XL2", "DiT-S/x"])
def test_unknown_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="needed"):
        build(bad, input_size=32, in_channels=4, num_classes=10)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="patch_size"):
        build("DiT-S/8", input_size=28, in_channels=1, num_classes=10)
    with pytest.raises(ValueError, match="num_heads"):
        DiT(8, 2, 1, 30, 1, 4)
