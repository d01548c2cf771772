"""DDPM's own steps against diffusers' schedulers, the formulas of the papers, and a Gaussian's exact answer."""

import diffusers
import pytest
import torch

from ddpm import DDPM
from edm import EDM
from guidance import guide
from randomness import seeded_generator
from rf import RectifiedFlow
from solvers import ddpm_sampler, linear_alpha_bar, solve, step_indices
from system import UserError
from tests.test_solvers import MEAN, NOISE, STD, denoise, velocity

X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.zeros(3, dtype=torch.int64)


def network(x, t, y):
    """The noise of data near N(0, 1), and a variance that depends on place and time."""
    t = t.view(-1, 1, 1, 1)
    alpha_bar = linear_alpha_bar().float()[t.round().long()]
    eps = (1 - alpha_bar).sqrt() * x + 0.1 * (x.roll(1, -1) * (1 + t / 1000)).tanh()
    return torch.cat([eps, (x.roll(1, -2) - t / 500).sin()], dim=1)


def ours(net=network, **settings):
    objective = DDPM()
    predict = lambda x, sigma: objective.predict(net, x, sigma, Y)
    return solve(objective, predict, X, {"takes": "noise"} | settings, torch.Generator().manual_seed(1))


def of_diffusers(scheduler, num_steps, channels):
    scheduler.set_timesteps(num_steps)
    x, generator = X.double(), torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        output = network(x, t.expand(3), Y)[:, :channels].float()
        x = scheduler.step(output, t, x.float(), generator=generator).prev_sample.double()
    return x.float()


@pytest.mark.parametrize("num_steps", [1, 2, 50, 250])
@pytest.mark.parametrize(
    "variance, name", [("learned", "learned_range"), ("small", "fixed_small"), ("large", "fixed_large")]
)
def test_ancestral_steps_are_those_of_diffusers(num_steps, variance, name):
    scheduler = diffusers.DDPMScheduler(variance_type=name, clip_sample=False, timestep_spacing="linspace")
    expected = of_diffusers(scheduler, num_steps, 4 if variance == "learned" else 2)
    torch.testing.assert_close(ours(num_steps=num_steps, variance=variance), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 7, 50, 250])
def test_ddim_steps_are_those_of_diffusers(num_steps):
    expected = of_diffusers(diffusers.DDIMScheduler(clip_sample=False), num_steps, 2)
    found = ours(num_steps=num_steps, solver="ddim", spacing="leading")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_an_ancestral_step_is_the_papers():
    """One step between two levels, in the coefficients of DDPM's Eq. 7 and Improved DDPM's Eq. 15."""
    a, a_next, rows = 0.3, 0.62, []
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(1))

    def predict(x, sigma):
        rows.append((x.double() * a**0.5, sigma))
        return torch.cat([x.tanh(), x.sin()], dim=1)

    levels = torch.tensor([a_next, a], dtype=torch.float64)
    ddpm_sampler(predict, X, num_steps=2, alpha_bar=levels, generators=torch.Generator().manual_seed(1))
    assert float(rows[0][1]) == pytest.approx(((1 - a) / a) ** 0.5)
    x, beta = X.double(), 1 - a / a_next
    data, v = (x / a**0.5).tanh(), ((x / a**0.5).sin() + 1) / 2
    mean = a_next**0.5 * beta / (1 - a) * data + (1 - beta) ** 0.5 * (1 - a_next) / (1 - a) * x
    small = (1 - a_next) / (1 - a) * beta
    expected = mean + torch.exp((v * torch.tensor(beta).log() + (1 - v) * torch.tensor(small).log()) / 2) * noise
    torch.testing.assert_close(rows[1][0] / a**0.5 * a_next**0.5, expected)


def test_the_network_is_asked_at_the_steps_of_its_training():
    asked = []
    net = lambda x, t, y: asked.append(t[0].item()) or network(x, t, y)
    ours(net, num_steps=250)
    wanted = [round(i * 999 / 249) for i in reversed(range(250))]
    assert max(abs(t - k) for t, k in zip(asked, wanted)) < 1e-3 and len(asked) == 250
    assert step_indices(250, 1000, "leading").tolist() == [4 * i for i in reversed(range(250))]


def test_a_gaussian_comes_out_as_it_is():
    """The exact denoiser of N(MEAN, STD^2): DDIM carries each noise to its place, ancestral steps reach the spread."""
    exact = MEAN + STD * NOISE.double()
    assert (ddpm_sampler(denoise, NOISE, solver="ddim", num_steps=1000) - exact).abs().max() < 0.03
    noise = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for variance in ("small", "large"):
        generator = torch.Generator().manual_seed(1)
        out = ddpm_sampler(denoise, noise, num_steps=1000, variance=variance, generators=generator)
        assert out.mean() == pytest.approx(MEAN, abs=0.02) and out.std() == pytest.approx(STD, abs=0.02)
    few = [
        ddpm_sampler(denoise, noise, num_steps=8, variance=v, generators=seeded_generator(0)).std()
        for v in ("small", "large")
    ]
    assert few[0] < few[1]  # few steps: the one is too little noise, the other too much


def test_an_image_depends_on_its_own_generator():
    streams = lambda rows: [seeded_generator(row) for row in rows]
    whole = ddpm_sampler(denoise, NOISE[:4], num_steps=20, generators=streams(range(4)))
    alone = ddpm_sampler(denoise, NOISE[2:3], num_steps=20, generators=streams([2]))
    torch.testing.assert_close(alone, whole[2:3], rtol=0, atol=1e-6)


def test_the_default_of_the_objective_and_other_samplers_do_not_see_the_variance():
    objective = DDPM()
    with_variance = lambda x, sigma: objective.predict(network, x, sigma, Y)
    plain = lambda x, sigma: objective.predict(lambda *inputs: network(*inputs)[:, :2], x, sigma, Y)
    for settings in ({}, {"takes": "denoised"}, {"takes": "velocity"}):
        found, expected = (solve(objective, p, X, settings | {"num_steps": 4}, None) for p in (with_variance, plain))
        assert torch.equal(found, expected)


def test_other_objectives_take_these_steps_too():
    noise, with_variance = NOISE.view(32, 2, 2, 2), lambda x, t: velocity(x, t).repeat(1, 2, 1, 1)
    for objective, predict in ((EDM(), denoise), (RectifiedFlow(), velocity), (RectifiedFlow(), with_variance)):
        out = solve(objective, predict, noise, {"takes": "noise", "solver": "ddim", "num_steps": 1000}, None)
        assert (out - MEAN - STD * noise.double()).abs().max() < 0.03


def test_guidance_leaves_the_variance_to_the_strong_branch():
    strong, weak = torch.randn(3, 4, 2, 2), torch.randn(3, 2, 2, 2)  # the weak one may have learned none
    out = guide(lambda x, t: strong, lambda x, t: weak, 2.0, channels=2)(X, torch.tensor(1.0))
    torch.testing.assert_close(out, torch.cat([2 * strong[:, :2] - weak, strong[:, 2:]], dim=1))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_steps": 1001}, "at most the 1000 steps"), ({"num_steps": 0}, "a whole number in 1"),
        ({"solver": "heun"}, "ancestral, ddim"), ({"spacing": "odd"}, "even, leading"),
        ({"variance": "big"}, "learned, small, large"),
        ({"variance": "learned"}, "has no learned variance"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        solve(EDM(), denoise, NOISE, {"takes": "noise"} | settings, None)


def test_levels_are_those_of_the_paper():
    levels = linear_alpha_bar()
    assert levels[0] == 1 - 1e-4 and float(levels[-1]) == pytest.approx(4.04e-5, rel=1e-2)
