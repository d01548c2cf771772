"""Scores as functions of features. Shapes: N images, D features, K classes.

    FeatureStats, frechet_distance    Heusel et al. (arXiv 1706.08500): |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))
    inception_score                   Salimans et al. (arXiv 1606.03498)
    precision_recall                  Kynkaanniemi et al. (arXiv 1904.06991), k = 3
    kernel_distance                   KID of Binkowski et al. (arXiv 1801.01401)

The last two are torch-fidelity's, number for number, on the features' own device.
"""

import sys

import numpy as np
import torch
import torch.distributed as dist

from system import UserError


class FeatureStats:
    """Running float64 sums (count, sum, outer product), so that neither order nor split matters.

    mu (D,) and sigma (D, D), normalised by N - 1, are NumPy float64.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor) -> None:
        """Adds features (B, D)."""
        features = features.to(self.sum)
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)

    @property
    def mu(self) -> np.ndarray:
        return (self.sum / self.count).cpu().numpy()

    @property
    def sigma(self) -> np.ndarray:
        """Raises UserError for fewer than two images."""
        if self.count < 2:
            raise UserError(f"{self.count} images; statistics need at least 2")
        mean = self.sum / self.count
        return ((self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)).cpu().numpy()


def all_reduce(parts: list[FeatureStats]) -> None:
    """Sums statistics over all processes, in place, by one message."""
    if not dist.is_initialized():
        return
    counts = torch.tensor([part.count for part in parts], dtype=torch.float64, device=parts[0].sum.device)
    packed = torch.cat([counts, *(tensor.flatten() for part in parts for tensor in (part.sum, part.outer))])
    dist.all_reduce(packed)
    sizes = [tensor.numel() for part in parts for tensor in (part.sum, part.outer)]
    counts, *sums = packed.split([len(parts), *sizes])
    for part, count, total, outer in zip(parts, counts, sums[::2], sums[1::2]):
        part.count, part.sum, part.outer = int(count), total, outer.view_as(part.outer)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(n, D) of each process -> (N, D) of all, in the order of the processes, on the CPU."""
    if not dist.is_initialized():
        return rows.cpu()
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    padded = rows.new_zeros(int(max(counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:n].cpu() for part, n in zip(gathered, counts)])


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians; mu (D,), sigma (D, D), float64.

    tr (S1 S2)^(1/2) is the sum of the singular values of F1' F2, where S = F F'. Its error is that of one rounding; the
    square roots of the eigenvalues of S1 S2 (as by SciPy's sqrtm) would turn 1e-16 into 1e-8. Negative eigenvalues
    beyond rounding, which no covariance has, are clamped with a warning. Raises UserError for shapes that differ and
    for values that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.from_numpy(np.asarray(a, np.float64)) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        shapes = [tuple(a.shape) for a in (mu1, sigma1, mu2, sigma2)]
        raise UserError(f"mu, sigma, mu, sigma of shapes {shapes}; needed: (D,), (D, D), (D,), (D, D)")
    if not all(a.isfinite().all() for a in (mu1, sigma1, mu2, sigma2)):
        raise UserError("mu or sigma has numbers that are not finite")
    overlap = _nuclear_norm(_factor(sigma1).T @ _factor(sigma2))
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap)


def _nuclear_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Sum of singular values; from the Gram matrix where its condition allows, in a third of the time."""
    gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    eigenvalues = torch.linalg.eigvalsh(gram)  # ascending
    if eigenvalues[0] > 1e-9 * eigenvalues[-1]:
        return eigenvalues.sqrt().sum()
    return torch.linalg.svdvals(matrix).sum()


def _factor(sigma: torch.Tensor) -> torch.Tensor:
    """(D, D) of rank r -> F (D, r) with sigma = F F': by Cholesky, or by eigenvectors where r < D."""
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        return factor
    eigenvalues, vectors = torch.linalg.eigh(sigma)  # ascending
    rounding = len(sigma) * torch.finfo(torch.float64).eps * eigenvalues.abs().max()
    if eigenvalues[0] < -100 * rounding:
        clamped = f"clamped eigenvalues down to {eigenvalues[0].item():.3g} (largest: {eigenvalues[-1].item():.3g})"
        print(f"warning: {clamped}: no covariance", file=sys.stderr)
    kept = eigenvalues > rounding
    return vectors[:, kept] * eigenvalues[kept].sqrt()


def inception_score(logits: torch.Tensor, part_size: int = 5000) -> tuple[float, float]:
    """Mean and standard deviation over parts of `part_size` images and a rest, as in ADM's evaluator; logits (N, K)."""
    scores = []
    for log_p in logits.double().log_softmax(dim=1).split(part_size):
        p = log_p.exp()  # (B, K)
        scores.append((p * (log_p - p.mean(0).log())).sum(dim=1).mean().exp())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def precision_recall(generated: torch.Tensor, real: torch.Tensor, k: int = 3, rows: int = 500) -> tuple[float, float]:
    """The fraction of generated (N, D) within the k-neighbourhoods of real (M, D), and vice versa.

    Distances are computed in blocks of rows * rows, and rows * N of them kept. Raises UserError for k images or fewer.
    """
    if min(len(generated), len(real)) <= k:
        raise UserError(f"{len(generated)} against {len(real)} images; precision and recall need more than {k}")
    centre = real.mean(0)  # keeps the distances, and shrinks the rounding error of |a|^2 + |b|^2 - 2ab
    generated, real = generated - centre, real - centre
    return _share_within(generated, real, k, rows), _share_within(real, generated, k, rows)


def _share_within(points: torch.Tensor, centres: torch.Tensor, k: int, rows: int) -> float:
    """The fraction of points (N, D) in the ball around any of centres (M, D) that reaches its k-th neighbour."""
    nearest = [_distances(part, centres, rows).topk(k + 1, largest=False) for part in centres.split(rows)]
    radii = torch.cat([found.values[:, k] for found in nearest])  # (M,); the nearest is the centre itself
    within = [(_distances(part, centres, rows) <= radii).any(dim=1) for part in points.split(rows)]
    return torch.cat(within).float().mean().item()


def _distances(a: torch.Tensor, b: torch.Tensor, rows: int) -> torch.Tensor:  # (N, D), (M, D) -> (N, M)
    return torch.cat([torch.cdist(a, part) for part in b.split(rows)], dim=1)


def kernel_distance(generated: torch.Tensor, real: torch.Tensor, subsets: int = 100) -> tuple[float, float]:
    """Mean and standard deviation of the squared MMD, cubic kernel, over random subsets of at most 1,000 images."""
    if generated.device.type != "cuda":
        generated, real = generated.cpu(), real.cpu()  # Apple's GPUs lack float64
    size, draws = min(1000, len(generated), len(real)), np.random.RandomState(0)
    scores = []
    for _ in range(subsets):
        drawn = [draws.choice(len(features), size, replace=False) for features in (generated, real)]
        x, y = (features[torch.from_numpy(ids)].double() for features, ids in zip((generated, real), drawn))
        scores.append(_squared_mmd(x, y))
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def _squared_mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The unbiased estimate for x (n, D) and y (n, D), with the kernel (a b / D + 1)^3: ()."""

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.addmm(a.new_ones(1), a, b.T, alpha=1 / a.shape[1]).pow_(3)  # in one piece of memory

    n = len(x)
    same = sum(gram.sum() - gram.trace() for gram in (kernel(x, x), kernel(y, y)))
    return same / (n * (n - 1)) - 2 * kernel(x, y).mean()
