"""Token selection and reinsertion, and a DiT with routes through it."""

import re
import runpy

import pytest
import torch

from dit import DiT
from randomness import BatchSlice, seeded_generator
from routing_blocks import resolve_routes
from routing_module import Route, Routing, draw_keep_ids, gather_tokens, num_kept, scatter_tokens
from tests.conftest import ROOT


def tiny(routes=(), depth=6):
    torch.manual_seed(0)
    net = DiT(8, 2, 1, 32, depth, 2, num_classes=3, learn_sigma=False, routes=routes)
    for block in net.blocks:  # adaLN-Zero starts as the identity; make every block do something
        torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.3)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.3)
    return net


def batch(n=4):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, generator=g), torch.rand(n, generator=g), torch.randint(3, (n,), generator=g)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.7, 0.99])
def test_keep_ids_are_distinct_ascending_and_k(ratio):
    ids = draw_keep_ids(5, 64, ratio, generators=torch.Generator().manual_seed(0))
    assert ids.shape == (5, 64 - int(64 * ratio)) and ids.dtype == torch.int64
    assert (ids.diff(dim=1) > 0).all() and ids.min() >= 0 and ids.max() < 64


def test_every_token_is_kept_equally_often():
    ids = draw_keep_ids(4000, 16, 0.5, generators=torch.Generator().manual_seed(0))
    share = torch.bincount(ids.flatten(), minlength=16) / 4000
    assert (share - 0.5).abs().max() < 0.04  # 5 standard deviations


def test_kept_counts_of_the_paper():
    assert [num_kept(256, r) for r in (0.3, 0.5, 0.7)] == [180, 128, 77]


@pytest.mark.parametrize("shape", [(2, 10, 3), (2, 10), (2, 10, 3, 4)])
def test_gather_then_scatter_round_trips(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    ids = draw_keep_ids(2, 10, 0.6, generators=torch.Generator().manual_seed(0))
    kept = gather_tokens(x, ids)
    assert torch.equal(scatter_tokens(kept, ids, x), x)
    changed = scatter_tokens(kept + 1, ids, x)
    inside = torch.zeros(2, 10, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(changed[inside], x[inside] + 1) and torch.equal(changed[~inside], x[~inside])
    assert torch.equal(x, before)  # `full` is not changed


def test_a_row_depends_on_its_own_generator_only():
    alone = draw_keep_ids(1, 64, 0.5, generators=[seeded_generator(7)])
    among = draw_keep_ids(3, 64, 0.5, generators=[seeded_generator(s) for s in (5, 7, 9)])
    assert torch.equal(alone[0], among[1])


def test_rows_of_a_global_batch_do_not_depend_on_the_split():
    whole = draw_keep_ids(6, 64, 0.5, generators=BatchSlice(seeded_generator(0), 0, 6))
    parts = [draw_keep_ids(2, 64, 0.5, generators=BatchSlice(seeded_generator(0), start, 6)) for start in (0, 2, 4)]
    assert torch.equal(whole, torch.cat(parts))


def test_ratio_zero_equals_dense():
    net, (x, t, y) = tiny([Route(0.5, 1, -2)]), batch()
    assert torch.equal(net(x, t, y), net(x, t, y, routing=Routing(0.0)))
    assert not torch.equal(net(x, t, y), net(x, t, y, routing=Routing(generators=torch.Generator().manual_seed(0))))


def test_training_mode_decides_nothing():
    net, (x, t, y) = tiny([Route(0.5, 1, -2)]), batch()
    assert torch.equal(net.train()(x, t, y), net.eval()(x, t, y))


def test_blocks_inside_a_route_see_k_tokens_and_the_others_all():
    net, (x, t, y) = tiny([Route(0.5, 1, 2), Route(0.25, 3, 4)]), batch()
    seen = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    net(x, t, y, routing=Routing(generators=torch.Generator().manual_seed(0)))
    assert seen == [16, 8, 8, 12, 12, 16]  # two routes in a row, one starting where the other ends
    seen.clear()
    net(x, t, y, routing=Routing(0.75, torch.Generator().manual_seed(0)))
    assert seen == [16, 4, 4, 4, 4, 16]  # one number overrides every route's own


def test_routed_away_tokens_return_unchanged_to_their_places():
    net, (x, t, y) = tiny([Route(0.5, 1, 4)]), batch()
    at = {}
    net.blocks[0].register_forward_hook(lambda module, inputs, output: at.update(before=output))
    net.blocks[5].register_forward_hook(lambda module, inputs, output: at.update(after=inputs[0]))
    net(x, t, y, routing=Routing(generators=torch.Generator().manual_seed(3)))
    ids = draw_keep_ids(4, 16, 0.5, generators=torch.Generator().manual_seed(3))
    inside = torch.zeros(4, 16, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(at["before"][~inside], at["after"][~inside])
    assert (at["before"][inside] != at["after"][inside]).any(dim=-1).all()


def test_every_parameter_gets_a_gradient_with_routing_on():
    net, (x, t, y) = tiny([Route(0.5, 1, -2)]), batch()
    net(x, t, y, routing=Routing(generators=torch.Generator().manual_seed(0))).square().sum().backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_negative_indices_count_from_the_end():
    assert resolve_routes([Route(0.5, 2, -4)], 28) == (Route(0.5, 2, 24),)
    assert resolve_routes([dict(selection_ratio=0.5, start_layer_idx=2, end_layer_idx=-4)], 12) == (Route(0.5, 2, 8),)


@pytest.mark.parametrize(
    "routes, message",
    [
        ([Route(0.5, 2, 6)], "does not fit"),
        ([Route(0.5, 3, 2)], "does not fit"),
        ([Route(0.5, -9, 2)], "does not fit"),
        ([Route(0.5, 1, 3), Route(0.5, 3, 4)], "overlap"),
        ([Route(1.0, 1, 3)], "share of tokens"),
        ([Route(-0.1, 1, 3)], "share of tokens"),
    ],
)
def test_impossible_routes_are_refused(routes, message):
    with pytest.raises(ValueError, match=message):
        tiny(routes)


def test_the_method_as_the_readme_has_it(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "method.py").write_text(code)
    names = runpy.run_path(str(tmp_path / "method.py"))
    more = [lambda x, c: x + c] * 12
    x = torch.zeros(3, 10, 2)
    assert torch.equal(names["forward"](more, x, 1, ratio=0.0), x + 12)
    out = names["forward"](more, x, 1)
    assert sorted(out.unique().tolist()) == [5, 12]  # 7 of 12 blocks are skipped
    assert ((out == 12).sum(1) == 5).all()
