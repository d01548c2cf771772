"""The backbone is the published one: keys, counts, arithmetic, initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import cost
from conditions import Text
from ddpm import DDPM
from dit import SIZES, Block, DiT, unpatchify
from edm import EDM
from lightningdit import LightningBlock, LightningDiT, rotary_angles, rotate
from rf import RectifiedFlow
from routing_module import Routing, draw_keep_ids, gather_tokens
from system import cli
from tests.conftest import loss_of


def official_keys(depth):
    """The state-dict keys of the published DiT and SiT files."""
    keys = {"pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias", "y_embedder.embedding_table.weight"}
    keys |= {f"t_embedder.mlp.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    keys |= {f"final_layer.{m}.{p}" for m in ("linear", "adaLN_modulation.1") for p in ("weight", "bias")}
    for i in range(depth):
        for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            keys |= {f"blocks.{i}.{m}.{p}" for p in ("weight", "bias")}
    return keys


ROUTES = [dict(selection_ratio=0.5, start_layer_idx=2, end_layer_idx=-4)]
PUBLISHED = {  # millions of parameters and forward GMACs (DiT's paper, Tables 1 and 4); TREAD's routed share
    "S/2": (33, 6.06, None), "S/4": (33, 1.41, None), "S/8": (33, 0.36, None),
    "B/2": (130, 23.01, 0.7013), "B/4": (130, 5.56, None), "B/8": (131, 1.42, None),
    "L/2": (458, 80.71, None), "L/4": (458, 19.70, None), "L/8": (459, 5.01, None),
    "XL/2": (675, 118.64, 0.5828), "XL/4": (675, 29.05, None), "XL/8": (676, 7.39, None),
}  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
def test_counts_are_the_published_ones(size):
    millions, gmacs, routed = PUBLISHED[size]
    with torch.device("meta"):
        net = DiT(size=f"DiT-{size}", routes=ROUTES)
    assert net.state_dict().keys() == official_keys(SIZES[size.split("/")[0]]["depth"])
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    assert net.macs() / 1e9 == pytest.approx(gmacs, rel=1e-3, abs=5e-3)  # two decimals are published
    if routed:
        assert net.macs(Routing()) / net.macs() == pytest.approx(routed, abs=5e-4)


CONDITIONS = {
    "class": (dict(num_classes=7), torch.zeros(1, dtype=torch.int64)),
    "text": (
        dict(condition="text", text_width=5, text_length=3),
        Text(torch.randn(1, 3, 5), torch.ones(1, 3, dtype=torch.bool)),
    ),
    "none": (dict(condition="none"), None),
}


@pytest.mark.parametrize("network", [DiT, LightningDiT])
@pytest.mark.parametrize("size, condition", [((8, 8), "class"), ((4, 12), "text"), ((12, 4), "none")])
def test_formula_counts_what_the_network_multiplies(network, size, condition):
    routes, (settings, y) = [dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=3)], CONDITIONS[condition]
    net = network(size, 2, 3, 64, 5, 4, learn_sigma=True, routes=routes, **settings)
    x, t = torch.randn(1, 3, *size), torch.rand(1)
    assert net.latent_shape == (3, *size) and net.num_tokens == math.prod(size) // 4
    for routing in (None, Routing(), Routing(0.75)):
        with FlopCounterMode(display=False) as counter:
            net(x, t, y, routing=routing)
        assert counter.get_total_flops() == 2 * net.macs(routing)


@pytest.mark.parametrize("size", ["S/2", "B/2", "L/2", "XL/2"])
def test_the_counter_agrees_with_the_formula_at_published_sizes(size):
    """On fake tensors: shapes only. On CPU attention is matrix products, and so is counted."""
    with FakeTensorMode():
        net = DiT(size=f"DiT-{size}", routes=ROUTES)
        x, t, y = torch.empty(1, 4, 32, 32), torch.empty(1), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            net(x, t, y)
    assert counter.get_total_flops() == pytest.approx(2 * net.macs(), rel=1e-3)


def test_initialisation_is_dits():
    torch.manual_seed(0)
    net = DiT(16, size="DiT-S/2", num_classes=10, learn_sigma=False)
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
    wide = DiT((4, 8), 2, 1, 32, 1, 2).pos_embed[0]  # two rows of four columns: those of the square
    assert torch.equal(wide, net.pos_embed[0][:8])
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
    torch.testing.assert_close(block(x, c, None), expected, rtol=1e-5, atol=1e-5)


def test_patches_return_to_their_places():
    net = DiT(8, 2, 3, 32, 1, 2, learn_sigma=False)
    x = torch.randn(2, 3, 8, 8)
    # A patch's 12 numbers in the order of the final layer: row, column, channel.
    with torch.no_grad():
        patches = x.view(2, 3, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 12)
    assert torch.equal(unpatchify(patches, 2, (4, 4)), x)
    assert net(x, torch.rand(2), torch.tensor([0, 1])).shape == x.shape
    x = torch.randn(2, 3, 4, 6)
    patches = x.view(2, 3, 2, 2, 3, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 6, 12)
    assert torch.equal(unpatchify(patches, 2, (2, 3)), x)


@pytest.mark.parametrize("bad", ["DiT-M/2", "DiT-XL", "XL2", "DiT-S/x"])
def test_unknown_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="needed"):
        DiT(size=bad)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="patch_size"):
        DiT(28, size="DiT-S/8")
    with pytest.raises(ValueError, match="num_heads"):
        DiT(8, 2, 1, 30, 1, 4)


# --- LightningDiT ---


def randomized(net):
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval().requires_grad_(False)


def test_rotation_depends_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16)
    angles = rotary_angles(16, 5, 5).view(5, 5, 16)

    def score(at, other):
        a, b = angles[at], angles[other]
        return (rotate(q, a.cos(), a.sin()) * rotate(k, b.cos(), b.sin())).sum().item()

    assert score((0, 1), (2, 4)) == pytest.approx(score((1, 0), (3, 3)), abs=1e-5)
    assert abs(score((0, 1), (2, 4)) - score((0, 1), (4, 2))) > 1e-3  # rows and columns are told apart
    assert rotate(q, angles[3, 4].cos(), angles[3, 4].sin()).norm().item() == pytest.approx(q.norm().item(), rel=1e-5)
    a = angles[3, 4].double()
    assert torch.autograd.gradcheck(lambda q: rotate(q, a.cos(), a.sin()), q.double().requires_grad_())


def test_lightning_block_is_its_arithmetic():
    torch.manual_seed(0)
    block, x, c = randomized(LightningBlock(32, 4, 4.0, qk_norm=True)), torch.randn(2, 9, 32), torch.randn(2, 32)
    angles = rotary_angles(8, 3, 3)
    w = dict(block.named_parameters())
    shift1, scale1, gate1, shift2, scale2, gate2 = (
        F.silu(c) @ w["adaLN_modulation.1.weight"].T + w["adaLN_modulation.1.bias"]
    )[:, None].chunk(6, -1)

    def norm(v, weight):
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turn(v):  # as complex numbers, which share no code with `rotate`
        pairs = torch.view_as_complex(v.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones(9, 4), angles[:, ::2])).flatten(-2)

    h = norm(x, w["norm1.weight"]) * (1 + scale1) + shift1
    q, k, v = (h @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).chunk(3, -1)
    heads = []
    for i in range(4):
        s = slice(8 * i, 8 * i + 8)
        a, b = turn(norm(q[..., s], w["attn.q_norm.weight"])), turn(norm(k[..., s], w["attn.k_norm.weight"]))
        heads.append(torch.softmax(a @ b.mT / math.sqrt(8), -1) @ v[..., s])
    a = x + gate1 * (torch.cat(heads, -1) @ w["attn.proj.weight"].T + w["attn.proj.bias"])
    h = norm(a, w["norm2.weight"]) * (1 + scale2) + shift2
    one, two = (h @ w["mlp.w12.weight"].T + w["mlp.w12.bias"]).chunk(2, -1)
    expected = a + gate2 * ((F.silu(one) * two) @ w["mlp.w3.weight"].T + w["mlp.w3.bias"])
    got = block(x, c, None, angles.cos()[None], angles.sin()[None])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_routed_token_keeps_its_own_angle():
    """Block by block against a hand-made route with angles looked up by token; neighbours' angles would not do."""
    routes = [dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=2)]
    net = randomized(LightningDiT(8, 2, 1, 32, 4, 4, num_classes=3, routes=routes))
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 3])
    keep_ids = draw_keep_ids(2, 16, 0.5, generators=torch.Generator().manual_seed(5))
    c = net.t_embedder(t) + net.y_embedder(y)
    angles = rotary_angles(8, 4, 4)

    def run(tokens, kept_angles):
        every = angles.cos()[None], angles.sin()[None]
        tokens = net.blocks[0](tokens, c, None, *every)
        kept = gather_tokens(tokens, keep_ids)
        for block in net.blocks[1:3]:
            kept = block(kept, c, None, kept_angles.cos(), kept_angles.sin())
        full = torch.stack([rows.index_copy(0, ids, new) for rows, ids, new in zip(tokens, keep_ids, kept)])
        return unpatchify(net.final_layer(net.blocks[3](full, c, None, *every), c), 2, (4, 4))

    tokens = net.x_embedder(x) + net.pos_embed
    got = net(x, t, y, routing=Routing(generators=torch.Generator().manual_seed(5)))
    torch.testing.assert_close(got, run(tokens, torch.stack([angles[ids] for ids in keep_ids])), rtol=1e-4, atol=1e-5)
    assert (got - run(tokens, angles[:8].expand(2, -1, -1))).abs().max() > 1e-3


def test_lightning_learns_through_its_route():
    routes = [dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=2)]
    net = LightningDiT(8, 2, 1, 32, 4, 4, num_classes=3, routes=routes, qk_norm=True)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 3])
    with torch.autocast("cpu", torch.bfloat16):
        net(x, t, y, routing=Routing()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert [n for n, p in net.named_parameters() if not p.grad.any()] == []


def test_lightning_is_the_published_size():
    with torch.device("meta"):
        net = LightningDiT()
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(675, abs=1)


# --- what it costs ---


def test_the_table_says_what_a_run_costs(capsys):
    cost.main(["experiment=imagenet256", "model.learn_sigma=true", "hardware.mfu=0.5", "hardware.peak_tflops=1000"])
    out = capsys.readouterr().out
    hours = f"{6 * 69.133e9 * 256 * 400000 / (0.5 * 1000e12) / 3600:.3g} GPU-hours"
    for part in ("674.83 M", "118.621 GMACs dense", "69.133 routed", "0.5828", "1.716x", "13.497 GB", hours):
        assert part in out, part
    with pytest.raises(ValueError, match="mfu"):
        cost.main(["hardware.mfu=0"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.depth=4"], "does not fit a network of 4 blocks"),
        (["model.size=DiT-M/2"], "model size"),
        (["model=lightningdit", "model.num_heads=64"], "4 x num_heads"),
        (["model.input_size=30"], "not divisible by patch_size"),
    ],
)
def test_networks_that_cannot_be_are_refused_in_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as refusal:
        cost.main(overrides)
    assert "\n" not in cli.one_line(refusal.value)


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("objective", [DDPM, EDM, RectifiedFlow])
def test_lightning_on_a_gpu_asks_the_host_for_nothing(objective):
    """Fake tensors raise where a value is needed or a tensor lies on the wrong device."""
    routes = [dict(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=2)]
    with FakeTensorMode(), torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
        net = LightningDiT(8, 2, 4, 32, 4, 4, num_classes=3, routes=routes, qk_norm=True)
        x, y = torch.empty(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
        loss = loss_of(net, objective(), x, y)
    assert loss.shape == (2,) and loss.device.type == "cuda"
