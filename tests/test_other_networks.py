"""RoutedBlocks in networks that are not ours: a transformer of diffusers, a recurrence, blocks with arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from routing_blocks import RoutedBlocks, routing
from routing_module import Route, draw_keep_ids


class GatedRecurrence(nn.Module):
    """h_n = decay_n h_(n-1) + (1 - decay_n) value_n along the tokens: a state-space block in which order matters."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.inputs, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):  # (B, N, D)
        decay, value, gate = self.inputs(self.norm(x)).chunk(3, dim=-1)
        decay, h, states = decay.sigmoid(), torch.zeros_like(x[:, 0]), []
        for n in range(x.shape[1]):
            h = decay[:, n] * h + (1 - decay[:, n]) * value[:, n]
            states.append(h)
        return x + self.out(torch.stack(states, dim=1) * F.silu(gate))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([GatedRecurrence(16) for _ in range(5)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def transformer():
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=5, sample_size=8, patch_size=2,
        norm_num_groups=1, num_embeds_ada_norm=10,
    )  # fmt: skip
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net


def routed(net, name):
    setattr(net, name, RoutedBlocks(getattr(net, name), Route(0.5, 1, 3)))
    return net


CASES = {
    "diffusers": (transformer, "transformer_blocks", lambda: dict(
        hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([3, 700]), class_labels=torch.tensor([1, 9]),
        return_dict=False,
    )),
    "recurrence": (Recurrent, "blocks", lambda: dict(x=torch.randn(2, 16, 16))),
}  # fmt: skip


@pytest.fixture(params=CASES)
def case(request):
    """(network, the name of its blocks, arguments of a call)."""
    torch.manual_seed(0)
    make, name, arguments = CASES[request.param]
    return make(), name, arguments()


def first(output):
    return output[0] if isinstance(output, tuple) else output


def test_dense_outside_and_cheaper_inside(case):
    net, name, arguments = case
    net.eval()  # without diffusers' dropped labels
    with torch.no_grad():
        dense = first(net(**arguments))
        net, seen = routed(net, name), []
        for block in net.get_submodule(name):
            block.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
        assert torch.equal(first(net(**arguments)), dense) and seen == [16] * 5
        seen.clear()
        with routing():
            assert (first(net(**arguments)) - dense).abs().max() > 1e-4 and seen == [16, 8, 8, 8, 16]


def test_every_parameter_learns(case):
    net, name, arguments = case
    with routing():
        first(routed(net, name).train()(**arguments)).square().mean().backward()
    unused = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n in unused if not n.endswith("to_k.bias")]  # softmax does not see a shift of all keys


def run(blocks, x, *args, **kwargs):
    """As somebody's forward does it."""
    for block in blocks:
        x = block(x, *args, **kwargs)
    return x


def test_a_recurrence_runs_over_the_kept_tokens_in_their_order():
    torch.manual_seed(0)
    blocks, x = RoutedBlocks([GatedRecurrence(16) for _ in range(2)], Route(0.5, 0, 1)), torch.randn(3, 16, 16)
    keep_ids = draw_keep_ids(3, 16, 0.5, generators=torch.Generator().manual_seed(1))
    with routing(generators=torch.Generator().manual_seed(1)):
        out = run(blocks, x)
    for i, ids in enumerate(keep_ids):
        alone = blocks[1](blocks[0](x[i : i + 1, ids]))[0]
        torch.testing.assert_close(out[i, ids], alone)
        bypassed = [n for n in range(16) if n not in ids.tolist()]
        assert torch.equal(out[i, bypassed], x[i, bypassed])
        backwards = blocks[1](blocks[0](x[i : i + 1, ids.flip(0)]))[0].flip(0)
        assert (backwards - alone).abs().max() > 1e-2  # which is why the ids ascend


class Adding(nn.Module):
    """Adds what it is given for a token to the token, and half of the text's mean to both streams."""

    def forward(self, x, text, places=None, scale=1.0):
        return text + text.mean() / 2, x + scale * (places[0] + places[1][..., None])


def test_rows_of_tokens_are_gathered_and_the_rest_passes_through():
    x, text, places = torch.randn(2, 8, 3), torch.randn(2, 5, 3), (torch.randn(1, 8, 3), torch.randn(2, 8))
    blocks = RoutedBlocks([Adding() for _ in range(3)], Route(0.5, 0, -1), per_token=["places"], output=1)
    keep_ids = draw_keep_ids(2, 8, 0.75, generators=torch.Generator().manual_seed(0))
    expected_text, expected = text, x.clone()
    for _ in range(3):
        expected_text = expected_text + expected_text.mean() / 2
    for i, ids in enumerate(keep_ids):
        expected[i, ids] += 3 * 2.0 * (places[0][0, ids] + places[1][i, ids, None])
    tokens, stream = x, text
    with routing(0.75, torch.Generator().manual_seed(0)):
        for block in blocks:
            stream, tokens = block(tokens, stream, places=places, scale=2.0)
    torch.testing.assert_close(tokens, expected)
    assert torch.equal(stream, expected_text)


def test_text_at_the_front_always_stays():
    blocks = RoutedBlocks([nn.Identity(), nn.Identity()], Route(0.5, 0, 1), text=3)
    seen, x = [], torch.arange(11.0).view(1, 11, 1)
    blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for seed in range(20):
        with routing(generators=torch.Generator().manual_seed(seed)):
            assert torch.equal(run(blocks, x), x)
        image = 3 + draw_keep_ids(1, 8, 0.5, generators=torch.Generator().manual_seed(seed))
        assert seen[-1].flatten().tolist() == [0, 1, 2, *image[0].tolist()]


def test_each_pass_draws_anew_and_each_route_for_itself():
    blocks = RoutedBlocks([nn.Identity() for _ in range(4)], [Route(0.5, 0, 1), Route(0.5, 2, 3)])
    seen, x = [], torch.arange(64.0).view(1, 64, 1)
    for block in list(blocks):
        block.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].flatten().tolist())))
    with routing(generators=torch.Generator().manual_seed(0)):
        run(blocks, x), run(blocks, x)
    assert [seen[i] == seen[i + 1] for i in range(7)] == [True, False, True, False, True, False, True]


def test_what_does_not_fit_is_said():
    linear = lambda: [nn.Linear(4, 4) for _ in range(3)]
    with pytest.raises(ValueError, match="route 1..3 does not fit a network of 3 blocks"):
        RoutedBlocks(linear(), Route(0.5, 1, 3))
    with pytest.raises(ValueError, match="per_token names angles, and Linear takes input"):
        RoutedBlocks(linear(), Route(0.5, 1, 2), per_token=["angles"])
    with pytest.raises(ValueError, match="Wrapped does not name its arguments"):
        RoutedBlocks([Wrapped()], Route(0.5, 0, 0))
    x, text = torch.randn(2, 8, 3), torch.randn(2, 5, 3)
    blocks = RoutedBlocks([Adding()], Route(0.5, 0, 0), per_token=["places"], output=1)
    needed = r"per-token argument places of shape \(1, 9, 3\); needed: \(2 or 1, 8, ...\), one row per token"
    with routing(), pytest.raises(ValueError, match=needed):
        next(iter(blocks))(x, text, (torch.randn(1, 9, 3), torch.randn(2, 8)))
    blocks = RoutedBlocks([Adding()], Route(0.5, 0, 0), per_token=["places"])
    with routing(), pytest.raises(ValueError, match="output=None, and Adding returns a tuple of 2"):
        next(iter(blocks))(x, text, (torch.randn(1, 8, 3), torch.randn(2, 8)))


class Wrapped(nn.Module):
    def forward(self, *args, **kwargs):
        return args[0]
