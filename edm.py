"""EDM (arXiv 2206.00364): training a denoiser D(x; sigma). Equation and table numbers are that paper's.

x is clean data, sigma the noise level, x_t = x + sigma * noise. The network's time input is c_noise = ln(sigma) / 4.
"""

from collections.abc import Callable

import torch

from contracts import Condition, Objective, Source, weighted
from randomness import normal
from solvers import broadcast_t, edm_sampler


class EDM(Objective):
    """A preconditioned denoiser. In training, ln(sigma) ~ N(P_mean, P_std^2). sigma_data: standard deviation of x."""

    predicts = "denoised"
    sample = staticmethod(edm_sampler)

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5):
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def errors(
        self, net: Callable, x: torch.Tensor, condition: Condition, generators: Source = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The denoiser's squared error, weighted (Eq. 5-7): as in `Objective.errors`."""
        sigma = (self.P_mean + self.P_std * normal((len(x),), generators, device=x.device)).exp()  # (B,)
        noise = normal(x.shape, generators, device=x.device)
        x_t = x + noise * _column(sigma)
        denoised = self.predict(net, x_t, sigma, condition)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return weighted((denoised - x).square(), weight), x_t, denoised

    def predict(self, net: Callable, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """D(x_t; sigma) (Table 1): x_t (B, C, h, w), t = sigma, () or (B,) -> denoised (B, C, h, w) float32.

        net(x, t, condition): the network, with its routing bound. Output channels past C (learned sigma) are ignored.
        """
        x_t = x_t.float()
        sigma = broadcast_t(t, x_t)  # (B,)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        out = net(_column(c_in) * x_t, sigma.log() / 4, condition)[:, : x_t.shape[1]].float()
        return _column(c_skip) * x_t + _column(c_out) * out

    def noise_share(self, t: torch.Tensor) -> torch.Tensor:
        """The quantile of sigma in training: t = c_noise."""
        return torch.special.ndtr((4 * t - self.P_mean) / self.P_std)


def _column(per_sample: torch.Tensor) -> torch.Tensor:
    return per_sample.view(-1, 1, 1, 1)
