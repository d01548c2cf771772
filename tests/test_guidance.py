"""The one guidance rule: what it combines, when it calls the weak branch, what it costs."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dit
from checkpoints.generate import count_calls, generate_latents
from checkpoints.load import Run
from edm import EDM
from guidance import Branch, Guidance, guide, pair
from randomness import seeded_generator
from rf import RectifiedFlow
from routing_module import Routing
from sample import Sampling
from system import cli
from system.settings import parse
from tests.made_runs import note_calls


def at(t):
    return torch.tensor(t, dtype=torch.float64)


def preset(name, *overrides):
    return parse(Sampling, cli.load_config("sample", [f"guidance={name}", *overrides])).alone


def test_scale_one_or_outside_the_interval_never_calls_the_weak_branch():
    called = []

    def weak(x, t):
        called.append(float(t))
        return torch.zeros_like(x)

    strong, x = lambda x, t: x, torch.ones(2, 4, 1, 1)
    assert torch.equal(guide(strong, weak, 1.0)(x, at(0.5)), x) and not called
    guided = guide(strong, weak, 2.0, (0.2, 0.6))
    for t in (0.1, 0.2, 0.5, 0.6, 0.7):
        assert torch.equal(guided(x, at(t)), 2 * x if 0.2 <= t <= 0.6 else x)
    assert called == [0.2, 0.5, 0.6]
    called.clear()
    falling = guide(strong, weak, lambda t: 1 + t)
    assert torch.equal(falling(x, at(0.5)), 1.5 * x) and torch.equal(falling(x, at(0.0)), x) and called == [0.5]


def test_channels_past_the_guided_ones_are_the_strong_branchs():
    strong, weak = lambda x, t: 2 * x, lambda x, t: x
    out = guide(strong, weak, 3.0, channels=3)(torch.ones(1, 4, 1, 1), at(0.5))
    assert out.flatten().tolist() == [4, 4, 4, 2]


def test_settings_change_along_a_half_cosine_from_noise_to_data():
    guidance = preset("sg_fid")
    assert guidance.at("gamma_weak", 1.0) == 0.6 and guidance.at("gamma_weak", 0.0) == 0
    assert guidance.at("gamma_weak", 0.75) == pytest.approx(0.6 * (1 + math.cos(math.pi / 4)) / 2)
    for t in (0.0, 0.3, 0.8, 1.0):
        assert guidance.at("gamma_strong", t) + guidance.at("gamma_weak", t) == pytest.approx(0.6)
        assert guidance.at("scale", t) == 1.5


def test_presets_are_the_methods():
    assert not preset("none").on and not preset("none").routed
    assert preset("cfg") == Guidance(1.5)
    assert preset("icg").weak_label == "random" and preset("auto").weak_ckpt == "earliest"
    sg_flops = preset("sg_flops", "interval=[0.1,0.5]", "cfg_channels=3")
    assert (sg_flops.gamma_strong, sg_flops.gamma_weak, sg_flops.weak_label) == (0.5, 0.9, "same")
    assert sg_flops.interval == (0.1, 0.5) and sg_flops.cfg_channels == 3 and sg_flops.routed
    assert preset("sparse", "weak_label=none").routed


@pytest.mark.parametrize(
    "settings",
    [
        dict(scale=2, weak_label="same"), dict(scale=2, weak_label="same", gamma_strong=0.7, gamma_weak=0.3),
        dict(scale=2, weak_label="none", gamma_strong=0.7, gamma_weak=0.3), dict(gamma_strong=1.0),
        dict(scale=2, weak_label="same", gamma_strong=0.5, gamma_weak=0.7, gamma_weak_end=0.0),
        dict(gamma_weak=-0.1), dict(gamma_weak_end=1.0),
        dict(scale=-1), dict(scale=math.nan), dict(scale=math.inf), dict(scale_end=-1), dict(interval=(0.6, 0.2)),
        dict(interval=(0.1, 0.2, 0.3)), dict(interval=(-1, 1)), dict(weak_label="null"), dict(cfg_channels=0),
    ],
)  # fmt: skip
def test_guidance_that_cannot_guide_is_refused(settings):
    with pytest.raises(ValueError):
        Guidance(**settings)


def test_branches_of_one_network_and_length_are_one_batch():
    batches = []

    def predict(x, t, y, routing):
        batches.append((len(x), routing.selection_ratio if routing else 0))
        return x * (1 + y.view(-1, 1, 1, 1)) + (sum(g.initial_seed() for g in routing.generators[:1]) if routing else 0)

    def branch(label, ratio, source=predict):
        return Branch(
            source, lambda: torch.full((3,), label), lambda t: ratio, [seeded_generator(label, i) for i in range(3)]
        )

    x, other = torch.ones(3, 1, 1, 1), lambda *inputs: predict(*inputs)  # noqa: E731
    for strong, weak, expected in (
        (branch(0, 0.0), branch(1, 0.0), [(6, 0)]),
        (branch(0, 0.5), branch(1, 0.5), [(6, 0.5)]),
        (branch(0, 0.3), branch(1, 0.7), [(3, 0.3), (3, 0.7)]),
        (branch(0, 0.0), branch(1, 0.0, other), [(3, 0), (3, 0)]),
    ):
        batches.clear()
        found = pair(strong, weak)(x, at(0.5))
        assert batches == expected and len(found) == 2 and found[0].shape == found[1].shape == x.shape
        if not strong.ratio(at(0.5)):
            assert torch.equal(found[0], x) and torch.equal(found[1], 2 * x)


@pytest.fixture(scope="module")
def small():
    """A routed DiT with random weights everywhere, as either objective."""
    torch.manual_seed(0)
    routes = [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}]
    net = dit.DiT(8, 2, 1, 32, 4, 2, num_classes=3, learn_sigma=False, routes=routes)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval().requires_grad_(False)


def run_of(net, objective):
    return Run(net, objective, None, None, torch.device("cpu"), pool=torch.arange(3))


def latents_of(net, objective, guidance, seeds=(0, 1, 2), labels=None, **sampler):
    run = run_of(net, objective)
    labels = torch.tensor([s % 3 for s in seeds]) if labels is None else torch.tensor(labels)
    return generate_latents(run, guidance, list(seeds), labels, {"num_steps": 4} | sampler), run


def test_equal_ratios_and_label_leave_nothing_to_the_scale(small):
    """With shared masks the branches are one, so that no scale moves the prediction."""
    y, x = torch.tensor([0, 1, 2]), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    objective = RectifiedFlow()

    def branch():
        masks = [seeded_generator("mask", i) for i in range(3)]
        return lambda x, t: objective.predict(lambda *inputs: small(*inputs, routing=Routing(0.5, masks)), x, t, y)

    plain = branch()(x, at(0.7))
    for scale in (0.0, 1.5, 4.0):
        assert torch.equal(guide(branch(), branch(), scale)(x, at(0.7)), plain)


@pytest.mark.parametrize("objective", [EDM(), RectifiedFlow()])
@pytest.mark.parametrize("name", ["none", "cfg", "icg", "sparse", "sg_flops"])
def test_methods_differ_and_all_of_them_read_the_label(small, objective, name):
    guidance = preset(name, *([] if name == "none" else ["scale=3"]))
    found, _ = latents_of(small, objective, guidance)
    relabelled, _ = latents_of(small, objective, guidance, labels=[1, 2, 0])
    assert found.isfinite().all() and (found - relabelled).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    if name != "none":
        assert (found - latents_of(small, objective, Guidance())[0]).abs().max() > 1e-3


def test_the_weak_branch_may_be_another_network(small):
    torch.manual_seed(1)
    weak = dit.DiT(8, 2, 1, 32, 2, 2, num_classes=3, learn_sigma=False)
    run, other = (run_of(net, RectifiedFlow()) for net in (small, weak))
    guidance, strong_macs, weak_macs = Guidance(1.5, weak_label="same", weak_ckpt="any"), *map(note_calls, (run, other))
    found = generate_latents(run, guidance, [0, 1], torch.tensor([0, 1]), {"num_steps": 4}, weak=other)
    assert (found - latents_of(small, RectifiedFlow(), Guidance(), seeds=(0, 1))[0]).abs().max() > 1e-3
    assert strong_macs == [small.macs()] * 8 and weak_macs == [weak.macs()] * 8  # four steps of two images


def test_calls_and_multiply_adds_are_counted_an_image(small):
    for guidance, calls, macs in (
        (Guidance(), 4, 4 * small.macs()),
        (Guidance(2.0), 8, 8 * small.macs()),
        (preset("sparse"), 8, 4 * (small.macs(Routing(0.2)) + small.macs(Routing(0.7)))),
        (preset("cfg", "interval=[0.4,0.8]"), 6, 6 * small.macs()),  # t = 1, 0.75, 0.5, 0.25
    ):
        run = run_of(small, RectifiedFlow())
        run.settings = SimpleNamespace(sampler={"num_steps": 4})
        assert count_calls(run, guidance) == (calls, macs)


@pytest.mark.parametrize(
    "size, gammas, ratio", [("XL/2", (0.3, 0.7), 0.585), ("XL/2", (0.5, 0.9), 0.421), ("B/2", (0.3, 0.7), 0.704)]
)
def test_cost_of_sparse_guidance_beside_classifier_free(size, gammas, ratio):
    """Counted by torch, operation by operation, in every call of the sampler; our formula says the same."""
    routes = [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -4}]
    shapes_only = FakeTensorMode(allow_non_fake_inputs=True)
    with shapes_only:
        net = dit.DiT(size=f"DiT-{size}", routes=routes)

    class Counted:
        latent_shape, null_condition, macs = (4, 32, 32), torch.tensor([1000]), net.macs

        def __call__(self, x, t, y, *, routing=None):
            with shapes_only:
                assert net(x, t, y, routing=routing).shape == (len(x), 8, 32, 32)
            return x

    def cost(guidance):
        with FlopCounterMode(display=False) as counter:
            latents_of(Counted(), RectifiedFlow(), guidance, seeds=(0,), labels=[7], num_steps=1)
        run = run_of(Counted(), RectifiedFlow())
        run.settings = SimpleNamespace(sampler={"num_steps": 1})
        return counter.get_total_flops(), count_calls(run, guidance)[1]

    sparse = Guidance(1.5, gamma_strong=gammas[0], gamma_weak=gammas[1], weak_label="same")
    (sparse_flops, sparse_macs), (cfg_flops, cfg_macs) = cost(sparse), cost(Guidance(1.5))
    assert sparse_flops / cfg_flops == pytest.approx(ratio, abs=1e-3)
    assert sparse_macs / cfg_macs == pytest.approx(ratio, abs=1e-3)
