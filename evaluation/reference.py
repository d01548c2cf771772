"""References: statistics of real images in an extractor's features, as an .npz of plain arrays.

    mu (D,), sigma (D, D)            float64, normalised by N - 1
    mu_s (2023,), sigma_s            the same of Inception's spatial features, for sFID
    features (M, D)                  float32, of M of the images, for precision, recall and KID
    n, extractor, extractor_sha256   the number of images, and the extractor
    height, width                    of the images, in pixels

A file of OpenAI's ADM evaluation (VIRTUAL_*.npz) has the first four, and 10,000 images instead of features.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import open_latents, prepare
from data.archives import read_arrays
from evaluation import inception
from evaluation.features import Extractor, real_images
from evaluation.metrics import FeatureStats
from system import UserError
from system.files import atomic_file, sha256_once

KEYS = ("mu", "sigma", "mu_s", "sigma_s", "features", "n", "extractor", "extractor_sha256", "height", "width")
SINGLE = ("n", "extractor", "extractor_sha256", "height", "width")
MAX_FEATURES = 10_000  # images whose features are kept, as many as ADM's files have


@dataclass
class Reference:
    mu: np.ndarray  # (D,)
    sigma: np.ndarray  # (D, D)
    mu_s: np.ndarray | None = None  # (2023,)
    sigma_s: np.ndarray | None = None  # (2023, 2023)
    features: np.ndarray | None = None  # (M, D)
    n: int | None = None  # None = unknown (ADM's files)
    extractor: str = "inception"
    extractor_sha256: str | None = None
    height: int | None = None  # None = unknown (ADM's files)
    width: int | None = None
    source: str = ""  # the file, or a description
    sha256: str | None = None  # of the file


def reference_from(
    stats: FeatureStats, spatial: FeatureStats | None, features: torch.Tensor | None, extractor: Extractor, source: str
) -> Reference:
    """A reference of images whose features `extractor` made."""
    more = {} if spatial is None else {"mu_s": spatial.mu, "sigma_s": spatial.sigma}
    if features is not None:
        more["features"] = features.cpu().numpy()
    more |= {"n": stats.count, "extractor": extractor.name, "extractor_sha256": extractor.sha256}
    return Reference(stats.mu, stats.sigma, **more, source=source)


def shipped_reference(extractor: Extractor, path: str | Path) -> Reference:
    """The reference of extractor=mnist or fashion: its training images, in the folder `path`, written on first use.

    It has the features of at most MAX_FEATURES images and is kept in the folder.
    """
    prepare(extractor.name, path)
    made = Path(path) / f".training-{extractor.sha256[:8]}-{open_latents(path).fingerprint}.npz"
    source = {"mnist": "the embedded digits, train split", "fashion": "Fashion-MNIST, train split"}[extractor.name]
    if made.exists():
        with contextlib.suppress(UserError):  # damaged: made again
            return read_reference(made, source)
    images, _ = real_images(extractor.name, "train", path)
    features = torch.cat([extractor(batch).pool for batch in images.split(500)])  # (N, D)
    stats = FeatureStats(extractor.num_features)
    stats.update(features)
    reference = reference_from(stats, None, features[:MAX_FEATURES], extractor, source)  # the shards are shuffled
    write_reference(made, reference)
    return reference


def write_reference(path: Path, reference: Reference) -> None:
    """Writes the .npz, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.savez(file, **{key: getattr(reference, key) for key in KEYS if getattr(reference, key) is not None})


def read_reference(path: str | Path, source: str | None = None) -> Reference:
    """source: a description, in the place of the file's name and sha256; None = these.

    Raises UserError for arrays that are missing, misshapen or not finite, and for damaged or pickled files.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no reference {path}; needed: an .npz by `python fid.py ref`, or ADM's VIRTUAL_*.npz")
    arrays = read_arrays(path, KEYS)
    for key, array in arrays.items():
        single, kinds = key in SINGLE, "U" if key.startswith("extractor") else "fiu"
        if array.dtype.kind not in kinds or not array.dtype.isnative or array.ndim and single:
            needed = "a text" if kinds == "U" else "a number" if single else "numbers"
            raise UserError(f"{path}: {key} is {array.dtype} {array.shape}; needed: {needed}")
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s"))[: 2 if {"mu_s", "sigma_s"} & arrays.keys() else 1]:
        shapes = [arrays[key].shape if key in arrays else "missing" for key in (mu, sigma)]
        if "missing" in shapes or len(shapes[0]) != 1 or shapes[1] != 2 * shapes[0]:
            raise UserError(f"{path}: {mu} {shapes[0]}, {sigma} {shapes[1]}; needed: numbers (D,) and (D, D)")
        if not (np.isfinite(arrays[mu]).all() and np.isfinite(arrays[sigma]).all()):
            raise UserError(f"{path}: {mu} or {sigma} has numbers that are not finite")
    if (features := arrays.get("features")) is not None:
        if features.ndim != 2 or features.shape[1:] != arrays["mu"].shape or not np.isfinite(features).all():
            needed = f"finite numbers (M, {len(arrays['mu'])}), as mu says"
            raise UserError(f"{path}: features {features.shape} of {features.dtype}; needed: {needed}")
    plain = {key: array.item() if array.ndim == 0 else array for key, array in arrays.items()}
    return Reference(**plain, source=source or str(path), sha256=None if source else sha256_once(path))


def check_extractor(reference: Reference, extractor: Extractor) -> None:
    """Raises UserError for a reference in other features than `extractor`'s."""
    sha256, own = reference.extractor_sha256, extractor.sha256
    same_weights = sha256 in (None, own) or {sha256, own} <= inception.TRUE_WEIGHTS.keys()
    if reference.extractor != extractor.name or not same_weights:
        theirs, ours = f"{reference.extractor} ({str(sha256)[:8]})", f"{extractor.name} ({own[:8]})"
        raise UserError(f"{reference.source} was made with {theirs}, the extractor is {ours}; needed: one and the same")
    if (found := len(reference.mu)) != extractor.num_features:
        raise UserError(f"{reference.source} has {found} features; {extractor.name} gives {extractor.num_features}")
    if reference.mu_s is not None and (found := len(reference.mu_s)) != extractor.num_spatial:
        raise UserError(f"{reference.source}: mu_s has {found} numbers; {extractor.name} gives {extractor.num_spatial}")


def check_size(reference: Reference, height: int, width: int) -> None:
    """Raises UserError for images of another size than the reference's, where that is known."""
    if reference.height is not None and (reference.height, reference.width) != (height, width):
        found = f"images of {width}x{height} pixels, and {reference.source} is of {reference.width}x{reference.height}"
        raise UserError(f"{found}; needed: one size, which crop= makes of images=, here and in `fid.py ref`")
