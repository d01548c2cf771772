"""Optimizers: AdamW, or Muon for the blocks' matrices and AdamW for the rest.

Muon (https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest orthogonal matrix. Times
0.2 sqrt(max(rows, columns)) its update is as large as AdamW's (arXiv 2502.16982), so they share one learning rate.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from checkpoints.config import Optimizer
from contracts import Network, muon_matrices
from system.kernels import at_once, orthogonalize
from system.processes import several


def make_optimizer(
    net: Network, settings: Optimizer, lr: float, more: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer of a run; lr is the first step's. Muon's settings.ns_precision is fp32 or bf16, no longer auto.
    more: what AdamW takes beside the network."""
    if settings.name == "adamw":
        return adamw([*net.parameters(), *more], settings, lr)
    return MuonAdamW(net, settings, lr, more)


def adamw(parameters, settings: Optimizer, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=lr, betas=tuple(settings.betas), eps=settings.eps, weight_decay=settings.weight_decay, fused=True
    )


class MuonAdamW(torch.optim.Optimizer):
    """Muon, with Nesterov's momentum, for the matrices of the blocks, fused AdamW for all other parameters.

    Like fused AdamW, `step` divides the gradients by `grad_scale` and changes nothing where `found_inf` is 1, and the
    host waits for neither. Each process orthogonalizes some of the matrices and sends the others the new weights.
    """

    def __init__(self, net: Network, settings: Optimizer, lr: float, more: Iterable[nn.Parameter] = ()):
        matrices = muon_matrices(net)
        chosen = set(map(id, matrices))
        others = [*(p for p in net.parameters() if id(p) not in chosen), *more]
        self.settings, self.adamw = settings, adamw(others, settings, lr)
        super().__init__([{"params": matrices, "lr": lr}, *self.adamw.param_groups], defaults={})
        for matrix in matrices:
            self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        self.grad_scale = torch.ones((), device=matrices[0].device)
        self.found_inf = torch.zeros((), device=matrices[0].device)
        self.rank, world_size = dist.get_rank() if several() else 0, dist.get_world_size() if several() else 1
        largest_first = sorted(matrices, key=torch.Tensor.numel, reverse=True)  # dealt out in turn: nearly equal work
        self.owner = {matrix: i % world_size for i, matrix in enumerate(largest_first)}

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.state, self.adamw.param_groups = self.state, self.param_groups[1:]  # loading replaces both
        self.adamw.grad_scale, self.adamw.found_inf = self.grad_scale, self.found_inf
        self.adamw.step()
        matrices = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        self.average_gradients(matrices)
        self.step_matrices([p for p in matrices if self.owner[p] == self.rank])
        if several():
            for work in [dist.broadcast(p, self.owner[p], async_op=True) for p in matrices]:
                work.wait()

    def average_gradients(self, matrices: list[nn.Parameter]) -> None:
        """Updates the momenta, and puts what is to be orthogonalized into the gradients."""
        bad, momentum = self.found_inf > 0, self.settings.momentum
        gradients, averages = [p.grad for p in matrices], [self.state[p]["momentum_buffer"] for p in matrices]
        torch._foreach_div_(gradients, self.grad_scale)
        for gradient, average in zip(gradients, averages):
            torch.where(bad, average, gradient, out=gradient)  # which leaves the average as it is, to the bit
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, averages, momentum if self.settings.nesterov else 1.0)

    def step_matrices(self, matrices: list[nn.Parameter]) -> None:
        """Adds the gradients, orthogonalized. Those of one shape, or its transpose, are multiplied together."""
        good, alike, lr = (self.found_inf == 0).float(), defaultdict(list), self.param_groups[0]["lr"]
        if self.settings.weight_decay:
            torch._foreach_mul_(matrices, 1 - lr * self.settings.weight_decay * good)  # by 1 in a bad step
        for p in matrices:
            alike[tuple(sorted(p.shape))].append(p)
        for (rows, columns), group in alike.items():
            rate = -lr * 0.2 * columns**0.5 * good  # 0 in a bad step, and what it multiplies is finite
            n = at_once(rows * columns, rate.device.type)
            for i in range(0, len(group), n):
                self.add_updates(group[i : i + n], rows, rate)

    def add_updates(self, matrices: list[nn.Parameter], rows: int, rate: torch.Tensor) -> None:
        dtype = torch.bfloat16 if self.settings.ns_precision == "bf16" else torch.float32
        wide = torch.stack([(p.grad if len(p) == rows else p.grad.T).to(dtype) for p in matrices])
        for p, update in zip(matrices, orthogonalize(wide, self.settings.ns_steps)):
            p.addcmul_(update if len(p) == rows else update.T, rate)
