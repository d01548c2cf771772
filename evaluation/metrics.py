"""Scores as functions of features. Shapes: N images, D features, K classes.

    FeatureStats, frechet_distance    Heusel et al. (arXiv 1706.08500): |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))
    inception_score                   Salimans et al. (arXiv 1606.03498)
    precision_recall                  Kynkaanniemi et al. (arXiv 1904.06991), k = 3
    kernel_distance                   KID of Binkowski et al. (arXiv 1801.01401)

The last two are torch-fidelity's, number for number, on the features' own device (its own select k-th neighbours on
the CPU, in ten times the time).
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from system import UserError, warn


class FeatureStats:
    """Running float64 sums (count, sum, outer product), so that neither order nor split matters.

    mu (D,) and sigma (D, D), normalised by N - 1, are NumPy float64.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor | np.ndarray) -> None:
        """Adds features (B, D)."""
        features = torch.as_tensor(features).to(self.sum)
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)

    def all_reduce(self) -> None:
        """Sums over all processes, in place."""
        if dist.is_initialized():
            count = self.sum.new_tensor(self.count)
            for tensor in (count, self.sum, self.outer):
                dist.all_reduce(tensor)
            self.count = int(count)

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


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians; mu (D,), sigma (D, D), float64.

    tr (S1 S2)^(1/2) is the sum of the singular values of F1' F2, where S = F F': off by one rounding, where the roots
    of the eigenvalues of S1 S2 (as by SciPy's sqrtm or torch-fidelity) turn 1e-16 into 1e-8. Negative eigenvalues
    beyond rounding are clamped with a warning. Raises UserError for shapes that differ and numbers that are not finite.
    """
    given = [torch.from_numpy(np.asarray(a, np.float64)) for a in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = given
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == (len(mu1), len(mu1)):
        shapes = [tuple(a.shape) for a in given]
        raise UserError(f"mu, sigma, mu, sigma of shapes {shapes}; needed: (D,), (D, D), (D,), (D, D)")
    if not all(a.isfinite().all() for a in given):
        raise UserError("mu or sigma has numbers that are not finite")
    overlap = _nuclear_norm(_factor(sigma1).T @ _factor(sigma2))
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap)


def _nuclear_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Sum of singular values; from the Gram matrix where its condition allows, in a third of the time."""
    if not matrix.numel():  # of a covariance of zeros: the images are all alike
        return matrix.sum()
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
        warn(f"{clamped}: no covariance")
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

    def distances(a: torch.Tensor, b: torch.Tensor) -> Iterator[torch.Tensor]:  # (N, D), (M, D) -> (rows, M), ...
        return (torch.cat([torch.cdist(some, part) for part in b.split(rows)], dim=1) for some in a.split(rows))

    def share_within(points: torch.Tensor, centres: torch.Tensor) -> float:
        nearest = [found.topk(k + 1, largest=False).values[:, k] for found in distances(centres, centres)]
        radii = torch.cat(nearest)  # (M,); the nearest is the centre itself
        return torch.cat([(found <= radii).any(dim=1) for found in distances(points, centres)]).float().mean().item()

    return share_within(generated, real), share_within(real, generated)


def kernel_distance(generated: torch.Tensor, real: torch.Tensor, subsets: int = 100) -> tuple[float, float]:
    """Mean and standard deviation of the squared MMD, cubic kernel, over random subsets of at most 1,000 images."""
    if generated.device.type != "cuda":
        generated, real = generated.cpu(), real.cpu()  # Apple's GPUs lack float64
    size, draws = min(1000, len(generated), len(real)), np.random.RandomState(0)
    scores = []
    for _ in range(subsets):
        drawn = [draws.choice(len(features), size, replace=False) for features in (generated, real)]
        x, y = (features[torch.from_numpy(ids)].double() for features, ids in zip((generated, real), drawn))
        xx, yy, xy = (  # the kernel (a b / D + 1)^3, (size, size), each in one piece of memory
            torch.addmm(a.new_ones(1), a, b.T, alpha=1 / a.shape[1]).pow_(3) for a, b in ((x, x), (y, y), (x, y))
        )
        same = (xx.sum() - xx.trace()) + (yy.sum() - yy.trace())
        scores.append(same / (size * (size - 1)) - 2 * xy.mean())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()
