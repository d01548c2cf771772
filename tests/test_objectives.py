"""EDM and rectified flow against closed forms."""

import pytest
import torch

from contracts import pixel_mean
from edm import EDM
from randomness import BatchSlice, normal, seeded_generator
from rf import RectifiedFlow


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
    plain, x, y, net = contrastive_parts()
    contrastive, *_ = contrastive_parts(contrastive=0.05, null_label=NULL)
    rows = BatchSlice(seeded_generator(1), 0, 6)
    t, noise = normal((6,), rows).sigmoid().view(-1, 1, 1, 1), normal(x.shape, rows)
    velocity, target = net((1 - t) * x + t * noise, t, y), noise - x
    for row, other in enumerate((1, 0, 3, 2, 5, 4)):
        against = (velocity[row] - target[other]).square().mean() if y[row] != NULL else 0
        expected = (velocity[row] - target[row]).square().mean() - 0.05 * against
        assert contrastive[row].item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(contrastive[y == NULL], plain[y == NULL])


def test_no_contrast_is_the_plain_loss_bit_for_bit():
    assert torch.equal(contrastive_parts()[0], contrastive_parts(contrastive=0.0, null_label=NULL)[0])


@pytest.mark.parametrize("size", [2, 3])
def test_pairs_do_not_depend_on_an_even_split(size):
    settings = dict(contrastive=0.05, null_label=NULL)
    whole, parts = contrastive_parts(**settings)[0], contrastive_parts(**settings, size=size)[0]
    assert torch.allclose(whole, parts) == (size == 2)  # which is why training refuses an odd one


def test_a_lone_row_has_nothing_to_contrast_with():
    x, y = torch.randn(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64)
    seeded = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    plain = loss_of(RectifiedFlow(), zero_net, x, y, seeded())
    contrastive = loss_of(RectifiedFlow(contrastive=0.5, null_label=NULL), zero_net, x, y, seeded())
    assert (plain == contrastive).tolist() == [False, False, True]
