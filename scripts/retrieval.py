"""Retrieval: is the picture that a run makes of a caption nearest to that caption's own picture, of a whole catalogue?

    python scripts/retrieval.py ckpt=runs/emoji-dit-XS4-rf
    python scripts/retrieval.py ckpt=runs/emoji-dit-XS4-rf guidance=cfg scale=1.3,2.0      one row each

For the emoji (data=emoji), whose captions fix their pictures. A picture is retrieved where no other of the catalogue,
held-out ones included, is nearer to the generated one, by squared differences of their pixels; where fewer than five
are, it is among the first five. Three parts are scored: captions that were trained on, and those that data/emoji.py
holds out by tone and by pair. Beside them stand two scores without a network: chance, and the picture of the nearest
other caption that was seen. Keys: configs/retrieval.yaml. Each row writes a metrics.json and held_out.png, where the
generated pictures of some held-out captions stand on the left of the real ones; all rows write retrieval.md.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conditions
import sample
from checkpoints import gallery
from checkpoints.config import Count, Positive, Weights
from checkpoints.generate import count_calls, generate
from checkpoints.load import Run, load_run
from checkpoints.naming import settings_name
from conditions import Text
from data import emoji
from data.latents import spread_evenly
from evaluation.score import write_metrics
from guidance import Guidance
from scripts.plot import markdown
from system import UserError, cli
from system.files import write_text_atomic
from system.settings import parse

PARTS = {"seen": "seen captions", "tone": "held-out tones", "pair": "held-out pairs"}
FIRST = (1, 5)
BATCH = 64  # pictures whose distances are computed at once
SHOWN = 24  # held-out captions in held_out.png


@dataclass(frozen=True, kw_only=True)
class Retrieval(Guidance):
    """The keys of configs/retrieval.yaml."""

    ckpt: str
    catalogue: str = "datasets/emoji"
    weights: Weights = "ema"
    seen: Positive = 300
    seed: Count = 0
    steps: Positive | None = None
    batch_size: Positive = 64
    precision: Literal["fp32", "bf16"] = "fp32"
    out: str | None = None


class Catalogue(NamedTuple):
    pixels: torch.Tensor  # (N, D) float64, whole numbers 0..255: their sums of squares are exact
    texts: Text  # (N, T, D_text)
    parts: list[str]  # of PARTS
    sequences: list[str]


def main(argv: Sequence[str]) -> None:
    rows = [parse(Retrieval, cli.load_config("retrieval", row)) for row in cli.combinations(argv)]
    results = [score_row(settings, alone=len(rows) == 1) for settings in rows]
    folder = Path(rows[0].out) if rows[0].out else results[0][1].parent
    table = table_of([result for result, _ in results])
    write_text_atomic(folder / "retrieval.md", table)
    print(f"{table}{folder / 'retrieval.md'}")


def score_row(settings: Retrieval, alone: bool) -> tuple[dict, Path]:
    """Scores a run and writes metrics.json and held_out.png -> the scores and the folder."""
    started, names = time.time(), emoji.names()
    run = load_run(settings.ckpt, settings.weights, precision=settings.precision)
    catalogue = read_catalogue(run, settings.catalogue)
    asked = chosen(catalogue.parts, settings.seen)
    parent = Path(settings.out) if settings.out else run.place("retrieval")
    seeds = range(settings.seed, settings.seed + len(asked))
    texts = conditions.rows(catalogue.texts, asked)
    images = generate(run, settings.alone, seeds, texts, settings.batch_size, steps=settings.steps)
    made = torch.cat([batch.cpu() for batch in images])  # (M, 3, H, W) uint8
    calls, macs = count_calls(run, settings.alone, settings.steps)
    result = {
        **scores(catalogue, asked, ranks(made.flatten(1).double(), catalogue.pixels, asked)),
        "seeds": f"{seeds[0]}-{seeds[-1]}", **asdict(settings.alone),
        "sampler": run.settings.sampler | ({"num_steps": settings.steps} if settings.steps else {}),
        "step": run.step, "weights": run.weights, "dtype": run.precision, "network_calls": calls,
        "gmacs_per_image": macs / 1e9, "checkpoint": str(run.checkpoint), "checkpoint_sha256": run.sha256,
        "text_sha256": run.settings.data.text_sha256, "seconds": round(time.time() - started, 3),
    }  # fmt: skip
    name = f"{run.step:07d}-{settings_name(settings, ('ckpt', 'catalogue', 'out', 'batch_size'))}"
    folder = parent if settings.out and alone else parent / name
    write_metrics(result, folder)
    save_held_out(catalogue, asked, made, names, folder / "held_out.png")
    return result, folder


def read_catalogue(run: Run, path: str) -> Catalogue:
    """All pictures of the emoji in a folder, the training split first. Raises UserError for another data set."""
    pixels, texts, keys = [], [], []
    for split in ("train", "val"):
        latents = sample.open_conditions(run, path, split)
        if latents.shape != (wanted := tuple(run.model.latent_shape)):
            raise UserError(f"{path} holds pictures of {latents.shape}; needed: {wanted}, as the run draws")
        raw, condition = latents.read(range(len(latents)))
        conditions.check(condition, run.model.null_condition)
        pixels.append(run.codec.decode(latents.to_model_input(raw)).flatten(1).double())  # (N, D)
        texts, keys = [*texts, condition], keys + latents.keys(range(len(latents)))
    sequences = [emoji.sequence_of(key) for key in keys]
    part = emoji.parts(sequences)
    parts = [part[sequence] for sequence in sequences]
    if set(parts) != set(PARTS):
        raise UserError(f"{path} has no emoji that are held out by tone and by pair; needed: the folder of data=emoji")
    return Catalogue(torch.cat(pixels), conditions.join(*texts), parts, sequences)


def chosen(parts: Sequence[str], seen: int) -> list[int]:
    """The rows of a catalogue that are asked for: so many of the seen, spread evenly, and all that are held out."""
    known = [i for i, part in enumerate(parts) if part == "seen"]
    return [known[i] for i in spread_evenly(len(known), seen)] + [i for i, p in enumerate(parts) if p != "seen"]


def ranks(pictures: torch.Tensor, pixels: torch.Tensor, asked: Sequence[int]) -> torch.Tensor:
    """How many of the catalogue's pictures (N, D) are nearer to each of these (M, D) than the one asked for: (M,)."""
    norms, found = pixels.square().sum(1), []  # (N,)
    for part, wanted in zip(pictures.split(BATCH), torch.tensor(asked).split(BATCH)):
        distances = norms - 2 * part @ pixels.T  # (B, N), less the same number in each row
        found.append((distances < distances.gather(1, wanted[:, None])).sum(1))
    return torch.cat(found)


def save_held_out(
    catalogue: Catalogue, asked: Sequence[int], made: torch.Tensor, names: Mapping[str, str], path: Path
) -> None:
    """Pictures made (M, 3, H, W) of some held-out captions, spread evenly, each on the left of the real one."""
    held_out = [i for i, row in enumerate(asked) if catalogue.parts[row] != "seen"]
    shown = [held_out[i] for i in spread_evenly(len(held_out), SHOWN)]
    rows = [asked[i] for i in shown]
    real = catalogue.pixels[rows].view(-1, *made.shape[1:]).to(torch.uint8)
    captions = [names.get(sequence := catalogue.sequences[row], emoji.key(sequence)) for row in rows for _ in range(2)]
    gallery.save_grid(torch.stack((made[shown], real), 1).flatten(0, 1), path, 12, captions)


def nearest_seen(catalogue: Catalogue, asked: Sequence[int]) -> torch.Tensor:
    """For each caption asked for the row (M,) of the nearest other one that was seen, by the means of their states."""
    texts = catalogue.texts
    means = (texts.states.float() * texts.mask[..., None]).sum(1) / texts.mask.sum(1, keepdim=True)  # (N, D_text)
    distances = torch.cdist(means[asked], means)  # (M, N)
    distances[:, [part != "seen" for part in catalogue.parts]] = torch.inf
    distances[range(len(asked)), asked] = torch.inf
    return distances.argmin(1)


def scores(catalogue: Catalogue, asked: Sequence[int], found: torch.Tensor) -> dict:
    """For each part n and, of the ranks `found`, of the nearest seen captions' and by chance, top-1 and top-5."""
    near = ranks(catalogue.pixels[nearest_seen(catalogue, asked)], catalogue.pixels, asked)
    result = {"catalogue": len(catalogue.parts)}
    for part in PARTS:
        mine = torch.tensor([catalogue.parts[i] == part for i in asked])
        result[f"n_{part}"] = int(mine.sum())
        for first in FIRST:
            for name, ranked in (("", found), ("nearest_seen_", near)):
                result[f"{name}top{first}_{part}"] = (ranked[mine] < first).double().mean().item()
    result |= {f"chance_top{first}": first / len(catalogue.parts) for first in FIRST}
    held_out = torch.tensor([catalogue.parts[i] != "seen" for i in asked])
    result["missed_held_out"] = (found[held_out] > 0).double().mean().item()  # less is better, as races have it
    return result


def table_of(results: Sequence[dict]) -> str:
    """Rows of scores in Markdown."""
    head = ["step", "scale", "captions", "n", *(f"top-{k}" for k in FIRST)]
    head += [*(f"nearest seen, top-{k}" for k in FIRST), *(f"chance, top-{k}" for k in FIRST)]
    rows = []
    for result in results:
        for part, named in PARTS.items():
            values = [result[f"{name}top{k}_{part}"] for name in ("", "nearest_seen_") for k in FIRST]
            values += [result[f"chance_top{k}"] for k in FIRST]
            scale = f"{result['scale']:g}"
            rows.append([result["step"], scale, named, result[f"n_{part}"], *(f"{value:.3f}" for value in values)])
    return markdown(head, rows)


if __name__ == "__main__":
    cli.command(main, __doc__)
