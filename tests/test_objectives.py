"""EDM and rectified flow against closed forms."""

import pytest
import torch

from edm import EDM
from randomness import BatchSlice, seeded_generator
from rf import RectifiedFlow


def zero_net(x, t, y):
    return torch.zeros_like(x)


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
    loss = EDM().loss(zero_net, x, torch.zeros(len(x), dtype=torch.int64), g)
    assert loss.shape == (20000,) and loss.mean().item() == pytest.approx(1, abs=0.02)


def test_flow_loss_is_zero_for_the_true_velocity_and_ends_are_data_and_noise():
    g = torch.Generator().manual_seed(0)
    x, y = torch.full((64, 1, 2, 2), 2.0), torch.zeros(64, dtype=torch.int64)
    for timesteps in ("uniform", "logit_normal"):
        seen = []

        def net(x_t, t, y):  # for a point mass at 2 the velocity is known: z = (x_t - (1 - t) 2) / t
            seen.append(t)
            t = t.view(-1, 1, 1, 1)
            return (x_t - (1 - t) * 2) / t - 2

        assert RectifiedFlow(timesteps).loss(net, x, y, g).max() < 1e-3
        assert 0 <= seen[0].min() and seen[0].max() <= 1
    with pytest.raises(ValueError, match="uniform"):
        RectifiedFlow("lognormal")


@pytest.mark.parametrize("objective", [EDM(), RectifiedFlow("uniform"), RectifiedFlow()])
def test_loss_of_a_row_does_not_depend_on_the_split(objective):
    x, y = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(6, dtype=torch.int64)
    whole = objective.loss(zero_net, x, y, BatchSlice(seeded_generator(1), 0, 6))
    parts = [
        objective.loss(zero_net, x[s : s + 2], y[s : s + 2], BatchSlice(seeded_generator(1), s, 6)) for s in (0, 2, 4)
    ]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_learned_sigma_channels_are_not_used():
    def net(x, t, y):
        return torch.cat([torch.ones_like(x), torch.full_like(x, torch.nan)], dim=1)

    x, y = torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    assert EDM().predict(net, x, torch.tensor(1.0), y).isfinite().all()
    assert RectifiedFlow().predict(net, x, torch.tensor(0.5), y).shape == x.shape
