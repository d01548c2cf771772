"""Scores against independent computations in float64, and the command line."""

import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fid
import sample
from checkpoints import gallery, load
from checkpoints.naming import settings_name
from data.images import center_crop, open_images
from evaluation import evaluate, features, metrics, score, table
from evaluation.metrics import FeatureStats, frechet_distance
from evaluation.reference import Reference, read_reference, write_reference
from system import UserError, cli, compiling
from system.files import sha256_of
from system.settings import parse
from tests import started
from tests.made_inception import noise, write_made_weights

ROOT = Path(__file__).resolve().parent.parent


def gaussian(n: int, dim: int, seed: int, spread: float = 1.0) -> np.ndarray:
    """(n, dim) samples whose standard deviations fall from 1 to `spread`, in turned axes."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(np.random.default_rng(9).normal(size=(dim, dim)))
    return (rng.normal(size=(n, dim)) * np.geomspace(1, spread, dim) * (1 + 0.1 * seed)) @ turn + 0.1 * seed


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)


# ---- The distance


def test_distance_of_two_gaussians_is_the_closed_form():
    mu1, mu2 = np.array([1.0, -2, 0]), np.array([0.5, 0, 3])
    s1, s2 = np.array([1.0, 4, 0.25]), np.array([9.0, 0.01, 0.25])
    expected = ((mu1 - mu2) ** 2).sum() + ((s1**0.5 - s2**0.5) ** 2).sum()
    assert frechet_distance(mu1, np.diag(s1), mu2, np.diag(s2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [40, 500])  # of 96 numbers: singular, and not
def test_distance_to_itself_is_nothing(n):
    mu, sigma = moments(gaussian(n, 96, 0))
    assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-11 * sigma.trace()


@pytest.mark.parametrize(
    "n1, n2, spread", [(500, 600, 1.0), (500, 600, 1e-3), (40, 600, 0.1), (600, 40, 0.1), (40, 50, 0.1)]
)
def test_distance_equals_scipys_square_root(n1, n2, spread):
    (mu1, sigma1), (mu2, sigma2) = moments(gaussian(n1, 96, 1, spread)), moments(gaussian(n2, 96, 2, spread))
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)


def test_what_is_no_covariance_is_clamped_and_said(capsys):
    mu, sigma = np.zeros(3), np.diag([1.0, 2.0, -0.5])
    assert math.isfinite(frechet_distance(mu, sigma, mu, np.eye(3)))
    assert "clamped eigenvalues down to -0.5" in capsys.readouterr().err
    frechet_distance(*moments(gaussian(40, 96, 0)), *moments(gaussian(40, 96, 1)))
    assert not capsys.readouterr().err


def test_distance_refuses_shapes_and_numbers():
    with pytest.raises(ValueError, match="needed: "):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), np.eye(3) * np.nan)


# ---- Statistics


def test_statistics_do_not_depend_on_batches_order_or_split():
    x = gaussian(1000, 32, 3) + 5
    mu, sigma = moments(x)
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(x))
    for batch_size in (1000, 64, 7):
        stats = FeatureStats(32)
        for batch in shuffled.split(batch_size):
            stats.update(batch)
        assert stats.count == 1000
        np.testing.assert_allclose(stats.mu, mu, rtol=0, atol=1e-9)
        np.testing.assert_allclose(stats.sigma, sigma, rtol=0, atol=1e-9)
    lonely = FeatureStats(32)
    lonely.update(shuffled[:1])
    with pytest.raises(ValueError, match="at least 2"):
        _ = lonely.sigma


class Given(torch.nn.Module):
    """Stands in for a network: the features are given, not made."""

    num_features, num_spatial = 16, 20


def made_features(n: int, seed: int) -> features.Features:
    rng = np.random.default_rng(seed)
    arrays = gaussian(n, 16, seed), rng.normal(size=(n, 10)), gaussian(n, 20, seed)
    return features.Features(*map(torch.from_numpy, arrays))


def score_made(path: Path) -> dict:
    """101 made images, each process its share in batches of 7, against 150; run by two processes as a script, too."""
    generated, real = made_features(101, 1), made_features(150, 0)
    rows = score.shard_range(101)
    starts = range(rows.start, rows.stop, 7)
    given = [tensor for tensor in generated if tensor is not None]
    batches = (features.Features(*(t[start : min(start + 7, rows.stop)] for t in given)) for start in starts)
    extractor = features.Extractor("inception", Given(), "made", torch.device("cpu"))
    pool, spatial = real.pool.numpy(), real.spatial.numpy()
    reference = Reference(*moments(pool), *moments(spatial), pool, extractor_sha256="made")
    result = score.score(batches, 101, extractor, reference)
    if result:
        path.write_text(json.dumps(result))
    return result


def test_scores_are_those_of_the_features(tmp_path):
    generated, real = made_features(101, 1), made_features(150, 0)
    result = score_made(tmp_path / "one.json")
    for name, x, y in (("fd_inception", generated.pool, real.pool), ("sfd_inception", generated.spatial, real.spatial)):
        (mu1, sigma1), (mu2, sigma2) = moments(x.numpy()), moments(y.numpy())
        root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
        assert result[name] == pytest.approx(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root), rel=1e-6)
    assert (result["precision"], result["recall"]) == metrics.precision_recall(generated.pool, real.pool)
    assert (result["inception_score"], result["inception_score_std"]) == metrics.inception_score(generated.logits)
    assert (result["kid"], result["kid_std"]) == metrics.kernel_distance(generated.pool, real.pool)


# ---- Inception score, precision and recall, KID


@pytest.mark.parametrize("n", [60, 120, 150, 7])
def test_inception_score_in_parts_and_a_rest(n):
    logits = np.random.default_rng(0).normal(size=(n, 12)) * 2
    scores = []
    for start in range(0, n, 60):  # as ADM's evaluator.py, which counts in 5,000
        p = np.exp(logits[start : start + 60])
        p /= p.sum(1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    mean, std = metrics.inception_score(torch.from_numpy(logits).float(), part_size=60)
    assert mean == pytest.approx(np.mean(scores), rel=1e-6) and std == pytest.approx(np.std(scores), abs=1e-6)


@pytest.mark.parametrize("rows", [500, 17])
def test_precision_and_recall_equal_brute_force(rows):
    generated, real = gaussian(120, 8, 1) + 100, gaussian(90, 8, 0) + 100  # far from zero, where float32 rounds

    def inside(points, centres):
        to_centres = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        radii = np.sort(to_centres, axis=1)[:, 3]  # the third neighbour; the nearest is the point itself
        return (np.linalg.norm(points[:, None] - centres[None], axis=-1) <= radii).any(1).mean()

    found = metrics.precision_recall(torch.from_numpy(generated), torch.from_numpy(real), rows=rows)
    assert found == pytest.approx((inside(generated, real), inside(real, generated)), abs=1e-6)
    assert 0.1 < found[0] < 1
    with pytest.raises(ValueError, match="more than 3"):
        metrics.precision_recall(torch.from_numpy(generated[:3]), torch.from_numpy(real))


def test_kernel_distance_is_the_unbiased_mmd():
    x, y = gaussian(60, 8, 1), gaussian(60, 8, 0)

    def kernel(a, b):
        return (a @ b.T / 8 + 1) ** 3

    off = ~np.eye(60, dtype=bool)
    expected = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    mean, std = metrics.kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subsets=3)
    assert mean == pytest.approx(expected, rel=1e-6) and std < 1e-9  # each subset is all of them


def test_precision_recall_and_kernel_distance_are_torch_fidelitys(rows=64):
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    generated, real = (torch.from_numpy(gaussian(n, 48, seed)).float() for n, seed in ((1100, 1), (1300, 0)))
    centred = [features - real.mean(0) for features in (generated, real)]
    theirs = calculate_precision_recall_part(*centred, neighborhood=3, batch_size=rows)
    assert metrics.precision_recall(generated, real, rows=rows) == theirs and 0.1 < min(theirs) < max(theirs) < 1
    theirs = kid_features_to_metric(
        generated.double(), real.double(), kid_subsets=3, kid_subset_size=1000, rng_seed=0, verbose=False
    )
    expected = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    assert metrics.kernel_distance(generated, real, subsets=3) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_kernel_distance_asks_apples_gpus_for_no_float64():
    class OnApplesGpu(torch.Tensor):
        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    x, y = torch.from_numpy(gaussian(20, 4, 1)), torch.from_numpy(gaussian(20, 4, 0))
    on_gpu = metrics.kernel_distance(x.as_subclass(OnApplesGpu), y.as_subclass(OnApplesGpu), subsets=3)
    assert on_gpu == metrics.kernel_distance(x, y, subsets=3)


# ---- References


def test_reference_survives_the_disk(tmp_path):
    mu, sigma = moments(gaussian(50, 8, 0))
    single = np.ones((5, 8), np.float32)
    before = Reference(mu, sigma, features=single, n=50, extractor="mnist", extractor_sha256="ab")
    write_reference(tmp_path / "r.npz", before)
    after = read_reference(tmp_path / "r.npz")
    for name in ("mu", "sigma", "features"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    assert (after.n, after.extractor, after.extractor_sha256) == (50, "mnist", "ab") and len(after.sha256) == 64


def test_statistics_are_taken_out_of_an_adm_file(tmp_path, capsys):
    mu, sigma, mu_s, sigma_s = np.arange(2048.0), np.eye(2048), np.arange(2023.0), np.eye(2023) * 2
    adm, out = tmp_path / "VIRTUAL.npz", tmp_path / "ref.npz"
    np.savez(adm, arr_0=np.zeros((4, 8, 8, 3), np.uint8), mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    fid.main(["ref", f"from={adm}", f"out={out}"])
    reference = read_reference(out)
    np.testing.assert_array_equal(reference.sigma_s, sigma_s)
    np.testing.assert_array_equal(reference.mu, mu)
    assert reference.extractor == "inception" and reference.features is None


# ---- The command line


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The same 40 pictures as a folder, a zip and an .npz, which is compressed or not."""
    root = tmp_path_factory.mktemp("pictures")
    pixels = noise(40, 28, seed=1).permute(0, 2, 3, 1).numpy()
    (root / "folder" / "sub").mkdir(parents=True)
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for i, image in enumerate(pixels):
            path = root / "folder" / ("sub" if i >= 20 else "") / f"{i:03d}.png"
            Image.fromarray(image).save(path)
            archive.write(path, path.relative_to(root / "folder"))
    np.savez(root / "images.npz", arr_0=pixels)
    np.savez_compressed(root / "compressed.npz", label=np.arange(40), arr_0=pixels)
    return root


def calc(*overrides: str) -> dict:
    out = next(o for o in overrides if o.startswith("out=")).removeprefix("out=")
    fid.main(["calc", *overrides])
    return json.loads((Path(out) / "metrics.json").read_text())


def test_folder_zip_and_npz_score_alike(pictures, digits, tmp_path, capsys):
    settings = [f"digits={digits}", "batch_size=16", "metrics=[fd,pr]"]
    results = [
        calc(f"images={pictures / name}", f"out={tmp_path / name}", *settings)
        for name in ("folder", "images.zip", "images.npz", "compressed.npz")
    ]
    assert "fd_mnist" in capsys.readouterr().out
    for result in results[1:]:
        assert result["fd_mnist"] == pytest.approx(results[0]["fd_mnist"], rel=1e-6)
        assert result["precision"] == results[0]["precision"]
    assert results[0]["n"] == 40 and results[0]["reference_n"] == 4500
    assert len(results[0]["extractor_sha256"]) == 64
    assert bool(results[0]["commit"]) == (ROOT / ".git").exists()


def test_the_next_batch_is_read_while_this_one_is_scored(pictures):
    images, reads = open_images(pictures / "folder"), threading.Semaphore(0)
    decode, everything = images._decode, np.load(pictures / "images.npz")["arr_0"].transpose(0, 3, 1, 2)
    images._decode = lambda i: reads.release() or decode(i)
    batches = images.batches(8, range(3, 40))
    made = [next(batches)]
    assert all(reads.acquire(timeout=30) for _ in range(1 + 8 + 8))  # the size of the first, this batch and the next
    assert not reads.acquire(timeout=0.1)  # and no more: two batches are in memory
    made += batches
    assert [len(batch) for batch in made] == [8, 8, 8, 8, 5] and np.array_equal(torch.cat(made), everything[3:])


def test_grey_images_are_repeated_and_said(tmp_path, digits, capsys):
    grey = noise(30, 28)[:, 0].numpy()
    np.savez(tmp_path / "grey.npz", arr_0=grey)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(grey):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:02d}.png")
    one = calc(f"images={tmp_path / 'grey.npz'}", f"digits={digits}", f"out={tmp_path / 'a'}")
    two = calc(f"images={tmp_path / 'folder'}", f"digits={digits}", f"out={tmp_path / 'b'}")
    said = capsys.readouterr().err
    assert said.count("grey images, repeated") == 2 and "too few for 64 features" in said
    assert one["fd_mnist"] == pytest.approx(two["fd_mnist"], rel=1e-9)


def test_a_folder_of_samples_is_scored_without_its_grid(pictures, digits, tmp_path):
    shutil.copytree(pictures / "folder", tmp_path / "drawn" / "images")
    Image.new("RGB", (60, 30)).save(tmp_path / "drawn" / "grid.png")
    settings = [f"digits={digits}", "metrics=[fd]"]
    refused = [f"images={tmp_path / 'drawn'}", f"out={tmp_path / 'out'}", *settings]
    with pytest.raises(UserError, match="grid.png is 60x30.*needed: one size, or crop="):
        calc(*refused)
    (tmp_path / "drawn" / gallery.MANIFEST).write_text("{}")
    plain = calc(f"images={pictures / 'folder'}", f"out={tmp_path / 'plain'}", *settings)
    assert calc(*refused)["fd_mnist"] == pytest.approx(plain["fd_mnist"], rel=1e-9)


def test_pictures_of_mixed_sizes_are_cropped_and_so_is_their_reference(tmp_path):
    for i, image in enumerate(noise(70, 64, seed=2).permute(0, 2, 3, 1).numpy()):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        Image.fromarray(image[: 64 - i % 5, : 64 - i % 7]).save(tmp_path / "mixed" / f"{i:02d}.png")
    mixed, crop = open_images(tmp_path / "mixed"), "crop=28"
    for i, image in enumerate(torch.cat([*mixed.batches(16, range(70), 28)]).numpy()):
        assert (image == center_crop(mixed.read(i), 28)).all()
    made = [f"images={tmp_path / 'mixed'}", "extractor=mnist", crop]
    fid.main(["ref", *made, f"out={tmp_path / 'ref.npz'}"])
    reference = read_reference(tmp_path / "ref.npz")
    assert (reference.height, reference.width) == (28, 28)
    scored = calc(*made, f"ref={tmp_path / 'ref.npz'}", "metrics=[fd]", f"out={tmp_path / 'out'}")
    assert scored["fd_mnist"] == pytest.approx(0, abs=1e-4) and scored["crop"] == 28


def test_a_run_of_another_size_than_the_reference_is_refused():
    run, mu = load.load_run(sample.SHIPPED / "mnist-tread-edm"), np.zeros(64)
    evaluate.check_run_size(run, Reference(mu, np.eye(64), height=28, width=28))
    with pytest.raises(UserError, match="images of 28x28 pixels, and a is of 64x64; needed: one size"):
        evaluate.check_run_size(run, Reference(mu, np.eye(64), height=64, width=64, source="a"))


def npz(path, **arrays):
    np.savez(path, **arrays)


def mixed_sizes(path):
    path.mkdir()
    for size in (28, 30):
        Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(path / f"{size}.png")


def alpha(path):
    path.mkdir()
    for name in "ab":
        Image.fromarray(np.zeros((28, 28, 4), np.uint8)).save(path / f"{name}.png")


def no_image(path):
    path.mkdir()
    (path / "a.png").write_text("hello")


GOOD = np.zeros((5, 28, 28, 3), np.uint8)
BAD_IMAGES = {
    "missing": (lambda path: None, "not there"),
    "empty folder": (lambda path: path.mkdir(), "no images"),
    "no image": (no_image, "a.png is no image"),
    "mixed sizes": (mixed_sizes, "30.png is 30x30, 28.png is 28x28"),
    "alpha": (alpha, "mode RGBA"),
    "one": (lambda path: npz(path, arr_0=GOOD[:1]), "at least 2"),
    "float": (lambda path: npz(path, arr_0=GOOD.astype(np.float32)), "arr_0 is float32.*uint8"),
    "layout": (lambda path: npz(path, arr_0=GOOD.transpose(0, 3, 1, 2)), r"\(5, 3, 28, 28\)"),
    "key": (lambda path: npz(path, images=GOOD), "no array arr_0"),
    "pickled": (lambda path: npz(path, arr_0=np.array([None, 1], object)), "pickled objects"),
    "no npz": (lambda path: path.write_bytes(b"PK\3\4 no more"), "damaged"),
    "truncated": (lambda path: npz(path, arr_0=GOOD) or path.write_bytes(path.read_bytes()[:5000]), "damaged"),
    "size": (lambda path: npz(path, arr_0=np.zeros((5, 32, 32, 3), np.uint8)), "32x32 pixels"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_get_one_line(case, tmp_path, digits):
    make, message = BAD_IMAGES[case]
    path = tmp_path / ("images" if case in ("empty folder", "no image", "mixed sizes", "alpha") else "images.npz")
    make(path)
    with pytest.raises(cli.USER_ERRORS, match=message) as error:
        fid.main(["calc", f"images={path}", f"digits={digits}", f"out={tmp_path / 'out'}"])
    assert "\n" not in cli.one_line(error.value) and not (tmp_path / "out").exists()


STATS = {"mu": np.zeros(64), "sigma": np.eye(64), "extractor": "mnist"}
BAD_REFERENCES = {
    "missing": (None, "no reference"),
    "no mu": ({"sigma": np.eye(64)}, "mu missing"),
    "shape": ({**STATS, "sigma": np.eye(63)}, r"sigma \(63, 63\)"),
    "nan": ({**STATS, "mu": np.full(64, np.nan)}, "not finite"),
    "other extractor": ({**STATS, "extractor": "inception"}, "made with inception"),
    "other weights": ({**STATS, "extractor_sha256": "beef"}, "beef"),
    "features": ({**STATS, "mu": np.zeros(8), "sigma": np.eye(8)}, "has 8 features; mnist gives 64"),
    "pickled": ({**STATS, "mu": np.array([None], object)}, "pickled objects"),
    "text": ({**STATS, "mu": np.array(["a"] * 64)}, r"mu is <U1 \(64,\); needed: numbers"),
    "two extractors": ({**STATS, "extractor": ["mnist", "x"]}, "needed: a text"),
    "several n": ({**STATS, "n": [1, 2]}, "needed: a number"),
    "a single feature": ({**STATS, "features": 1.0}, r"features \(\) of float64; needed: finite"),
    "width of features": ({**STATS, "features": np.zeros((9, 8))}, r"needed: finite numbers \(M, 64\)"),
    "order of bytes": ({**STATS, "features": np.zeros((9, 64), ">f4")}, "features is >f4"),
    "spatial features": ({**STATS, "mu_s": np.zeros(5), "sigma_s": np.eye(5)}, "mu_s has 5 numbers; mnist gives None"),
    "size": ({**STATS, "height": 64, "width": 64}, "of 28x28 pixels, and .*ref.npz is of 64x64; needed: one size"),
}


@pytest.mark.parametrize("case", BAD_REFERENCES)
def test_bad_references_get_one_line(case, tmp_path, pictures):
    arrays, message = BAD_REFERENCES[case]
    if arrays is not None:
        np.savez(tmp_path / "ref.npz", **arrays)
    images, reference = pictures / "images.npz", tmp_path / "ref.npz"
    with pytest.raises(cli.USER_ERRORS, match=message) as error:
        fid.main(["calc", f"images={images}", f"ref={reference}", f"out={tmp_path / 'out'}"])
    assert "\n" not in cli.one_line(error.value)


BAD_CALLS = {
    "nothing": ([], "ckpt=RUN or images="),
    "both": (["ckpt=a", "images=b"], "one of the two"),
    "generation keys": (["images=a", "seeds=0-9", "scale=2"], "scale, seeds: only with ckpt="),
    "unknown key": (["images=a", "refs=b"], "refs"),
    "unknown extractor": (["images=a", "extractor=vgg"], "extractor=vgg"),
    "unknown metric": (["images=a", "metrics=[fd,lpips]"], "lpips"),
    "impossible metric": (["images=a", "metrics=[sfid]"], "sfid needs a reference with mu_s"),
    "no checkpoint": (["ckpt=nowhere"], "nowhere"),
    "crop": (["ckpt=nowhere", "crop=28"], "crop=28 is for images="),
    "no pattern": (["ckpt=nowhere/step_*"], "matches nothing"),
    "unknown compile": (["ckpt=assets/mnist-tread-edm", "compile=yes"], "auto, blocks or off"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_get_one_line(case, digits):
    overrides, message = BAD_CALLS[case]
    with pytest.raises(cli.USER_ERRORS) as error:
        fid.main(["calc", f"digits={digits}", *overrides])
    assert message in cli.one_line(error.value) and "\n" not in cli.one_line(error.value)


def test_the_command_prints_one_line_and_leaves_with_2(tmp_path):
    done = started.run([sys.executable, "fid.py", "ref", "images=nowhere"])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


# ---- A run: generated, scored, cut short


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    """A run folder with two checkpoints of a tiny model of digits, hardly trained."""
    root = tmp_path_factory.mktemp("runs")
    overrides = [
        "run_name=tiny", f"results_dir={root}", f"data.path={digits}", "sampler.num_steps=2", "preview.every=0",
        "model.depth=6", "model.hidden_size=32", "model.num_heads=2",
        "train.max_steps=2", "train.global_batch_size=8", "train.warmup_steps=0", "train.decay_steps=0",
        "train.compile=off", "train.precision=fp32", "train.save_every=1", "train.val_every=0", "train.keep_last=2",
    ]  # fmt: skip
    done = started.run([sys.executable, "train.py", *overrides])
    assert done.returncode == 0, done.stderr[-2000:]
    return root / "tiny"


def seeds_generated(monkeypatch, stop_after: int = 1000) -> list[int]:
    """The seeds that `generate` is asked to make from now on; it breaks off after so many batches."""
    asked, generate = [], evaluate.generate

    def watched(run, guidance, seeds, labels, batch_size, *, steps=None):
        batches = generate(run, guidance, seeds, labels, batch_size, steps=steps)
        for i, batch in enumerate(batches):
            if i == stop_after:
                raise KeyboardInterrupt
            asked.extend(seeds[i * batch_size : (i + 1) * batch_size])
            yield batch

    monkeypatch.setattr(evaluate, "generate", watched)
    return asked


def test_scoring_cut_short_goes_on_where_it_was(trained, digits, tmp_path, monkeypatch):
    settings = [f"ckpt={trained}", f"digits={digits}", "seeds=0-69", "batch_size=16", "guidance=cfg"]
    with monkeypatch.context() as patch:
        all_at_once = seeds_generated(patch)
        whole = calc(*settings, f"out={tmp_path / 'whole'}")
    with monkeypatch.context() as patch:
        first = seeds_generated(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            calc(*settings, f"out={tmp_path / 'cut'}")
    with monkeypatch.context() as patch:
        second = seeds_generated(patch)
        resumed = calc(*settings, f"out={tmp_path / 'cut'}")
    assert all_at_once == first + second == list(range(70)) and len(first) == 32
    times = {"seconds", "images_per_s"}
    assert {k: v for k, v in resumed.items() if k not in times} == {k: v for k, v in whole.items() if k not in times}
    assert not (tmp_path / "cut" / "parts").exists()


def test_killed_and_started_again(trained, digits, tmp_path, monkeypatch):
    """SIGKILL at some batch of 160 images: finished batches stay untouched and the numbers are those of one go."""
    out = tmp_path / "killed"
    settings = [f"ckpt={trained}", f"digits={digits}", "seeds=0-159", "batch_size=10", "steps=4", "metrics=[fd]"]
    command = [sys.executable, "fid.py", "calc", *settings, f"out={out}"]
    process = started.Process(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (finished := list(out.glob("parts/*/*.safetensors"))) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*/*.safetensors")}
    assert 0 < len(finished) < 16
    read, read_part = {}, evaluate.read_part

    def watched(path, device):
        read[path.name] = path.stat().st_mtime_ns
        return read_part(path, device)

    monkeypatch.setattr(evaluate, "read_part", watched)
    again = calc(*settings, f"out={out}")
    assert read == finished
    once = calc(*settings, f"out={tmp_path / 'once'}")
    assert again["fd_mnist"] == pytest.approx(once["fd_mnist"], rel=1e-9)
    assert again["class_accuracy"] == once["class_accuracy"]


def test_each_setting_of_a_sampler_has_a_folder_of_its_own(trained, digits):
    before = set(trained.glob("eval/*"))
    for sampler in (["sampler=edm"], ["sampler=edm", "sampler.rho=5"], ["sampler=edm"], ["sampler=rf"]):
        settings = [f"digits={digits}", "seeds=0-11", "steps=2", "metrics=[fd]", "precision=fp32", *sampler]
        fid.main(["calc", f"ckpt={trained}", *settings])
    made = {path.name for path in set(trained.glob("eval/*")) - before}
    assert len(made) == 3 and all(name.startswith("0000002-fd_mnist-fd-seeds-0-11_steps-2_sampler-") for name in made)


def test_metrics_json_says_what_the_number_depends_on(trained, digits):
    settings = ["seeds=5-40", "guidance=sparse", "steps=3", "labels=balanced"]
    fid.main(["calc", f"ckpt={trained}", f"digits={digits}", *settings, "precision=fp32"])
    (path,) = trained.glob("eval/*gamma*/metrics.json")
    given = "scale-1.5_gamma_strong-0.2_gamma_weak-0.7_weak_label-same_seeds-5-40_labels-balanced_steps-3"
    assert path.parent.name == f"0000002-fd_mnist-{given}"
    assert settings_name(parse(fid.Calc, cli.load_config("fid", [f"ckpt={trained}", *settings])), ["ckpt"]) == given
    result = json.loads(path.read_text(), parse_constant=pytest.fail)  # plain JSON: no Infinity
    expected = {
        "n": 36, "seeds": "5-40", "labels": "balanced", "weights": "ema", "step": 2, "weak_label": "same",
        "codec": {"_target_": "autoencoder.PixelCodec"}, "rounding": "nearest",
        "extractor": "mnist", "reference_n": 4500, "processes": 1,
    }  # fmt: skip
    assert result | expected == result
    assert result["gamma_strong"] < result["gamma_weak"] and result["sampler"]["num_steps"] == 3
    assert result["network_calls"] == 2 * 5  # Heun's two a step but the last, each with a weak branch
    assert result["gmacs_per_image"] > 0 and result["seconds"] > 0 and 0 <= result["class_accuracy"] <= 1
    assert len(result["checkpoint_sha256"]) == len(result["extractor_sha256"]) == 64
    assert result["config"]["model"]["depth"] == 6


def test_auto_compiles_in_calls_that_are_long_enough_and_says_so(trained, digits, tmp_path, monkeypatch):
    run, long = sample.load_run(trained), ["steps=3", "guidance=cfg"]

    def chosen(*overrides: str) -> str:
        return fid.compile_for(run, parse(fid.Calc, cli.load_config("fid", [f"ckpt={trained}", *overrides])))

    assert chosen() == chosen("compile=off", "seeds=0-9999999") == "off" and chosen("compile=blocks") == "blocks"
    calls = 3 * 2 * 2  # Heun's two a step, each with a weak branch
    weights = sum(p.numel() for p in run.model.parameters())
    monkeypatch.setattr(compiling, "WORTH_COMPILING", 50 * calls * run.model.macs() / weights**0.5)
    assert [chosen(*long, f"seeds=0-{n - 1}") for n in (49, 50)] == ["off", "blocks"]
    assert chosen("steps=3", "seeds=0-49") == "off"
    run.device = torch.device("cuda")
    assert chosen(*long, "seeds=0-49") == "off"

    monkeypatch.setattr(load, "decide_compile", lambda wanted, device: (wanted, ""))
    monkeypatch.setattr(load, "compile_blocks", lambda *model, dynamic: None)
    before = set(trained.glob("eval/*"))
    fid.main(["calc", f"ckpt={trained}", f"digits={digits}", *long, "seeds=0-49", "metrics=[fd]"])
    (made,) = set(trained.glob("eval/*")) - before
    assert "-compiled-" in made.name and json.loads((made / "metrics.json").read_text())["compile"] == "blocks"


def test_rows_of_one_call_never_share_a_folder(trained, pictures, digits, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other" / trained.name)  # of the same name, at the same step
    weights = other / "checkpoints" / "step_0000002" / "ema.safetensors"
    tensors = {key: value * 1.01 for key, value in load_file(weights).items()}
    save_file(tensors, weights)
    manifest = json.loads((weights.parent / "manifest.json").read_text())
    manifest["files"][weights.name] = {"bytes": weights.stat().st_size, "sha256": sha256_of(weights)}
    (weights.parent / "manifest.json").write_text(json.dumps(manifest))
    settings = [f"digits={digits}", "seeds=0-3", "steps=1", "metrics=[fd]"]
    fid.main(["calc", f"ckpt={trained},{other}", f"out={tmp_path / 'runs'}", *settings])
    assert len(list((tmp_path / "runs").glob("*/metrics.json"))) == 2

    for i in "ab":
        (tmp_path / i).mkdir()
        digits_of = f"images={pictures / ('images.npz' if i == 'a' else 'folder/sub')}"
        fid.main(["ref", digits_of, "extractor=mnist", f"out={tmp_path / i / 'ref.npz'}", "features=0"])
    references = f"ref={tmp_path / 'a' / 'ref.npz'},{tmp_path / 'b' / 'ref.npz'}"
    shutil.copy(pictures / "images.npz", tmp_path)
    fid.main(["calc", f"images={tmp_path / 'images.npz'}", references])
    found = [json.loads(p.read_text())["reference"] for p in tmp_path.glob("images.npz-*/metrics.json")]
    assert {Path(reference).parent.name for reference in found} == {"a", "b"}


def test_several_rows_make_a_table_and_a_plot(trained, digits, tmp_path, capsys):
    where = [f"ckpt={trained}/checkpoints/step_*", f"digits={digits}", f"out={tmp_path}"]
    fid.main(["calc", *where, "weights=ema,raw", "guidance=none,cfg", "seeds=0-19", "steps=1", "metrics=[fd]"])
    header, *rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert header.startswith("run,step,weights,guidance,n,fd_mnist,class_accuracy") and len(rows) == 8
    settings = itertools.product(["tiny"], ["1", "2"], ["ema", "raw"], ["default", "scale-1.5"])
    assert {tuple(row.split(",")[:4]) for row in rows} == set(settings)
    assert len(list(tmp_path.glob("*/metrics.json"))) == 8
    assert Image.open(tmp_path / "scores.png").size[0] > 400
    printed = capsys.readouterr().out.splitlines()
    printed = printed[printed.index("run tiny, n 20") : printed.index(table.ARROWS)]
    assert max(map(len, printed)) <= 80
    heads = {head for line in printed if line.lstrip().startswith("step") for head in re.split("  +", line.strip())}
    assert {"step", "weights", "guidance", "fd_mnist ↓", "class_accuracy ↑", "network_calls"} <= heads
    assert all(sum(f" {key} " in line for line in printed) % 4 == 0 for key in ("default", "scale-1.5", "ema", "raw"))


def test_a_finished_run_is_not_scored_again(trained, digits, tmp_path, monkeypatch, capsys):
    settings = [f"ckpt={trained}", f"digits={digits}", "seeds=0-9", "steps=1", f"out={tmp_path / 'scores'}"]
    code = ["a1"]
    monkeypatch.setattr(score, "commit", lambda: code[0])
    first, asked = calc(*settings, "metrics=[fd]"), seeds_generated(monkeypatch)
    assert calc(*settings, "metrics=[fd]") == first and not asked
    assert "was scored before" in capsys.readouterr().out
    for change in (["metrics=[fd,kid]"], ["steps=2"], ["seeds=1-10"], ["weights=raw"], []):  # all in one folder
        done = len(asked)
        calc(*settings, *change)
        assert len(asked) == done + 10, change
    for code[0] in ("b2", "b2-dirty", "b2-dirty"):  # other code, and code that nobody can know
        done = len(asked)
        calc(*settings)
        assert len(asked) == done + 10


def test_two_processes_score_as_one(trained, digits, tmp_path):
    """Given features, and a run whose images the two share; each settings' numbers are those of one process."""
    settings = ["calc", f"ckpt={trained}", f"digits={digits}", "seeds=0-30", "batch_size=4"]
    (tmp_path / "two.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nimport fid\nfrom system import cli, files\n"
        "from tests.test_fid import score_made\n"
        f"log, sha256_of = open({str(tmp_path / 'hashed')!r} + os.environ['RANK'], 'w'), files.sha256_of\n"
        "files.sha256_of = lambda path: print(path.name, file=log, flush=True) or sha256_of(path)\n"
        f"with cli.user_errors():\n    score_made(Path({str(tmp_path / 'made2.json')!r}))\n"
        f"    fid.main({[*settings, f'out={tmp_path}/2']!r})\n"
    )
    done = started.run([sys.executable, tmp_path / "two.py"], processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = ((tmp_path / f"hashed{rank}").read_text().split() for rank in "01")
    assert not second and len(first) == len(set(first)) and {"config.yaml", "ema.safetensors"} <= set(first)
    one, two = score_made(tmp_path / "made1.json"), json.loads((tmp_path / "made2.json").read_text())
    assert two.keys() == one.keys() and two == pytest.approx(one, rel=1e-9, abs=1e-9)

    fid.main([*settings, f"out={tmp_path / '1'}"])
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "12")
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("fd_mnist", "precision", "recall", "class_accuracy", "network_calls"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)


# ---- Inception, with made weights: what torch-fidelity's own command says


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    for name, seed in (("a", 1), ("b", 2)):
        (root / name).mkdir()
        pictures = noise(8, 2, seed=seed).permute(0, 2, 3, 1).numpy()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture // seed).resize((64, 64)).save(root / name / f"{i:02d}.png")
    return root


def test_scores_equal_torch_fidelitys_command(two_folders, tmp_path):
    weights, sha256 = write_made_weights(tmp_path)
    theirs = subprocess.run(
        [sys.executable, "-m", "torch_fidelity.fidelity", "--cpu", "--json", "--silent", "--isc", "--fid",
         "--isc-splits", "1", "--no-samples-shuffle", "--no-cache", "--feature-extractor-weights-path", str(weights),
         "--input1", str(two_folders / "a"), "--input2", str(two_folders / "b")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert theirs.returncode == 0, theirs.stderr[-2000:]
    theirs = json.loads(theirs.stdout)
    made = [f"extractor_weights={weights}", f"extractor_sha256={sha256}", "extractor=inception", "batch_size=4"]
    fid.main(["ref", f"images={two_folders / 'b'}", f"out={tmp_path / 'ref.npz'}", *made])
    scored = [f"images={two_folders / 'a'}", f"ref={tmp_path / 'ref.npz'}", f"out={tmp_path / 'out'}"]
    ours = calc(*scored, "metrics=[fd,is]", *made)
    assert ours["fd_inception"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert ours["inception_score"] > 1.01
    made_reference = read_reference(tmp_path / "ref.npz")
    assert made_reference.mu_s.shape == (2023,) and made_reference.features.shape == (8, 2048)

    adm = {key: getattr(made_reference, key) for key in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "adm.npz", arr_0=noise(3, 16).permute(0, 2, 3, 1).numpy(), **adm)
    fid.main(["ref", f"from={tmp_path / 'adm.npz'}", "features=2", f"out={tmp_path / 'with.npz'}", *made])
    assert read_reference(tmp_path / "with.npz").features.shape == (2, 2048)
    assert not any(key.startswith("fid") for key in ours)  # these weights are not the true ones


def test_fid_is_the_name_of_one_thing_only():
    def named(name: str, sha256: str, n: int) -> str:
        return score.distance_name(features.Extractor(name, None, sha256, None), n)

    true = score.inception.STATE_DICT
    assert [named("inception", true, n) for n in (50_000, 5_000, 1234)] == ["fid50k", "fid5k", "fid1234"]
    assert named("inception", "other", 50_000) == "fd_inception" and named("mnist", "any", 50_000) == "fd_mnist"
