"""Other token mixers against their definitions, and routed by their nature: an order, a path, a grid."""

from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import conditions
import export
import mixers
import train as training
from checkpoints.generate import generate_latents
from checkpoints.load import build_network, load_run, round_linears
from contracts import muon_matrices
from guidance import Guidance
from mixers import Mixer, biwkv, q_shift, state_space, zigzag_ranks
from randomness import seeded_generator
from routing_blocks import RoutedBlocks, routing
from routing_module import Route, Routing, draw_keep_ids, draw_scores, gather_tokens, run_blocks, scatter_tokens
from system import UserError
from system.compiling import compile_blocks
from tests.conftest import assert_same_run
from tests.made_runs import made_settings
from training.stopping import EXIT_START_AGAIN, PreemptionHandler

MIXERS = ("pom", "linear", "ssd", "ssd_zigzag", "rwkv")
KEPT = {"random": 0.5, "structured": 0.5, "rows": 0.5, "columns": 0.5, "cells": 0.75}  # ratios on a grid of 4 x 6
GRID, D = (4, 6), 64


def made(mixer, routes=((0.5, "random"),), grid=GRID):
    """Of random weights; the route covers blocks 1 and 2 of 4."""
    torch.manual_seed(0)
    routes = [Route(ratio, 1, 2, selection) for ratio, selection in routes]
    size = tuple(2 * n for n in grid)
    net = Mixer(size, 2, 4, D, 4, num_classes=3, learn_sigma=False, routes=routes, mixer=mixer)
    for name, p in net.named_parameters():
        if not name.endswith(("dt_bias", "A_log", "decay")):
            nn.init.normal_(p, std=0.15)
    return net.eval().requires_grad_(False)


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 12, generator=g), torch.rand(3, generator=g), torch.tensor([0, 3, 2])


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Definitions


def double_sum(w, u, k, v):
    """The paper's form of BiWKV, each pair of tokens on its own."""
    place = torch.arange(k.shape[1])
    apart = (place[:, None] - place).abs()[..., None]  # (K, K, 1)
    scores = torch.where(apart == 0, u, (1 - apart) * w) + k[:, None]  # (B, K, K, D)
    return torch.einsum("btid,bid->btd", scores.softmax(dim=2), v)


@pytest.mark.parametrize("N", [1, 2, 7, 64, 333, 1024])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 3e-6), (torch.float64, 1e-12)])
def test_biwkv_in_linear_time_is_the_double_sum(N, dtype, error):
    decay = torch.tensor([-30, -8, -1, 0, 0.5, 3, 12, 30], dtype=dtype)
    given = [decay / N, normal(8) / N, normal(1, N, 8, seed=1), normal(1, N, 8, seed=2)]
    given = [part.to(dtype).requires_grad_() for part in given]
    exact = [part.detach().double().requires_grad_() for part in given]
    y, expected, weights = biwkv(*given), double_sum(*exact), normal(1, N, 8, seed=3, dtype=dtype)
    assert (y - expected).abs().max() < error
    grads = torch.autograd.grad((weights * y).sum(), given)
    for grad, right in zip(grads, torch.autograd.grad((weights * expected).sum(), exact)):
        assert (grad - right).abs().max() <= 3 * error * max(1.0, right.abs().max().item())


def test_biwkv_of_a_reversed_sequence_is_reversed():
    w, u, k, v = normal(8) / 50, normal(8, seed=1), normal(2, 50, 8, seed=2), normal(2, 50, 8, seed=3)
    torch.testing.assert_close(biwkv(w, u, k.flip(1), v.flip(1)), biwkv(w, u, k, v).flip(1), rtol=1e-5, atol=1e-6)


def test_decays_are_clamped_where_the_form_is_exact():
    net, at_limit = made("rwkv"), made("rwkv")
    x, ids = normal(2, 24, D), torch.arange(24)[None]
    net.blocks[0].attn.decay.fill_(1e4)
    at_limit.blocks[0].attn.decay.fill_(30)
    out = net.blocks[0].attn(x, ids)
    assert out.isfinite().all() and torch.equal(out, at_limit.blocks[0].attn(x, ids))


def recurrence(x, log_decay, b, c):
    state, out = torch.zeros(x.shape[0], *x.shape[2:], b.shape[-1], dtype=x.dtype), []
    for t in range(x.shape[1]):
        state = log_decay[:, t].exp()[..., None, None] * state + x[:, t, ..., None] * b[:, t, None, None]
        out.append((state * c[:, t, None, None]).sum(-1))
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("N", [1, 50, 64, 65, 131])
@pytest.mark.parametrize("backward", [False, True])
def test_state_space_in_chunks_is_the_recurrence(N, backward):
    kwargs = dict(dtype=torch.float64)
    given = [normal(2, N, 3, 4, **kwargs), -normal(2, N, 3, seed=1, **kwargs).abs()]
    given += [normal(2, N, 5, seed=seed, **kwargs) for seed in (2, 3)]
    given = [part.requires_grad_() for part in given]
    turned = lambda parts: [part.flip(1) if backward else part for part in parts]
    (y,) = turned([state_space(*turned(given))])
    (expected,) = turned([recurrence(*turned(given))])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    weights = normal(2, N, 3, 4, seed=4, **kwargs)
    grads, right = (torch.autograd.grad((weights * out).sum(), given) for out in (y, expected))
    torch.testing.assert_close(grads, right, rtol=1e-9, atol=1e-9)


def scanned(scan, x):
    """Scan's (1, K, E + 2 S + H), token by token, by the formulas."""
    E, S, y = scan.inner, mixers.SSD_STATE, []
    state = torch.zeros(scan.heads, E // scan.heads, S)
    for t in range(x.shape[1]):
        past = [x[0, t - 3 + i, : E + 2 * S] * scan.taps[i, 0] for i in range(4) if t - 3 + i >= 0]
        u, b, c = F.silu(scan.taps_bias + sum(past)).split([E, S, S])
        u, dt = u.view(scan.heads, -1), F.softplus(x[0, t, E + 2 * S :] + scan.dt_bias)
        state = (-dt * scan.A_log.exp()).exp()[:, None, None] * state + (dt[:, None] * u)[..., None] * b
        y.append((state @ c + scan.D[:, None] * u).flatten())
    return torch.stack(y)[None]


def test_the_mixer_of_state_spaces_is_its_two_scans():
    ssd, x = made("ssd").blocks[0].attn, normal(1, 9, D)
    E = ssd.inner
    z, u, forth, back = ssd.in_proj(x).split([E, E, *[2 * mixers.SSD_STATE + E // mixers.SSD_HEAD] * 2], dim=-1)
    y = scanned(ssd.scans[0], torch.cat([u, forth], -1)) + scanned(ssd.scans[1], torch.cat([u, back], -1).flip(1)).flip(
        1
    )
    expected = ssd.out_proj(F.rms_norm(y * F.silu(z), (E,), ssd.norm.weight, 1e-5))
    torch.testing.assert_close(ssd(x), expected, rtol=1e-4, atol=1e-5)


def test_pom_and_linear_attention_are_their_definitions():
    x = normal(2, 10, D)
    pom, linear = made("pom").blocks[0].attn, made("linear").blocks[0].attn
    h = F.leaky_relu(torch.einsum("bnd,ed->bne", x, pom.po.weight), 0.01).clamp(-0.1, 6)
    powers = torch.stack([h, h**2])  # (degree, B, N, 2 D)
    mean = torch.einsum("pbne,pe->be", powers, pom.coefficients[:, 0]) / 10
    gate = ((torch.einsum("bnd,ed->bne", x, pom.se.weight) + pom.se.bias + 3) / 6).clamp(0, 1)
    expected = torch.einsum("bne,be,de->bnd", gate, mean, pom.ag.weight)
    torch.testing.assert_close(pom(x), expected, rtol=1e-4, atol=1e-5)

    q, k, v = torch.einsum("bnd,ed->bne", x, linear.qkv.weight).view(2, 10, 3, D // 32, 32).unbind(2)
    weights = torch.einsum("bnhc,bmhc->bhnm", q.relu(), k.relu())
    out = torch.einsum("bhnm,bmhc->bnhc", weights, v) / (weights.sum(-1).mT[..., None] + 1e-8)
    torch.testing.assert_close(linear(x), linear.proj(out.flatten(2)), rtol=1e-4, atol=1e-5)


def test_shifted_channels_come_from_the_four_neighbours():
    x = normal(1, 24, 8)
    shifted, whole = q_shift(x, 6).view(4, 6, 8), F.pad(x.view(4, 6, 8), (0, 0, 1, 1, 1, 1))
    for part, (row, column) in enumerate([(0, -1), (0, 1), (-1, 0), (1, 0)]):
        rows, columns = slice(1 + row, 5 + row), slice(1 + column, 7 + column)
        channels = slice(2 * part, 2 * part + 2)
        assert torch.equal(shifted[..., channels], whole[rows, columns, channels])


@pytest.mark.parametrize("grid", [(4, 6), (7, 7)])
def test_paths_visit_every_token_by_single_steps(grid):
    ranks = zigzag_ranks(*grid)  # (N, 8)
    paths = ranks.argsort(dim=0)
    steps = paths // grid[1], paths % grid[1]
    assert (sum(part.diff(dim=0).abs() for part in steps) == 1).all()
    assert len({tuple(path.tolist()) for path in paths.T}) == 8
    assert sorted(set(paths[0].tolist())) == sorted({0, grid[1] - 1, (grid[0] - 1) * grid[1], grid[0] * grid[1] - 1})


# Selections


@pytest.mark.parametrize("selection", ["rows", "columns", "cells"])
def test_whole_rows_columns_and_one_token_of_each_cell_are_drawn_evenly(selection):
    ids = draw_keep_ids(3000, 24, KEPT[selection], generators=seeded_generator(0), selection=selection, grid=GRID)
    row, column = ids // 6, ids % 6
    if selection == "rows":
        assert (row.view(-1, 2, 6) == row.view(-1, 2, 6)[..., :1]).all() and (ids.diff(dim=1) > 0).all()
    elif selection == "columns":
        kept = column.view(-1, 4, 3)
        assert (kept == kept[:, :1]).all() and (ids.diff(dim=1) > 0).all()
    else:  # cell by cell
        assert torch.equal(row // 2 * 3 + column // 2, torch.arange(6).expand(3000, -1))
    share = torch.bincount(ids.flatten(), minlength=24) / 3000
    assert (share - 1 + KEPT[selection]).abs().max() < 0.05


@pytest.mark.parametrize(
    "grid, ratio, selection, near",
    [
        ((7, 7), 0.5, "rows", "0.4286 and 0.5715"), ((4, 6), 0.6, "columns", "0.5 and 0.6667"),
        ((4, 6), 0.6, "cells", "0.5 and 0.75"), ((7, 7), 0.5, "cells", "0"), ((4, 6), 0.95, "rows", "0.5 and 0.75"),
        ((128, 128), 0.0079, "rows", "0.00782 and 0.01563"),  # 129 tokens leave
    ],
)  # fmt: skip
def test_a_ratio_that_nothing_whole_gives_names_the_nearest_two_that_do(grid, ratio, selection, near):
    tokens = grid[0] * grid[1]
    draw = lambda ratio: draw_keep_ids(1, tokens, ratio, selection=selection, grid=grid)
    with pytest.raises(ValueError, match=f"the nearest ratios that do: {near}$"):
        draw(ratio)
    for nearby in near.split(" and "):
        assert draw(float(nearby)).shape == (1, tokens - int(tokens * float(nearby)))
    with pytest.raises(ValueError, match="selection=diagonal; needed: random, structured, rows, columns or cells"):
        draw_keep_ids(1, tokens, ratio, selection="diagonal")


def test_an_exact_share_of_a_large_grid_is_whole():
    ids = draw_keep_ids(1, 128 * 128, 1 / 128, selection="columns", grid=(128, 128))
    assert len(set((ids % 128).flatten().tolist())) == 127 and ids.shape[1] == 127 * 128


# Routed by nature


def smaller(net, mixer, grid):
    """The same weights on a smaller grid."""
    other = made(mixer, (), grid)
    other.load_state_dict({name: p for name, p in net.state_dict().items() if name != "pos_embed"}, strict=False)
    return other


def by_hand(net, mixer, selection, tokens, c, ids):
    """Blocks 1 and 2 on kept tokens (B, K, D), as a network that has never heard of other tokens."""
    if mixer == "ssd_zigzag":  # each along its path, by a mixer that does not sort
        for block in net.blocks[1:3]:
            order = net.per_token[0, ids][..., block.attn.path.item()].argsort(dim=1)
            along = gather_tokens(tokens, order)
            ranks = torch.arange(ids.shape[1])[None, :, None].expand(1, -1, 8)
            tokens = scatter_tokens(block(along, c, None, ranks), order, tokens)
        return tokens
    if mixer == "rwkv" and selection in ("random", "structured"):  # neighbours that are not there are zeros
        for block in net.blocks[1:3]:
            whole = scatter_tokens(tokens, ids, torch.zeros(len(ids), 24, D))
            tokens = zero_filled(block, whole, c, ids)
        return tokens
    grid = {"rows": (2, 6), "columns": (4, 3), "cells": (2, 3)}.get(selection, (1, ids.shape[1]))
    small = smaller(net, mixer, grid)
    for block in small.blocks[1:3]:
        tokens = block(tokens, c, None, *small.positions())
    return tokens


def zero_filled(block, whole, c, ids):
    """An RWKV block whose inputs are zero where there is no token: (B, K, D)."""
    there = scatter_tokens(torch.ones(*ids.shape, 1), ids, torch.zeros(len(ids), 24, 1))
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
    x = whole
    for part, norm, shift, scale, gate in (
        (block.attn, block.norm1, shift_1, scale_1, gate_1), (block.mlp, block.norm2, shift_2, scale_2, gate_2),
    ):  # fmt: skip
        inner = (norm(x) * (1 + scale) + shift) * there
        mixed = [gather_tokens(inner * m + q_shift(inner, 6) * (1 - m), ids) for m in part.mix]
        if part is block.attn:
            k, v, r = mixed
            K = ids.shape[1]
            y = double_sum(part.decay.clamp(-30, 30) / K, part.first / K, part.key(k), part.value(v))
            out = part.output(part.receptance(r).sigmoid() * y)
        else:
            k, r = mixed
            out = part.receptance(r).sigmoid() * part.value(part.key(k).relu() ** 2)
        x = x + gate * scatter_tokens(out, ids, torch.zeros_like(x))
    return gather_tokens(x, ids)


CASES = [(mixer, selection) for mixer in MIXERS for selection in KEPT if (mixer, selection) != ("ssd", "cells")]


@pytest.mark.parametrize("mixer, selection", CASES)
def test_routed_is_the_network_run_by_hand_on_the_kept_tokens(mixer, selection):
    net, (x, t, y) = made(mixer, [(KEPT[selection], selection)]), batch()
    ids = draw_keep_ids(3, 24, KEPT[selection], generators=seeded_generator(5), selection=selection, grid=GRID)
    tokens, c, _ = net.embed(x, t, y)
    tokens = net.blocks[0](tokens, c, None, *net.positions())
    kept = by_hand(net, mixer, selection, gather_tokens(tokens, ids), c, ids)
    expected = net.output(net.blocks[3](scatter_tokens(kept, ids, tokens), c, None, *net.positions()), c, {})
    torch.testing.assert_close(net(x, t, y, routing=Routing(None, seeded_generator(5))), expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(net(x, t, y), net(x, t, y, routing=Routing(0.0)))
    assert not torch.allclose(net(x, t, y), expected, atol=1e-3)


@pytest.mark.parametrize("mixer", MIXERS)
def test_scores_of_a_function_keep_tokens_as_random_ones_do(mixer):
    own = lambda x, generators: draw_scores(x.shape[:2], generators, x.device)
    net, drawn, (x, t, y) = made(mixer, [(0.5, own)]), made(mixer), batch()
    out, expected = (n(x, t, y, routing=Routing(None, seeded_generator(5))) for n in (net, drawn))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("mixer", ["pom", "linear"])
def test_swapped_tokens_give_the_swapped_output(mixer):
    net, x, c = made(mixer), normal(2, 24, D), normal(2, D, seed=1)
    swapped = torch.arange(24)
    swapped[[3, 17]] = torch.tensor([17, 3])
    blocks, route = list(enumerate(net.blocks)), net.routes
    ids = draw_keep_ids(2, 24, 0.5, generators=seeded_generator(2))
    out, _ = run_blocks(blocks, x, (c, None), routes=route, routing=Routing(keep_ids=ids))
    turned, _ = run_blocks(blocks, x[:, swapped], (c, None), routes=route, routing=Routing(keep_ids=swapped[ids]))
    torch.testing.assert_close(turned, out[:, swapped], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_checkpointed_compiled_and_counted(mixer, backend, monkeypatch):
    net, (x, t, y) = made(mixer).requires_grad_(True), batch()
    for way in (None, Routing(keep_ids=draw_keep_ids(1, 24, 0.5))):
        with FlopCounterMode(display=False) as counter:
            net(x[:1], t[:1], y[:1], routing=way)
        assert counter.get_total_flops() == pytest.approx(2 * net.macs(way and Routing(0.5)), rel=0.01)

    def gradients():
        net.zero_grad()
        net(x, t, y, routing=Routing(generators=seeded_generator(3))).square().mean().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters()}

    plain = gradients()
    assert [name for name, grad in plain.items() if not grad.isfinite().all() or not grad.any()] == []
    for block in net.blocks:
        block.recompute = True
    assert all(torch.equal(grad, plain[name]) for name, grad in gradients().items())
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()  # the graphs of other tests count towards the limit of one function
    compile_blocks(net.all_blocks, "blocks")  # a graph break is an error
    counters.clear()
    torch.testing.assert_close(gradients(), plain, rtol=1e-3, atol=1e-5)
    # Dense, routed, and the last layer; RWKV knows inside a route how its tokens were selected
    assert counters["stats"]["unique_graphs"] <= 5


@pytest.mark.parametrize("grid", [(8, 8), (5, 13), (10, 14)])
def test_a_scan_in_several_chunks_is_counted(grid):
    net = made("ssd", (), grid)
    with FlopCounterMode(display=False) as counter:
        net(normal(1, *net.latent_shape), torch.rand(1), torch.tensor([0]))
    assert counter.get_total_flops() == pytest.approx(2 * net.macs(), rel=0.01)


@pytest.mark.parametrize("mixer", MIXERS)
def test_bf16_stays_near_fp32(mixer):
    net, (x, t, y) = made(mixer), batch()
    exact = net(x, t, y, routing=Routing(generators=seeded_generator(3)))
    for rounded in (False, True):  # as in training, then as in sampling
        if rounded:
            round_linears(net)
        with torch.autocast("cpu", torch.bfloat16):
            near = net(x, t, y, routing=Routing(generators=seeded_generator(3)))
        assert (near - exact).square().mean() < 2e-3 * exact.square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("columns", [7, 14])
@pytest.mark.parametrize("mixer", MIXERS)
def test_compiled_in_bf16_gradients_are_as_near_as_eager_ones(mixer, columns):
    """49 and 98 tokens do not fill vectors: compiled attention had gradients of NaN there, on a CPU with AMX."""
    net, x, c = made(mixer, (), (7, columns)), normal(4, 7 * columns, D).requires_grad_(), normal(4, D, seed=1)
    block = net.blocks[0].requires_grad_(True)

    def gradients(bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = block(x, c, None, *net.positions())
        return torch.autograd.grad(out.square().mean(), [x, *block.parameters()])

    exact, eager = gradients(False), gradients(True)
    torch._dynamo.reset()
    block.compile(fullgraph=True, dynamic=False)
    far = lambda found: sum((a - b).norm() / b.norm() for a, b in zip(found, exact))
    assert far(gradients(True)) <= 1.5 * far(eager)


def test_muon_takes_linear_layers_alone():
    for mixer in MIXERS:
        net = made(mixer)
        layers = [m for block in net.blocks for part in (block.attn, block.mlp) for m in part.modules()]
        weights = {id(m.weight) for m in layers if isinstance(m, nn.Linear)}
        assert {id(p) for p in muon_matrices(net)} == weights, mixer


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model=ssd", "model.routes.0.selection=cells", "model.routes.0.selection_ratio=0"], "needed: .*ssd_zigzag"),
        (["model=rwkv", "model.routes.0.selection=rows"], "whole rows; the nearest ratios that do: 0.4286 and 0.5715"),
        (["model=pom", "model.mixer=mamba"], "mixer=mamba; needed: pom, linear, rwkv, ssd, ssd_zigzag"),
        (["model=linear", "model.hidden_size=40"], "hidden_size=40; needed: a multiple of 32"),
        (["model=ssd", "model.hidden_size=40"], "hidden_size=40; needed: a multiple of 32"),
    ],
)
def test_what_a_mixer_cannot_take_is_refused_in_one_line(overrides, message):
    overrides = [o.replace("model.routes.0.", "+model.route.") for o in overrides]
    route = {o.split(".")[-1].split("=")[0]: o.split("=")[1] for o in overrides if o.startswith("+")}
    route = {"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -4, **route}
    line = "{" + ",".join(f"{key}:{value}" for key, value in route.items()) + "}"
    kept = [o for o in overrides if not o.startswith("+")]
    with pytest.raises(UserError, match=message) as refusal:
        build_network(made_settings([*kept, f"model.routes=[{line}]"]))
    assert "\n" not in str(refusal.value)


# Traps: each with the naive gather


def test_a_path_is_followed_only_where_kept_tokens_are_sorted_by_their_ranks():
    mixer = made("ssd_zigzag").blocks[3].attn  # a row snake from the last corner: ids descend in every other row
    ids = draw_keep_ids(2, 24, 0.5, generators=seeded_generator(1))
    x, ranks = normal(2, 24, D), zigzag_ranks(*GRID)[None]
    path = ranks[0, :, 3].argsort()
    inside = torch.zeros(2, 24, dtype=torch.bool).scatter(1, ids, True)[:, path]  # which places of the path are kept
    along = torch.stack([x[b, path][inside[b]] for b in range(2)])  # the kept tokens as the path meets them
    in_turn = torch.arange(12)[None, :, None].expand(1, -1, 8)
    expected = torch.zeros(2, 24, D)
    for b in range(2):
        expected[b, path[inside[b]]] = mixer(along, in_turn)[b]
    kept = gather_tokens(x, ids)
    torch.testing.assert_close(
        mixer(kept, gather_tokens(ranks, ids)), gather_tokens(expected, ids), rtol=1e-4, atol=1e-5
    )
    naive = mixer(kept, in_turn)  # ascending, as drawn
    assert (naive - gather_tokens(expected, ids)).abs().max() > 1e-3


def test_shifts_need_cells_in_their_own_order():
    part = made("rwkv", [(0.75, "cells")]).blocks[1].attn
    x = normal(2, 24, D)
    ids = draw_keep_ids(2, 24, 0.75, generators=seeded_generator(1), selection="cells", grid=GRID)
    raster = draw_keep_ids(2, 24, 0.75, generators=seeded_generator(1), selection="structured", grid=GRID)
    assert torch.equal(ids.sort(dim=1).values, raster) and not torch.equal(ids, raster)
    right, naive = (scatter_tokens(part(gather_tokens(x, kept), kept), kept, x) for kept in (ids, raster))
    assert (right - naive).abs().max() > 1e-3
    small = smaller(made("rwkv"), "rwkv", (2, 3)).blocks[1].attn
    torch.testing.assert_close(right, scatter_tokens(small(gather_tokens(x, ids), torch.arange(6)[None]), ids, x))


def test_shifts_of_random_tokens_do_not_reach_across_the_gap():
    part, x, ids = made("rwkv").blocks[1].attn, normal(1, 24, D), torch.tensor([[0, 2, 9, 15]])
    kept = gather_tokens(x, ids)
    mixed = part.mixed(kept, ids)
    near = (mixed - kept * part.mix) / (1 - part.mix)  # (3, 1, 4, D)
    quarter = D // 4
    assert near[..., :3, : 2 * quarter].abs().max() < 1e-5  # 0, 2 and 9 have no neighbour in their rows
    torch.testing.assert_close(near[0, 0, 2, 3 * quarter :], x[0, 15, 3 * quarter :], rtol=1e-3, atol=1e-4)
    naive = q_shift(kept, 2)  # kept tokens, as if they were a grid
    assert (naive - near[0]).abs().max() > 0.1


class Skipping(nn.Module):
    """U-ViT's: the first half of the blocks leaves its tokens, the second half takes them."""

    def __init__(self, saved, takes):
        super().__init__()
        self.saved, self.takes = saved, takes

    def forward(self, x):
        if self.takes:
            return x + self.saved.pop()
        self.saved.append(x)
        return 2 * x


def test_skips_across_blocks_need_a_symmetric_route():
    def run(start, end):
        saved, x = [], normal(1, 6, 4)
        blocks = enumerate([Skipping(saved, takes) for takes in (False, False, True, True)])
        return x, run_blocks(blocks, x, routes=[Route(0.5, start, end)], routing=Routing(keep_ids=ids))[0]

    ids = torch.tensor([[1, 2, 4]])
    x, out = run(1, 2)
    expected = scatter_tokens(gather_tokens(7 * x, ids), ids, 3 * x)  # 2 x, then 4 x + 2 x inside, and x added
    torch.testing.assert_close(out, expected)
    with pytest.raises(RuntimeError, match="size"):
        run(1, 3)


def test_a_second_stream_is_routed_as_channels_of_the_first():
    class Streams(nn.Module):  # ZigMa's: r + x, and a mixer of it
        def forward(self, both):
            residual, x = both.chunk(2, dim=-1)
            residual = residual + x
            return torch.cat([residual, residual.cumsum(dim=1)], dim=-1)

    both, ids = normal(1, 6, 4), torch.tensor([[1, 2, 4]])
    out, _ = run_blocks(enumerate([Streams()] * 2), both, routes=[Route(0.5, 0, 1)], routing=Routing(keep_ids=ids))
    expected = scatter_tokens(Streams()(Streams()(gather_tokens(both, ids))), ids, both)
    assert torch.equal(out, expected)
    naive = torch.cat([both[..., :2], scatter_tokens(out[:, ids[0], 2:], ids, both[..., 2:])], dim=-1)
    assert not torch.equal(out, naive)  # one stream put back alone


def test_a_token_of_time_is_never_routed_away():
    class Block(nn.Module):
        def forward(self, x):
            return x + x[:, :1]  # everyone listens to the first

    x = normal(2, 9, 4)
    told, naive = (RoutedBlocks([Block()], Route(0.5, 0, 0), text=text) for text in (1, 0))
    heard = {}
    for name, blocks in (("told", told), ("naive", naive)):
        with routing(generators=seeded_generator(3)):
            for block in blocks:
                heard[name] = block(x) - x
    changed = {name: part.abs().sum(-1) > 0 for name, part in heard.items()}
    time = x[:, :1].expand_as(x)
    assert torch.allclose(heard["told"][changed["told"]], time[changed["told"]], atol=1e-6)
    assert changed["told"][:, 0].all()
    assert not torch.allclose(heard["naive"][changed["naive"]], time[changed["naive"]], atol=1e-6)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_routed_network_learns(mixer):
    torch.manual_seed(0)
    net = Mixer((8, 12), 2, 4, 64, 4, num_classes=3, learn_sigma=False, routes=[Route(0.5, 1, 2)], mixer=mixer)
    x, t, y = batch()
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=3e-3), []
    for step in range(60):
        loss = (net(x, t, y, routing=Routing(generators=seeded_generator(step))) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# A run

RUNS = {"pom": "cells", "linear": "random", "ssd": "rows", "rwkv": "rows"}


@pytest.mark.parametrize("mixer", RUNS)
def test_a_run_resumes_to_the_bit_and_is_sampled_at_other_ratios(mixer, tiny_overrides, tmp_path, monkeypatch):
    ratio = KEPT[RUNS[mixer]]
    route = f"[{{selection_ratio:{ratio},start_layer_idx:1,end_layer_idx:-2,selection:{RUNS[mixer]}}}]"
    tiny = [key for key in tiny_overrides if "num_heads" not in key]

    def run(name, *overrides):
        keys = [*tiny, f"model={mixer}", f"model.routes={route}", "optimizer=muon", "objective=rf", *overrides]
        code = training.train(
            made_settings([*keys, "train.max_steps=4", f"results_dir={tmp_path}", f"run_name={name}"])
        )
        return code, tmp_path / name

    _, golden = run("golden")
    with monkeypatch.context() as patch:
        patch.setattr(PreemptionHandler, "should_stop", lambda self, step: step == 2)
        assert run("cut")[0] == EXIT_START_AGAIN
    assert_same_run(golden, run("cut")[1])
    assert_same_run(golden, run("again", "train.gradient_checkpointing=true")[1])

    strong, weak = (0.0, 0.75) if RUNS[mixer] == "cells" else (0.25, 0.75)
    guidance, seeds = Guidance(1.5, weak_label="same", gamma_strong=strong, gamma_weak=weak), range(3)
    export.main([f"ckpt={golden}", f"out={tmp_path / 'exported'}"])
    latents = []
    for path in (golden, tmp_path / "exported"):
        loaded = load_run(path, device="cpu")
        labels = conditions.choose("random", seeds, loaded.pool)
        latents.append(generate_latents(loaded, guidance, seeds, labels, {"num_steps": 2}))
    assert torch.equal(*latents) and latents[0].isfinite().all()
