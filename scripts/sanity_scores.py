"""Scores with known answers, as a Markdown table.

    python scripts/sanity_scores.py
    python scripts/sanity_scores.py ckpt=runs/mnist-tread-XS4-edm guidance=cfg scale=2.0

Real digits against other real digits, noise and, given keys of `fid.py calc`, the samples of a run.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fid  # noqa: E402
import sample  # noqa: E402
from evaluation.features import digits, load_extractor  # noqa: E402
from evaluation.metrics import FeatureStats  # noqa: E402
from evaluation.reference import Reference, digits_reference, reference_from  # noqa: E402
from randomness import seeded_generator  # noqa: E402
from system import cli  # noqa: E402
from system.launchers import own_process

COLUMNS = ("n", "fd_mnist", "precision", "recall", "class_accuracy")


def main(overrides: list[str]) -> None:
    extractor = load_extractor("mnist")
    train, train_labels = digits("train")
    unseen, unseen_labels = digits("val")
    reference = digits_reference(extractor)

    def show(name: str, scores: dict) -> None:
        cells = [scores.get(column, "") for column in COLUMNS]
        cells = [f"{cell:.3f}" if isinstance(cell, float) else f"{cell}" for cell in cells]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    def score(name: str, images: torch.Tensor, labels: torch.Tensor | None, against: Reference) -> None:
        batches = map(extractor, images.split(250))
        scores = fid.score(batches, len(images), extractor, against, labels=labels, metrics=["fd", "pr"])
        show(name, {"n": len(images), **scores})

    print(f"| images | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    half = extractor(train[0::2]).pool
    stats = FeatureStats(extractor.num_features)
    stats.update(half)
    half_reference = reference_from(stats, None, half, extractor, "half")
    score("one half of the digits, against the other", train[1::2], train_labels[1::2], half_reference)
    score("500 digits unseen by the classifier", unseen, unseen_labels, reference)
    if overrides:
        config = cli.load_config("fid", ["metrics=[fd,pr]", *overrides])
        run = sample.load_run(config.ckpt, config.weights, ema_width=config.ema_width, precision=config.precision)
        show(f"samples of {run.folder.name}", fid.evaluate(run, config, extractor, reference))
    noise = torch.randint(0, 256, (1000, 3, 28, 28), generator=seeded_generator("sanity noise"), dtype=torch.uint8)
    score("noise", noise, None, reference)


if __name__ == "__main__":
    with cli.user_errors():
        own_process()
        main(sys.argv[1:])
