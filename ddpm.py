"""DDPM (arXiv 2006.11239) as in official DiT: a network that predicts the noise at 1000 linear-beta steps.

Seen as a denoiser at any noise level. Step k sees x_k = sqrt(a_k) x + sqrt(1 - a_k) noise, with a_k = prod(1 - beta);
divided by sqrt(a_k) this is x + sigma_k noise, with sigma_k = sqrt((1 - a_k) / a_k) from 0.01 to 157. So for
x_t = x + sigma noise

    D(x_t; sigma) = x_t - sigma eps(x_t / sqrt(1 + sigma^2), k),    sigma_k = sigma

and EDM's samplers, guidance and scores work on such weights unchanged. `sampler=ddpm` takes DDPM's own steps, with the
variances that the network has learned by the variational bound (arXiv 2102.09672), where it has channels for them.
"""

import math
from collections.abc import Callable

import torch

from contracts import Condition, Objective, Source
from randomness import normal, uniform
from solvers import broadcast_t, edm_sampler, linear_alpha_bar


class DDPM(Objective):
    """Noise prediction. num_steps, beta_start, beta_end: the linear schedule that the network is trained for.

    learn_sigma: the other C channels of a network that has 2 C learn the variances, as in DiT.
    """

    predicts = "denoised"
    sigma_data = 1.0  # expected standard deviation of the latents
    sample = staticmethod(edm_sampler)

    def __init__(
        self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, learn_sigma: bool = True
    ):
        if num_steps < 2 or not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"needed: num_steps >= 2, 0 < beta_start <= beta_end < 1; got {num_steps}, {beta_start}, {beta_end}"
            )
        self.alpha_bar = linear_alpha_bar(num_steps, beta_start, beta_end)  # a_k
        self.log_sigma = ((1 - self.alpha_bar) / self.alpha_bar).sqrt().log().float()  # (num_steps,), rising
        self.learn_sigma = learn_sigma
        before = torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])
        beta = 1 - self.alpha_bar / before
        small = beta * (1 - before) / (1 - self.alpha_bar)  # the posterior's variance
        gap = beta / ((1 - beta) * (1 - before))  # of the means, squared, for a noise off by 1; over `small`
        small[0], gap[0] = small[1], 0.0  # step 0 has no posterior; its variance is clipped
        self.bound = torch.stack([small.log(), beta.log(), gap]).float()  # (3, num_steps)

    def errors(
        self, net: Callable, x: torch.Tensor, condition: Condition, generators: Source = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The noise's squared error ("L_simple"), plus the bound of learned variances: as in `Objective.errors`."""
        self.log_sigma = self.log_sigma.to(x.device)
        step = (uniform((len(x),), generators, device=x.device) * len(self.log_sigma)).long()  # (B,)
        sigma = self.log_sigma[step].exp()
        noise = normal(x.shape, generators, device=x.device)
        x_t = x + sigma.view(-1, 1, 1, 1) * noise
        output = self.noise(net, x_t, sigma, condition)
        eps, learned = output[:, : x.shape[1]], output[:, x.shape[1] :]
        error = (eps - noise).square()
        if self.learn_sigma and learned.shape[1]:
            error = error + self.variance_bound(x, (eps - noise).detach(), learned, step)
        return error, x_t, x_t - sigma.view(-1, 1, 1, 1) * eps

    def variance_bound(
        self, x: torch.Tensor, missed: torch.Tensor, learned: torch.Tensor, step: torch.Tensor
    ) -> torch.Tensor:
        """L_vlb in bits (arXiv 2102.09672, Eq. 4-6, 15): x, the noise's error `missed` and `learned` (B, C, h, w) each.

        The divergence of the posterior from the network's step; at step 0 the log-likelihood of x, in bins of 2 / 255.
        """
        self.bound = self.bound.to(x.device)
        log_small, log_beta, gap = self.bound[:, step].view(3, -1, 1, 1, 1)  # (B, 1, 1, 1) each
        wider = (learned + 1) / 2 * (log_beta - log_small)
        divergence = (wider + (-wider).expm1() + gap * missed.square() * (-wider).exp()) / 2
        inverse_std, off = (-(log_small + wider) / 2).exp(), self.log_sigma[0].exp() * missed  # x less the mean
        ends = (inverse_std * (off + side / 255) for side in (1, -1))
        upper, lower = ((1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh()) / 2 for z in ends)  # N(0, 1)'s
        upper, lower = torch.where(x > 0.999, 1, upper), torch.where(x < -0.999, 0, lower)  # the outer bins have no end
        likelihood = (upper - lower).clamp(min=1e-12).log()
        return torch.where(step.view(-1, 1, 1, 1) == 0, -likelihood, divergence) / math.log(2)

    def predict(self, net: Callable, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """D(x_t; sigma): x_t (B, C, h, w), t = sigma, () or (B,) -> denoised (B, C, h, w) float32.

        The output of a network with learned variances goes on with those, as they are: (B, 2 C, h, w).
        """
        x_t, sigma = x_t.float(), broadcast_t(t, x_t)
        noise = self.noise(net, x_t, sigma, condition)
        denoised = x_t - sigma.view(-1, 1, 1, 1) * noise[:, : x_t.shape[1]]
        return torch.cat([denoised, noise[:, x_t.shape[1] :]], dim=1)

    def noise(self, net: Callable, x_t: torch.Tensor, sigma: torch.Tensor, condition: Condition) -> torch.Tensor:
        """eps: x_t (B, C, h, w), sigma (B,) -> (B, C, h, w) float32; (B, 2 C, h, w) with learned variances after it."""
        c_in = (1 + sigma**2).rsqrt().view(-1, 1, 1, 1)
        return net(c_in * x_t, self.step_at(sigma), condition).float()

    def noise_share(self, t: torch.Tensor) -> torch.Tensor:
        """The share of the steps: t = k."""
        return (t + 0.5) / len(self.log_sigma)

    def step_at(self, sigma: torch.Tensor) -> torch.Tensor:
        """The fractional step k with sigma_k = sigma, interpolated in log sigma, clamped to both ends: (B,) -> (B,)."""
        self.log_sigma = self.log_sigma.to(sigma.device)
        wanted = sigma.log().clamp(self.log_sigma[0], self.log_sigma[-1])
        above = torch.searchsorted(self.log_sigma, wanted).clamp(1, len(self.log_sigma) - 1)
        low, high = self.log_sigma[above - 1], self.log_sigma[above]
        return above - 1 + (wanted - low) / (high - low)
