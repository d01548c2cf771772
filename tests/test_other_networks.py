"""Routing for networks that are not ours, as in docs/architecture.md: a transformer of diffusers, and a recurrence."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from routing_module import draw_keep_ids, gather_tokens, scatter_tokens


class Routed(nn.ModuleList):
    """A span of blocks that half of the tokens skip in training."""

    def forward(self, x, *args, **kwargs):
        keep_ids = draw_keep_ids(*x.shape[:2], 0.5 if self.training else 0.0, device=x.device)
        kept = gather_tokens(x, keep_ids)
        for block in self:
            kept = block(kept, *args, **kwargs)
        return scatter_tokens(kept, keep_ids, x)


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
    blocks = getattr(net, name)
    setattr(net, name, nn.ModuleList([*blocks[:1], Routed(blocks[1:4]), *blocks[4:]]))
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


def test_the_class_is_the_documented_one():
    page = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
    assert inspect.getsource(Routed) in page.read_text()


def test_dense_in_evaluation_and_cheaper_in_training(case):
    net, name, arguments = case
    with torch.no_grad():
        dense = first(net.eval()(**arguments))
        net, seen = routed(net, name), []
        for block in (net.get_submodule(name)[0], *net.get_submodule(name)[1], net.get_submodule(name)[2]):
            block.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
        assert torch.equal(first(net.eval()(**arguments)), dense) and seen == [16] * 5
        seen.clear()
        assert (first(net.train()(**arguments)) - dense).abs().max() > 1e-4 and seen == [16, 8, 8, 8, 16]


def test_every_parameter_learns(case):
    net, name, arguments = case
    first(routed(net, name).train()(**arguments)).square().mean().backward()
    unused = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n in unused if not n.endswith("to_k.bias")]  # softmax does not see a shift of all keys


def test_a_recurrence_runs_over_the_kept_tokens_in_their_order(monkeypatch):
    torch.manual_seed(0)
    span, x = Routed(GatedRecurrence(16) for _ in range(2)).train(), torch.randn(3, 16, 16)
    keep_ids = draw_keep_ids(3, 16, 0.5, generators=torch.Generator().manual_seed(1))
    monkeypatch.setitem(globals(), "draw_keep_ids", lambda *shape, device: keep_ids)
    out = span(x)
    for i, ids in enumerate(keep_ids):
        alone = span[1](span[0](x[i : i + 1, ids]))[0]
        torch.testing.assert_close(out[i, ids], alone)
        bypassed = [n for n in range(16) if n not in ids.tolist()]
        assert torch.equal(out[i, bypassed], x[i, bypassed])
        backwards = span[1](span[0](x[i : i + 1, ids.flip(0)]))[0].flip(0)
        assert (backwards - alone).abs().max() > 1e-2  # which is why the ids ascend
