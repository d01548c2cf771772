"""Operations in the forms that are fast on the device at hand; elsewhere they are torch's own."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

plain_on = {"cpu"}  # types of device on which attention takes its plain form


@contextmanager
def as_on_gpus(on: bool = True) -> Iterator[None]:
    """on: attention takes the form of GPUs on CPUs too, so that what it keeps in memory is counted without a driver."""
    before = set(plain_on)
    plain_on.difference_update({"cpu"} if on else ())
    try:
        yield
    finally:
        plain_on.update(before)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v: q (B, H, K, d), k and v (B, H, L, d) -> (B, H, K, d).

    mask: (B, L) bool, True for keys that count: one of them at least in each row; None = all.
    """
    mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, L)
    if q.device.type in plain_on:
        # On CPUs, flash attention's backward pass is slow at DiT's lengths; the plain form is faster, and compiles.
        scores = Scores.apply((q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1))  # (B H, K, L)
        scores = scores.unflatten(0, q.shape[:2])
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Scores(torch.autograd.Function):
    """q @ k^T: (P, K, d), (P, L, d) -> (P, K, L) for P pairs of a sample and a head.

    Autograd would make the gradient of k^T and transpose it. What torch.compile makes of that is wrong in bf16 where K
    is no multiple of 32 (seen with torch 2.14 and GCC 12 on a Xeon with AMX).
    """

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k)
        return q @ k.mT

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = ctx.saved_tensors
        return grad @ k, grad.mT @ q


def linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """layer(x), with the bias added separately when compiled for CPUs."""
    if compiling_for_cpu(x):
        # addmm first copies the bias over the whole output. The loop that reads the output next adds it for free.
        return F.linear(x, layer.weight) + layer.bias
    return layer(x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form (arXiv 1606.08415)."""
    if compiling_for_cpu(x):
        return CpuGelu.apply(x, torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)
    return F.gelu(x, approximate="tanh")


def compiling_for_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and torch.compiler.is_compiling()


class CpuGelu(torch.autograd.Function):
    """GELU for CPUs, where the exponential dominates: it is evaluated once, for the value and the slope.

    0.5 (1 + tanh u) = sigmoid(2 u), which compiles to code three times as fast as tanh. The backward pass keeps the
    slope, in `slope_dtype`, instead of x.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, slope_dtype: torch.dtype) -> torch.Tensor:
        a, b = 2 * math.sqrt(2 / math.pi), 0.044715  # 2 u = a (x + b x^3)
        squared = x * x
        gate = torch.sigmoid(a * x * (1 + b * squared))
        slope = gate + gate * (1 - gate) * a * x * (1 + 3 * b * squared)
        ctx.save_for_backward(slope.to(slope_dtype))
        return x * gate

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slope,) = ctx.saved_tensors
        # torch.compile would keep x and recompute the exponential; the input of a foreach operation it keeps.
        return torch._foreach_mul([grad], [slope])[0], None


def at_once(numbers: int, device: str) -> int:
    """How many matrices of so many numbers are best multiplied together: on a CPU, as many as its caches hold."""
    return max((2**19 if device == "cpu" else 2**26) // numbers, 1)


def orthogonalize(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Jordan's quintic Newton-Schulz iteration of matrices x (n, rows, columns), rows <= columns, overwriting x.

    Their singular values come to lie between about 0.7 and 1.2; their singular vectors stay.
    """
    x /= x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    after, (gram, square) = torch.empty_like(x), x.new_empty(2, len(x), x.shape[1], x.shape[1])
    for _ in range(steps):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315, out=square)
        torch.baddbmm(x, square, x, beta=3.4445, out=after)
        x, after = after, x
    return x
