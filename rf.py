"""Rectified flow (arXiv 2209.03003, 2401.08740): training a velocity field; sampling demos on the command line.

x_t = (1 - t) x + t z with noise z ~ N(0, 1): t = 0 is data, t = 1 is noise, and the target velocity is z - x.

    python rf.py sample ckpt=runs/mnist-tread-XS4-rf                      unguided; scale=1.5: classifier-free guidance
    python rf.py sample_tread ckpt=runs/mnist-tread-XS4-rf scale=1.5 gamma_strong=0.2 gamma_weak=0.7    sparse guidance

Without ckpt=, both use the run in assets/. Runs of objective=edm are sampled as flows. Keys: configs/sample.yaml.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import cosine_similarity

from contracts import Condition, Objective, Source
from randomness import normal, uniform
from solvers import broadcast_t, flow_sampler, shifted
from system import UserError

SHORTEST = 0.05  # of the times that a velocity is divided by where the network predicts x (arXiv 2511.13720)


class RectifiedFlow(Objective):
    """timesteps: how t is drawn in training, "uniform" (SiT) or "logit_normal" (2403.03206: sigmoid of N(0, 1)).

    contrastive, in [0, 1): weight of contrastive flow matching (arXiv 2506.05350), 0.05 as published; 0 = off.
    cosine: weight of the angle between the predicted and the true velocity, 1 in LightningDiT (2501.01423); 0 = off.
    shift: t -> shift t / (1 + (shift - 1) t), in training and, unless the sampler says another, in sampling.
    predict: "velocity", or "x": the network's output is x, of which (x_t - x) / max(t, 0.05) is the velocity, and the
        loss is on this, as its target is (2511.13720).
    """

    predicts = "velocity"
    sigma_data = 1.0  # expected standard deviation of the latents

    def __init__(
        self, timesteps: str = "logit_normal", contrastive: float = 0.0, cosine: float = 0.0, shift: float = 1.0,
        predict: str = "velocity",
    ):  # fmt: skip
        if timesteps not in ("uniform", "logit_normal"):
            raise UserError(f"timesteps {timesteps!r}; needed: uniform or logit_normal")
        if not 0 <= contrastive < 1:  # from 1 on, the loss has no minimum
            raise UserError(f"objective.contrastive={contrastive}; needed: from 0 to below 1, 0.05 as published")
        if not 0 <= cosine < math.inf:
            raise UserError(f"objective.cosine={cosine}; needed: at least 0, 1 as published")
        if not 0 < shift < math.inf:
            raise UserError(f"objective.shift={shift}; needed: above 0, 1 = none")
        if predict not in ("velocity", "x"):
            raise UserError(f"objective.predict={predict}; needed: velocity or x")
        self.timesteps, self.contrastive, self.cosine, self.shift = timesteps, contrastive, cosine, shift
        self.output, self.sample = predict, partial(flow_sampler, shift=shift)

    def errors(
        self, net: Callable, x: torch.Tensor, condition: Condition, generators: Source = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The velocity's squared error: as in `Objective.errors`.

        Contrastive: less `contrastive` times the squared error against the other row of the pair (0, 1), (2, 3), ...,
        or, for the last of an odd number, the row before it, whether its label was dropped or not. Cosine: plus
        `cosine` times 1 - the cosine over the channels of a pixel.
        """
        if self.timesteps == "uniform":
            t = uniform((len(x),), generators, device=x.device)  # (B,)
        else:
            t = normal((len(x),), generators, device=x.device).sigmoid()  # (B,)
        t, noise = shifted(t, self.shift), normal(x.shape, generators, device=x.device)
        time = span = t.view(-1, 1, 1, 1)
        x_t, target = x + time * (noise - x), noise - x
        if self.output == "x":
            span = time.clamp(min=SHORTEST)
            target = target * (time / span)  # (x_t - x) / span
        velocity = self.predict(net, x_t, t, condition)
        error = (velocity - target).square()  # (B, C, h, w)
        if self.contrastive and len(x) > 1:
            # Neighbours of a global batch are independent samples, and no split into even parts separates a pair.
            other = torch.arange(len(x), device=x.device) ^ 1  # (B,)
            other = torch.where(other < len(x), other, len(x) - 2)  # an odd batch's last row: against the one before
            error = error - self.contrastive * (velocity - target[other]).square()
        if self.cosine:
            error = error + self.cosine * (1 - cosine_similarity(velocity, target, dim=1))[:, None]
        return error, x_t, x_t - span * velocity

    def predict(self, net: Callable, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        """v(x_t, t): x_t (B, C, h, w), t in [0, 1], () or (B,) -> velocity (B, C, h, w) float32.

        net(x, t, condition): the network, with its routing bound. Output channels past C (learned sigma) are ignored.
        """
        x_t, t = x_t.float(), broadcast_t(t, x_t)
        out = net(x_t, t, condition)[:, : x_t.shape[1]].float()
        return out if self.output == "velocity" else (x_t - out) / t.clamp(min=SHORTEST).view(-1, 1, 1, 1)

    def noise_share(self, t: torch.Tensor) -> torch.Tensor:
        return t


def main(argv: list[str]) -> None:
    """sample.py with the flow sampler; `sample_tread` with sparse guidance."""
    import sample
    from system import cli

    verb, overrides = cli.verb(argv, __doc__, ("sample", "sample_tread"))
    presets = ["sampler=rf", f"guidance={'sparse' if verb == 'sample_tread' else 'none'}"]
    sample.main(presets + overrides, shipped="mnist-tread-rf")


if __name__ == "__main__":
    from system.cli import command

    command(main, __doc__)
