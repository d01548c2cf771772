"""EDM, rectified flow and DDPM's learned variances against closed forms."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from checkpoints.load import build_network
from conditions import Text
from contracts import pixel_mean
from ddpm import DDPM
from edm import EDM
from randomness import BatchSlice, normal, seeded_generator, uniform
from rf import RectifiedFlow
from tests.made_runs import made_settings


def zero_net(x, t, y):
    return torch.zeros_like(x)


def loss_of(objective, net, x, y, generators):
    """The mean error of each row: (B,)."""
    return pixel_mean(objective.errors(net, x, y, generators)[0])


def test_edm_denoiser_is_the_identity_at_no_noise():
    x, y = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    net = lambda x, t, y: torch.randn_like(x)  # noqa: E731  whatever the network says
    torch.testing.assert_close(EDM().predict(net, x, torch.tensor(1e-6), y), x, rtol=0, atol=1e-5)


def test_edm_preconditioning_is_table_1():
    edm, sigma, seen = EDM(sigma_data=0.5), torch.tensor([0.1, 1.0, 10.0]), {}
    x, y = torch.randn(3, 2, 4, 4), torch.zeros(3, dtype=torch.int64)

    def net(x, t, y):
        seen.update(x=x, t=t)
        return torch.ones_like(x)

    out = edm.predict(net, x, sigma, y)
    s = sigma.view(3, 1, 1, 1)
    torch.testing.assert_close(seen["x"], x / (0.25 + s**2).sqrt())
    torch.testing.assert_close(seen["t"], sigma.log() / 4)
    torch.testing.assert_close(out, 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt())


def test_edm_loss_of_a_network_that_says_nothing():
    """With F = 0 the expected E|c_skip (x + n) - x|^2 * weight is 1 at every sigma, if x has std sigma_data."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, 2, 2, generator=g) * 0.5
    loss = loss_of(EDM(), zero_net, x, torch.zeros(len(x), dtype=torch.int64), g)
    assert loss.shape == (20000,) and loss.mean().item() == pytest.approx(1, abs=0.02)


def test_the_mean_of_weighted_errors_is_the_weighted_mean_to_the_bit():
    """So that the loss is the one of Eq. 8, rounded once a sample, although networks reduce errors pixel by pixel."""
    edm, x, y = EDM(), torch.randn(64, 3, 9, 7), torch.zeros(64, dtype=torch.int64)
    error, x_t, denoised = edm.errors(lambda x, t, y: x.sin(), x, y, seeded_generator(0))
    sigma = (edm.P_mean + edm.P_std * normal((64,), seeded_generator(0))).exp()
    weight = (sigma**2 + edm.sigma_data**2) / (sigma * edm.sigma_data) ** 2
    mean = (denoised - x).square().flatten(1).mean(dim=1)
    assert torch.equal(pixel_mean(error), weight * mean)
    assert torch.equal(error, weight.view(-1, 1, 1, 1) * (denoised - x).square())
    assert not torch.equal(error.flatten(1).mean(dim=1), weight * mean)  # which rounds elsewhere
    assert pixel_mean(error[:5]).tolist() == error[:5].flatten(1).mean(dim=1).tolist()  # a part has no factors


def test_flow_loss_is_zero_for_the_true_velocity_and_ends_are_data_and_noise():
    g = torch.Generator().manual_seed(0)
    x, y = torch.full((64, 1, 2, 2), 2.0), torch.zeros(64, dtype=torch.int64)
    for timesteps in ("uniform", "logit_normal"):
        seen = []

        def net(x_t, t, y):  # for a point mass at 2 the velocity is known: z = (x_t - (1 - t) 2) / t
            seen.append(t)
            t = t.view(-1, 1, 1, 1)
            return (x_t - (1 - t) * 2) / t - 2

        assert loss_of(RectifiedFlow(timesteps), net, x, y, g).max() < 1e-3
        assert 0 <= seen[0].min() and seen[0].max() <= 1
    with pytest.raises(ValueError, match="uniform"):
        RectifiedFlow("lognormal")


@pytest.mark.parametrize("objective", [EDM(), RectifiedFlow("uniform"), RectifiedFlow()])
def test_loss_of_a_row_does_not_depend_on_the_split(objective):
    x, y = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(6, dtype=torch.int64)
    whole = loss_of(objective, zero_net, x, y, BatchSlice(seeded_generator(1), 0, 6))
    parts = [
        loss_of(objective, zero_net, x[s : s + 2], y[s : s + 2], BatchSlice(seeded_generator(1), s, 6))
        for s in (0, 2, 4)
    ]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_learned_sigma_channels_are_not_used():
    def net(x, t, y):
        return torch.cat([torch.ones_like(x), torch.full_like(x, torch.nan)], dim=1)

    x, y = torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    assert EDM().predict(net, x, torch.tensor(1.0), y).isfinite().all()
    assert RectifiedFlow().predict(net, x, torch.tensor(0.5), y).shape == x.shape


NULL = 9


def contrastive_parts(size=6, **settings):
    """(losses of six rows, two of them without a label, in parts of `size`; and the rows, labels and network)."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 1, 4, 4, generator=g), torch.tensor([0, NULL, 1, 2, NULL, 3])
    net = lambda x, t, y: x * (1 + y.view(-1, 1, 1, 1)) / 10  # noqa: E731
    losses = []
    for start in range(0, 6, size):
        rows, part = BatchSlice(seeded_generator(1), start, 6), slice(start, start + size)
        losses.append(loss_of(RectifiedFlow(**settings), net, x[part], y[part], rows))
    return torch.cat(losses), x, y, net


def test_contrastive_flow_matching_is_its_formula():
    """Every row contrasts, those without a label too, as in the authors' code."""
    _, x, y, net = contrastive_parts()
    contrastive, *_ = contrastive_parts(contrastive=0.05)
    rows = BatchSlice(seeded_generator(1), 0, 6)
    t, noise = normal((6,), rows).sigmoid().view(-1, 1, 1, 1), normal(x.shape, rows)
    velocity, target = net((1 - t) * x + t * noise, t, y), noise - x
    expected = (velocity - target).square().mean() - 0.05 * (velocity - target[[1, 0, 3, 2, 5, 4]]).square().mean()
    assert contrastive.mean().item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("condition", [None, Text(torch.randn(4, 3, 5), torch.ones(4, 3, dtype=torch.bool))])
def test_the_contrast_does_not_look_at_conditions(condition):
    x, net = torch.randn(4, 1, 4, 4, generator=seeded_generator(0)), lambda x, t, y: x.sin()
    found = loss_of(RectifiedFlow(contrastive=0.05), net, x, condition, seeded_generator(1))
    of_labels = loss_of(RectifiedFlow(contrastive=0.05), net, x, torch.zeros(4), seeded_generator(1))
    assert torch.equal(found, of_labels)


def test_no_contrast_and_no_cosine_are_the_plain_loss_bit_for_bit():
    assert torch.equal(contrastive_parts()[0], contrastive_parts(contrastive=0.0, cosine=0.0)[0])


@pytest.mark.parametrize("size", [2, 3])
def test_pairs_do_not_depend_on_an_even_split(size):
    whole, parts = contrastive_parts(contrastive=0.05)[0], contrastive_parts(contrastive=0.05, size=size)[0]
    assert torch.allclose(whole, parts) == (size == 2)  # which is why training refuses an odd one


def test_the_cosine_term_is_one_minus_the_cosine_of_each_pixels_channels():
    x, y, net = torch.randn(3, 4, 2, 2), torch.zeros(3), lambda x, t, y: x.sin()
    plain, found = (
        loss_of(RectifiedFlow("uniform", cosine=c), net, x, y, seeded_generator(1)).double() for c in (0.0, 0.5)
    )
    rows = seeded_generator(1)
    t, noise = uniform((3,), rows).view(-1, 1, 1, 1), normal(x.shape, rows)
    v, target = net((1 - t) * x + t * noise, t, y), noise - x
    for i in range(3):
        pixels = zip(v[i].double().flatten(1).T, target[i].double().flatten(1).T)
        angle = sum(1 - (a @ b) / (a @ a).sqrt() / (b @ b).sqrt() for a, b in pixels) / 4
        assert (found[i] - plain[i]).item() == pytest.approx(0.5 * angle.item(), abs=1e-6)
    for cosine in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="objective.cosine"):
            RectifiedFlow(cosine=cosine)


def bound_by_torch(x, missed, learned, step):
    """L_vlb in bits, by torch.distributions, in the coefficients of DDPM's Eq. 6-7 and Improved DDPM's Eq. 15."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    small = beta * (1 - before) / (1 - kept)
    small[0] = small[1]
    beta, kept, before, small = (part[step].view(-1, 1, 1, 1) for part in (beta, kept, before, small))
    x, fraction, noise = x.double(), (learned.double() + 1) / 2, torch.randn(x.shape, dtype=torch.float64)
    x_k = kept.sqrt() * x + (1 - kept).sqrt() * noise

    def mean(data):
        return before.sqrt() * beta / (1 - kept) * data + (1 - beta).sqrt() * (1 - before) / (1 - kept) * x_k

    guess = (x_k - (1 - kept).sqrt() * (noise + missed.double())) / kept.sqrt()
    std = (fraction * beta.log() + (1 - fraction) * small.log()).mul(0.5).exp()
    divergence = kl_divergence(Normal(mean(x), small.sqrt()), Normal(mean(guess), std))
    return divergence / math.log(2), (x - mean(guess)) / std, std


def test_the_bound_of_learned_variances_is_the_divergence_of_two_gaussians():
    step = torch.arange(1, 1000)
    x, missed, learned = torch.randn(3, 999, 2, 2, 2, generator=seeded_generator(0)) * 0.5
    found = DDPM().variance_bound(x, missed, learned, step)
    torch.testing.assert_close(found.double(), bound_by_torch(x, missed, learned, step)[0], rtol=2e-6, atol=1e-6)


def test_the_bound_of_the_first_step_is_the_likelihood_of_a_bin():
    """The reference's tanh is in place of the normal distribution: that formula, and 2e-3 from the true one."""
    x = torch.cat([torch.linspace(-1.5, -0.9995, 20), torch.linspace(-0.99, 0.99, 60), torch.linspace(0.9995, 2, 20)])
    x, step = x.view(100, 1, 1, 1), torch.zeros(100, dtype=torch.int64)
    missed, learned = torch.randn(2, 100, 1, 1, 1, generator=seeded_generator(0)) * 0.4
    found = DDPM().variance_bound(x, missed, learned, step).double()
    _, off, std = bound_by_torch(x, missed, learned, step)
    upper, lower = off + 1 / 255 / std, off - 1 / 255 / std
    for cdf, atol in (
        (lambda z: 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))), 2e-6),
        (Normal(torch.zeros((), dtype=torch.float64), 1.0).cdf, 2e-3),
    ):
        ends = torch.where(x > 0.999, 1.0, cdf(upper)) - torch.where(x < -0.999, 0.0, cdf(lower))
        torch.testing.assert_close(found, -ends.log2(), rtol=0, atol=atol)


def test_ddpm_learns_variances_with_the_mean_frozen():
    x, y = torch.randn(64, 2, 2, 2, generator=seeded_generator(0)), torch.zeros(64)
    plain = torch.full((64, 2, 2, 2), 0.1, requires_grad=True)
    both = torch.full((64, 4, 2, 2), 0.1, requires_grad=True)
    simple, x_t, denoised = DDPM().errors(lambda x, t, y: plain, x, y, seeded_generator(1))
    error, *rest = DDPM().errors(lambda x, t, y: both, x, y, seeded_generator(1))
    off, *_ = DDPM(learn_sigma=False).errors(lambda x, t, y: both, x, y, seeded_generator(1))
    assert error.shape == x.shape and torch.equal(off, simple)
    assert torch.equal(rest[0], x_t) and torch.equal(rest[1], denoised)
    rows = seeded_generator(1)
    step = (uniform((64,), rows) * 1000).long()
    missed = 0.1 - normal(x.shape, rows)
    bound = DDPM().variance_bound(x, missed, torch.full_like(x, 0.1), step)
    torch.testing.assert_close(error - simple, bound, rtol=1e-5, atol=1e-5)
    (of_simple,) = torch.autograd.grad(simple.sum(), plain)
    (of_both,) = torch.autograd.grad(error.sum(), both)
    assert torch.equal(of_both[:, :2], of_simple) and (of_both[:, 2:] != 0).all()


def test_the_objective_decides_on_learned_variances():
    for model in ("dit", "tread", "sprint", "lightningdit"):
        for objective, channels in (("ddpm", 2), ("ddpm objective.learn_sigma=false", 1), ("edm", 1), ("rf", 1)):
            net = build_network(made_settings([f"model={model}", *f"objective={objective}".split()]))
            assert net.out_channels == channels
    build_network(made_settings(["model=maskdit", "objective=ddpm"]))  # which has no channels for them


def test_a_lone_row_has_nothing_to_contrast_with_and_the_last_of_three_the_one_before():
    x, y = torch.randn(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    for rows in (1, 3):
        plain, contrastive = (
            loss_of(RectifiedFlow(contrastive=c), zero_net, x[:rows], y[:rows], torch.Generator().manual_seed(0))
            for c in (0.0, 0.5)
        )
        other = plain[[1, 0, 1]] if rows == 3 else 0 * plain  # the network says 0: its error is the other's target
        torch.testing.assert_close(contrastive, plain - 0.5 * other)
