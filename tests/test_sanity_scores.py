"""Scores with known answers: `python -m tests.test_sanity_scores [extractor=fashion]` prints them for docs/scoring.md.

Real images against other real images, noise and, given keys of `fid.py calc` (ckpt=, guidance=), the samples of a run.
"""

from collections.abc import Iterator

import torch

import fid
from evaluation.features import CLASSIFIERS, real_images
from evaluation.metrics import FeatureStats
from evaluation.reference import MAX_FEATURES, Reference, reference_from
from randomness import seeded_generator
from scripts.plot import markdown
from system import UserError, cli
from system.settings import parse


class Scores(fid.Calc):
    """As of `fid.py calc`, with neither ckpt= nor images= needed."""

    def __post_init__(self):
        pass


def scores(overrides: list[str]) -> Iterator[tuple[str, dict]]:
    """(what was scored, its scores)"""
    config = parse(Scores, cli.load_config("fid", ["metrics=[fd,pr]", *overrides]))
    if config.extractor not in CLASSIFIERS:
        raise UserError(f"extractor={config.extractor}; needed: {' or '.join(CLASSIFIERS)}")
    extractor, reference = fid.extractor_and_reference(config)
    path = config.digits if config.extractor == "mnist" else config.fashion
    train, train_labels = (half[: 2 * MAX_FEATURES] for half in real_images(config.extractor, "train", path))
    unseen, unseen_labels = real_images(config.extractor, "val", path)

    def score(images: torch.Tensor, labels: torch.Tensor | None, against: Reference) -> dict:
        batches = map(extractor, images.split(250))
        found = fid.score(batches, len(images), extractor, against, labels=labels, metrics=["fd", "pr"])
        return {"n": len(images), **found}

    half = torch.cat([extractor(part).pool for part in train[0::2].split(250)])
    stats = FeatureStats(extractor.num_features)
    stats.update(half)
    against = reference_from(stats, None, half, extractor, "half")
    yield f"one half of {len(train)} images, against the other", score(train[1::2], train_labels[1::2], against)
    yield f"{len(unseen)} images unseen by the classifier", score(unseen, unseen_labels, reference)
    if config.ckpt is not None:
        run = fid.load_scored(config)
        yield f"samples of {run.folder.name}", fid.evaluate(run, config, extractor, reference)
    noise = torch.randint(0, 256, (1000, 3, 28, 28), generator=seeded_generator("sanity noise"), dtype=torch.uint8)
    yield "noise", score(noise, None, reference)


def test_real_digits_score_well_and_noise_badly(digits):
    *real, (_, noise) = scores([f"digits={digits}"])
    assert len(real) == 2
    for _, found in real:
        assert found["fd_mnist"] < 2 and found["precision"] > 0.7 and found["recall"] > 0.7
    assert noise["fd_mnist"] > 200 and noise["precision"] < 0.05


def main(overrides: list[str]) -> None:
    found = dict(scores(overrides))
    distance = next(name for name in found["noise"] if name.startswith("fd_"))
    columns = ("n", distance, "precision", "recall", "class_accuracy")
    text = lambda value: f"{value:.3f}" if isinstance(value, float) else value
    rows = [[what, *(text(row.get(column, "")) for column in columns)] for what, row in found.items()]
    print(markdown(("images", *columns), rows), end="")


if __name__ == "__main__":
    cli.command(main, __doc__)
