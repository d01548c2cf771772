"""Scores with known answers, as a Markdown table.

    python scripts/sanity_scores.py
    python scripts/sanity_scores.py extractor=fashion
    python scripts/sanity_scores.py ckpt=runs/mnist-tread-XS4-edm guidance=cfg scale=2.0

Real images against other real images, noise and, given keys of `fid.py calc`, the samples of a run.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fid  # noqa: E402
import sample  # noqa: E402
from evaluation.features import CLASSIFIERS, real_images  # noqa: E402
from evaluation.metrics import FeatureStats  # noqa: E402
from evaluation.reference import MAX_FEATURES, Reference, reference_from  # noqa: E402
from randomness import seeded_generator  # noqa: E402
from system import UserError, cli  # noqa: E402
from system.launchers import own_process  # noqa: E402


def main(overrides: list[str]) -> None:
    config = cli.load_config("fid", ["metrics=[fd,pr]", *overrides])
    if config.extractor not in CLASSIFIERS:
        raise UserError(f"extractor={config.extractor}; needed: {' or '.join(CLASSIFIERS)}")
    extractor, reference = fid.extractor_and_reference(config)
    path = config.digits if config.extractor == "mnist" else config.fashion
    train, train_labels = real_images(config.extractor, "train", path)
    unseen, unseen_labels = real_images(config.extractor, "val", path)
    train, train_labels = train[: 2 * MAX_FEATURES], train_labels[: 2 * MAX_FEATURES]
    columns = ("n", f"fd_{config.extractor}", "precision", "recall", "class_accuracy")

    def show(name: str, scores: dict) -> None:
        cells = [scores.get(column, "") for column in columns]
        cells = [f"{cell:.3f}" if isinstance(cell, float) else f"{cell}" for cell in cells]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    def score(name: str, images: torch.Tensor, labels: torch.Tensor | None, against: Reference) -> None:
        batches = map(extractor, images.split(250))
        scores = fid.score(batches, len(images), extractor, against, labels=labels, metrics=["fd", "pr"])
        show(name, {"n": len(images), **scores})

    print(f"| images | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    half = torch.cat([extractor(part).pool for part in train[0::2].split(250)])
    stats = FeatureStats(extractor.num_features)
    stats.update(half)
    half_reference = reference_from(stats, None, half, extractor, "half")
    score(f"one half of {len(train)} images, against the other", train[1::2], train_labels[1::2], half_reference)
    score(f"{len(unseen)} images unseen by the classifier", unseen, unseen_labels, reference)
    if config.ckpt is not None:
        run = sample.load_run(config.ckpt, config.weights, ema_width=config.ema_width, precision=config.precision)
        show(f"samples of {run.folder.name}", fid.evaluate(run, config, extractor, reference))
    noise = torch.randint(0, 256, (1000, 3, 28, 28), generator=seeded_generator("sanity noise"), dtype=torch.uint8)
    score("noise", noise, None, reference)


if __name__ == "__main__":
    with cli.user_errors():
        own_process()
        main(sys.argv[1:])
