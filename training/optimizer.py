"""Optimizers: AdamW, or Muon for the blocks' matrices and AdamW for the rest.

Muon (https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest orthogonal matrix. Times
0.2 sqrt(max(rows, columns)) its update is as large as AdamW's (arXiv 2502.16982), so they share one learning rate.
"""

import torch
import torch.distributed as dist
from torch import nn

from checkpoints.config import Optimizer
from contracts import Network, muon_matrices
from system import UserError
from system.processes import several


def make_optimizer(net: Network, settings: Optimizer, lr: float) -> torch.optim.Optimizer:
    """The optimizer of a run; lr is the first step's. Raises UserError where this torch lacks it."""
    if settings.name == "adamw":
        return adamw(net.parameters(), settings, lr)
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"optimizer=muon needs torch 2.9 or newer, this is {torch.__version__}; or optimizer=adamw")
    return MuonAdamW(net, settings, lr)


def adamw(parameters, settings: Optimizer, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=lr, betas=tuple(settings.betas), eps=settings.eps, weight_decay=settings.weight_decay, fused=True
    )


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for the matrices of the blocks, fused AdamW for all other parameters.

    Like fused AdamW, `step` divides the gradients by `grad_scale` and changes nothing where `found_inf` is 1, and the
    host waits for neither. Each process orthogonalizes some of the matrices and sends the others the new weights.
    """

    def __init__(self, net: Network, settings: Optimizer, lr: float):
        matrices = muon_matrices(net)
        chosen = set(map(id, matrices))
        others = [p for p in net.parameters() if id(p) not in chosen]
        self.muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=settings.weight_decay, momentum=settings.momentum, nesterov=settings.nesterov,
            ns_steps=settings.ns_steps, adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        self.adamw = adamw(others, settings, lr)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], defaults={})
        for matrix in matrices:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        self.grad_scale = torch.ones((), device=matrices[0].device)
        self.found_inf = torch.zeros((), device=matrices[0].device)
        self.rank, world_size = dist.get_rank() if several() else 0, dist.get_world_size() if several() else 1
        largest_first = sorted(matrices, key=torch.Tensor.numel, reverse=True)  # dealt out in turn: nearly equal work
        self.owner = {matrix: i % world_size for i, matrix in enumerate(largest_first)}

    @torch.no_grad()
    def step(self) -> None:
        self.muon.state = self.adamw.state = self.state  # loading replaces the state and the groups
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf
        self.adamw.step()
        self.step_matrices([p for p in self.param_groups[0]["params"] if p.grad is not None])

    def step_matrices(self, matrices: list[nn.Parameter]) -> None:
        bad, own = self.found_inf > 0, [p for p in matrices if self.owner[p] == self.rank]
        torch._foreach_div_([p.grad for p in matrices], self.grad_scale)
        for p in matrices:
            momentum = self.state[p]["momentum_buffer"]
            torch.where(bad, momentum, p.grad, out=p.grad)  # which leaves the momentum as it is, to the bit
            if self.owner[p] != self.rank:
                momentum.lerp_(p.grad, 1 - self.param_groups[0]["momentum"])
                p.grad = None  # Muon passes over it
        before = [p.clone() for p in own]
        self.muon.step()
        for p, old in zip(own, before):
            torch.where(bad, old, p, out=p)
        if several():
            for work in [dist.broadcast(p, self.owner[p], async_op=True) for p in matrices]:
                work.wait()
