"""EDM and rectified flow against closed forms."""

import math

import pytest
import torch

from edm import EDM
from guidance import Guidance, guide
from randomness import Rows, seeded_generator
from rf import RectifiedFlow
from solvers import noise_levels


def zero_net(x, t, y):
    return torch.zeros_like(x)


def test_edm_denoiser_is_the_identity_at_no_noise():
    x, y = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    net = lambda x, t, y: torch.randn_like(x)  # noqa: E731  whatever the network says
    torch.testing.assert_close(EDM().predict(net, x, torch.tensor(1e-6), y), x, rtol=0, atol=1e-5)


def test_edm_preconditioning_is_table_1():
    edm, x, y, sigma = EDM(sigma_data=0.5), torch.randn(3, 2, 4, 4), torch.zeros(3, dtype=torch.int64), torch.tensor([0.1, 1.0, 10.0])
    seen = {}

    def net(x, t, y):
        seen.update(x=x, t=t)
        return torch.ones_like(x)

    out = edm.predict(net, x, sigma, y)
    s = sigma.view(3, 1, 1, 1)
    torch.testing.assert_close(seen["x"], x / (0.25 + s**2).sqrt())
    torch.testing.assert_close(seen["t"], sigma.log() / 4)
    torch.testing.assert_close(out, 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt())


def test_edm_loss_of_a_network_that_says_nothing():
    """With F = 0 the expected weighted error is E|c_skip (x + n) - x|^2 * weight = 1 at every sigma, for data of std sigma_data."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 1, 2, 2, generator=g) * 0.5
    loss = EDM().loss(zero_net, x, torch.zeros(len(x), dtype=torch.int64), g)
    assert loss.shape == (20000,) and loss.mean().item() == pytest.approx(1, abs=0.02)


def gaussian_denoiser(mean, std):
    """The exact denoiser for data ~ N(mean, std^2)."""
    return lambda x, sigma: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


def test_heun_on_the_exact_gaussian_denoiser_gives_its_statistics():
    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    out = EDM().sample(gaussian_denoiser(0.3, 0.5), noise, num_steps=40)
    assert out.dtype == torch.float32
    assert out.mean().item() == pytest.approx(0.3, abs=0.02) and out.std().item() == pytest.approx(0.5, rel=0.02)


def test_heun_converges_with_order_two_and_counts_its_calls():
    noise, mean, std = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0)), 0.3, 0.5
    exact = mean + (noise.double() * 80 - mean) * std / math.sqrt(std**2 + 80**2)
    errors, calls = [], []

    def predict(x, sigma):
        calls.append(float(sigma))
        return gaussian_denoiser(mean, std)(x, sigma)

    for steps in (20, 40, 80):
        calls.clear()
        errors.append((EDM().sample(predict, noise, num_steps=steps, sigma_min=1e-3) - exact).abs().max().item())
        assert len(calls) == 2 * steps - 1
    assert errors[0] / errors[1] > 3.3 and errors[1] / errors[2] > 3.3  # 4 is order two


def test_churn_draws_from_the_images_own_generators():
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    run = lambda rows: EDM().sample(  # noqa: E731
        gaussian_denoiser(0.0, 0.5), noise[rows], num_steps=8, S_churn=40, generators=[seeded_generator(i) for i in rows]
    )
    assert torch.equal(run([0, 1, 2])[1:2], run([1]))
    assert not torch.equal(run([0, 1, 2]), EDM().sample(gaussian_denoiser(0.0, 0.5), noise, num_steps=8))


def test_karras_steps():
    sigmas = noise_levels(18, "edm", 0.002, 80, 7)
    assert len(sigmas) == 18 and sigmas[0] == pytest.approx(80) and sigmas[-1] == pytest.approx(0.002)


def test_euler_is_exact_on_a_constant_field():
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    velocity = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for steps in (1, 7, 50):
        out = RectifiedFlow().sample(lambda x, t: velocity, noise, num_steps=steps)
        torch.testing.assert_close(out, noise - velocity, rtol=0, atol=1e-6)


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
    whole = objective.loss(zero_net, x, y, Rows(seeded_generator(1), 0, 6))
    parts = [objective.loss(zero_net, x[s : s + 2], y[s : s + 2], Rows(seeded_generator(1), s, 6)) for s in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_learned_sigma_channels_are_not_used():
    def net(x, t, y):
        return torch.cat([torch.ones_like(x), torch.full_like(x, torch.nan)], dim=1)

    x, y = torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)
    assert EDM().predict(net, x, torch.tensor(1.0), y).isfinite().all()
    assert RectifiedFlow().predict(net, x, torch.tensor(0.5), y).shape == x.shape


def test_scale_one_or_outside_the_interval_never_calls_the_weak_branch():
    called = []

    def weak(x, t):
        called.append(float(t))
        return x * 0

    strong = lambda x, t: x  # noqa: E731
    x = torch.ones(2)
    assert torch.equal(guide(strong, weak, 1.0)(x, torch.tensor(0.5)), x) and not called
    guided = guide(strong, weak, 2.0, (0.2, 0.6))
    for t in (0.1, 0.2, 0.5, 0.6, 0.7):
        assert torch.equal(guided(x, torch.tensor(t, dtype=torch.float64)), 2 * x if 0.2 <= t <= 0.6 else x)
    assert called == [0.2, 0.5, 0.6]


def test_guidance_that_cannot_guide_is_refused():
    for bad in (
        dict(scale=2, weak_label="same"), dict(scale=2, weak_label="same", gamma_strong=0.7, gamma_weak=0.3),
        dict(gamma_strong=1.0), dict(gamma_weak=-0.1), dict(scale=-1), dict(scale=math.nan), dict(interval=(0.6, 0.2)),
        dict(weak_label="null"),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            Guidance(**bad)
