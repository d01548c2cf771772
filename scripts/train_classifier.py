"""Trains the classifiers of `fd_mnist`, `fd_fashion` and `class_accuracy`, and the teachers of alignment=repa.

    python scripts/train_classifier.py                  4,500 digits, 20 epochs, about 40 s on two cores
    python scripts/train_classifier.py data=fashion     60,000 pictures, 8 epochs, about 4 min on one core
    python scripts/train_classifier.py teacher=true     another seed, on every second picture

Prints the accuracy on the unseen pictures of `val` and writes assets/<data>_classifier.safetensors, or _teacher.
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoints.config import Data
from data import prepare
from evaluation.features import CLASSIFIERS, Classifier, real_images
from randomness import seeded_generator, uniform
from scripts.add_features import TEACHERS
from system import UserError, cli
from system.settings import convert, parse
from system.tensors import write_safetensors

EPOCHS = {"mnist": 20, "fashion": 8}
AUGMENTATION = {"mnist": 1.0, "fashion": 0.4}  # clothes hang straight
BATCH_SIZE, MAX_LR, WEIGHT_DECAY, LABEL_SMOOTHING = 100, 3e-3, 0.05, 0.1


def augment(images: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """uint8 (B, 1, 28, 28), rotated by up to 0.2 rad, stretched by 12 %, sheared by 0.15, shifted by 2.8 pixels.

    strength: a factor of all of them.
    """
    angle, stretch_x, stretch_y, shear, shift_x, shift_y = (
        strength * reach * (2 * uniform((len(images),), generator) - 1) for reach in (0.2, 0.12, 0.12, 0.15, 0.2, 0.2)
    )
    row_x = torch.stack([(1 + stretch_x) * angle.cos(), shear - (1 + stretch_x) * angle.sin(), shift_x], 1)
    row_y = torch.stack([(1 + stretch_y) * angle.sin(), (1 + stretch_y) * angle.cos(), shift_y], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def train(name: str, images: torch.Tensor, labels: torch.Tensor, role: str = "classifier") -> Classifier:
    """uint8 (N, 3, 28, 28) and int64 (N,) -> the classifier, whose seed is its role."""
    generator = seeded_generator(f"{name} {role}")
    net = Classifier()
    for layer in net.modules():  # PyTorch's default, uniform in +-1/sqrt(fan in), drawn from our generator
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            for weights in layer.parameters(recurse=False):
                weights.data = 1 / math.sqrt(layer.weight[0].numel()) * (2 * uniform(weights.shape, generator) - 1)
    fast = name == "fashion"  # 2.6 times, with bf16 in hardware; the digits' shipped weights were made without
    net = net.to(memory_format=torch.channels_last) if fast else net
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=WEIGHT_DECAY)
    steps = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LR, total_steps=EPOCHS[name] * steps)
    for _ in range(EPOCHS[name]):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: steps * BATCH_SIZE].view(steps, BATCH_SIZE):
            shown = augment(images[batch, :1], AUGMENTATION[name], generator).expand(-1, 3, -1, -1)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                logits = net(shown).logits
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels[batch], label_smoothing=LABEL_SMOOTHING).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def main(overrides: list[str]) -> None:
    config, started = cli.load_config("train_classifier", overrides), time.time()
    data, teacher = parse(Data, config["data"], "data"), convert(config["teacher"], bool, "teacher")
    if data.name not in CLASSIFIERS:
        raise UserError(f"data={data.name}; needed: {' or '.join(CLASSIFIERS)}")
    prepare(data.name, data.path, data.source)
    seen = (part[:: 2 if teacher else 1] for part in real_images(data.name, "train", data.path))
    net = train(data.name, *seen, "teacher" if teacher else "classifier")
    images, labels = real_images(data.name, "val", data.path)
    with torch.no_grad():
        right = torch.cat([net(part).logits.argmax(1) for part in images.split(500)]) == labels
    path = (TEACHERS if teacher else CLASSIFIERS)[data.name]
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, net.state_dict())
    seconds = time.time() - started
    print(f"{right.float().mean():.4f} of {len(labels)} unseen pictures, {seconds:.0f} s: {path.name}")


if __name__ == "__main__":
    cli.command(main, __doc__)
