"""Conditions: what a network is told about each image of a batch, in one of three kinds.

    class   (B,) int64      a label for each image; the null is the number of classes
    text    Text            the embedded tokens of a text for each image; the null is a text
    none    None

Only networks and shards look inside a condition. `null`, a network's null condition, is a batch of one on the CPU.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from randomness import Generators, seeded_generator, uniform
from system import UserError


class Text(NamedTuple):
    states: torch.Tensor  # (B, T, D) float16 or float32, shorter texts padded at the end
    mask: torch.Tensor  # (B, T) bool: True where there is a token


class TextStats(NamedTuple):
    """What an encoder's states are normalised by: statistics of the tokens of a data set's training captions."""

    mean: torch.Tensor  # (D,) float32
    std: torch.Tensor  # (D,) float32, above 0
    null: torch.Tensor  # (T, D) the states of the empty caption, as the encoder gave them


Condition = torch.Tensor | Text | None
KINDS = {"class": "class labels", "text": "texts", "none": "no condition"}
DTYPES = (torch.float16, torch.float32)  # of states


def kind_of(condition: Condition) -> str:
    """One of KINDS."""
    return "none" if condition is None else "text" if isinstance(condition, Text) else "class"


def size(condition: Condition) -> int | None:
    """B; None for the kind none, which has no rows."""
    return None if condition is None else len(_labels_or_mask(condition))


def rows(condition: Condition, index: slice | Sequence[int] | torch.Tensor) -> Condition:
    """The rows that `index` names: a slice, a list, or an int64 tensor (n,)."""
    return _each(lambda tensor: tensor[index], condition)


def to(condition: Condition, device: torch.device | str) -> Condition:
    """The condition on a device; the host does not wait for the copy."""
    return _each(lambda tensor: tensor.to(device, non_blocking=True), condition)


def normalize(text: Text, stats: TextStats | None) -> Text:
    """An encoder's states with mean 0 and deviation 1 in each dimension; padding stays 0. stats: None = unchanged."""
    if stats is None:
        return text
    states = ((text.states - stats.mean) / stats.std).to(text.states.dtype)
    return Text(states.masked_fill(~text.mask[..., None], 0), text.mask)


def empty_caption(stats: TextStats) -> Text:
    """The null of networks that are trained on such texts: (1, T, D)."""
    return normalize(Text(stats.null[None], torch.ones(1, len(stats.null), dtype=torch.bool)), stats)


def join(a: Condition, b: Condition) -> Condition:
    """(A + B) rows of two conditions of one kind; the shorter texts are padded."""
    return _each(lambda *tensors: torch.cat(tensors), a, b)


def repeat(null: Condition, n: int, device: torch.device | str) -> Condition:
    """The null condition, a batch of one, for n images."""
    return _each(lambda tensor: tensor.expand(n, *tensor.shape[1:]).contiguous(), to(null, device))


def drop(condition: Condition, null: Condition, rate: float, generators: Generators) -> Condition:
    """The condition with each row replaced by the null with probability `rate`; one uniform draw (B,) decides."""
    if condition is None:
        return None
    like = _labels_or_mask(condition)
    dropped = uniform(like.shape[:1], generators, device=like.device) < rate  # (B,)
    if not isinstance(condition, Text):
        return torch.where(dropped, null[0], condition)  # a number, which no device waits for
    null = to(null, like.device)
    return _each(lambda a, b: torch.where(dropped.view(-1, *[1] * (a.ndim - 1)), a, b), null, condition)


def choose(rule: str | int, seeds: Sequence[int], pool: Condition) -> Condition:
    """A condition for each seed, out of those in `pool`; None where the pool is.

    rule: "balanced" = row seed modulo the pool's size, "random" = a row drawn from the seed, a number = that row. A
    pool of classes is arange(num_classes), so that the number is a class. Raises UserError for other rules.
    """
    count, named = size(pool), str(rule)
    if named not in ("balanced", "random") and not (named.isdigit() and count and int(named) < count):
        numbers = f" or a {kind_of(pool)} 0..{count - 1}" if count else "; the network takes no condition"
        raise UserError(f"label {rule}; needed: balanced, random{numbers}")
    if pool is None:
        return None
    if named == "random":
        draws = (seeded_generator("image", int(seed), "label") for seed in seeds)
        chosen = [int(torch.randint(count, (), generator=generator)) for generator in draws]
    else:
        chosen = [seed % count if named == "balanced" else int(named) for seed in seeds]
    return rows(pool, torch.tensor(chosen, dtype=torch.int64))


def another(condition: Condition, pool: Condition, generators: Generators) -> Condition:
    """For each row a row of the pool, drawn anew whatever the condition is: arXiv 2407.02687. UserError for none."""
    if condition is None:
        raise UserError("guidance=icg draws another condition, and the network takes none; needed: another guidance")
    like = _labels_or_mask(condition)
    chosen = (uniform(like.shape[:1], generators, device=like.device) * size(pool)).long()  # (B,)
    return rows(to(pool, like.device), chosen)


def labels_of(condition: Condition) -> torch.Tensor | None:
    """(B,) int64 for classes, else None."""
    return condition if kind_of(condition) == "class" else None


def check(condition: Condition, null: Condition) -> None:
    """Raises UserError for what the network with this null condition cannot take: kind, labels or width."""
    kind, wanted = kind_of(condition), kind_of(null)
    if kind != wanted:
        found = {"class": "these are class labels", "text": "this is a text", "none": "none is given"}[kind]
        raise UserError(f"the network takes {KINDS[wanted]}, and {found}; needed: data.condition={wanted}")
    if kind == "class" and len(condition) and not 0 <= condition.min() <= condition.max() < int(null):
        raise UserError(f"labels {condition.min()}..{condition.max()}; the model has classes 0..{int(null) - 1}")
    if kind == "text" and not alike(null, condition):
        found, wanted = (text.states.shape[2] for text in (condition, null))
        raise UserError(f"texts of width {found}; the network takes texts of width {wanted}")


def check_kind(kind: str, null: Condition) -> None:
    """Raises UserError where a network with this null condition does not take data.condition=`kind`."""
    if kind != kind_of(null):
        raise UserError(f"data.condition={kind}, and the network takes {KINDS[kind_of(null)]}; needed: the same kind")


def pool(null: Condition, kept: Condition = None) -> Condition:
    """What images are drawn for: every class of the network with this null condition, or the texts that were kept."""
    return torch.arange(int(null)) if kind_of(null) == "class" else kept


def alike(null: Condition, other: Condition) -> bool:
    """Whether two networks with these null conditions take the same ones: as many classes, or texts of one width."""
    if isinstance(null, Text) and isinstance(other, Text):
        return null.states.shape[2] == other.states.shape[2]
    return kind_of(null) == kind_of(other) and (null is None or int(null) == int(other))


def save(condition: Condition, stats: TextStats | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a `conditions.safetensors`: labels, or states and mask, or nothing, and a data set's stats."""
    named = condition._asdict() if isinstance(condition, Text) else {"labels": condition}
    named |= stats._asdict() if stats else {}
    return {name: tensor.contiguous() for name, tensor in named.items() if tensor is not None}


def load(tensors: dict[str, torch.Tensor]) -> Condition:
    """The condition that `save` was given. Raises UserError for other tensors."""
    tensors = {name: tensor for name, tensor in tensors.items() if name not in TextStats._fields}
    if (names := sorted(tensors)) not in ([], ["labels"], ["mask", "states"]):
        raise UserError(f"conditions of {', '.join(names)}; needed: labels, or states and mask, or nothing")
    found = Text(**tensors) if "mask" in tensors else tensors.get("labels")
    if isinstance(found, Text):
        states, mask = found
        fits = states.ndim == 3 and len(states) and states.dtype in DTYPES and states.isfinite().all()
        fits = fits and mask.dtype == torch.bool and mask.shape == states.shape[:2]
    else:
        fits = found is None or found.dtype == torch.int64 and found.ndim == 1
    if not fits:
        needed = "int64 (B,), or finite (B, T, D) and bool (B, T)"
        raise UserError(f"conditions of odd shapes or types; needed: {needed}")
    return found


def load_stats(tensors: dict[str, torch.Tensor]) -> TextStats | None:
    """The stats that `save` was given, if any. Raises UserError for other tensors of these names."""
    if not tensors.keys() & set(TextStats._fields):
        return None
    mean, std, null = stats = TextStats(*(tensors.get(name, torch.empty(0)) for name in TextStats._fields))
    width = tensors.get("states", mean).shape[-1:]
    fits = mean.shape == std.shape == width and null.ndim == 2 and null.shape == (max(1, len(null)), *width)
    fits = fits and all(tensor.dtype in DTYPES and tensor.isfinite().all() for tensor in stats)
    if not fits or not (std > 0).all():
        needed = "finite mean (D,), std (D,) above 0 and null (T, D), D the width of the texts"
        raise UserError(f"the texts' statistics have odd shapes or numbers; needed: {needed}")
    return stats


def _labels_or_mask(condition: torch.Tensor | Text) -> torch.Tensor:
    """A tensor whose first axis is the batch."""
    return condition.mask if isinstance(condition, Text) else condition


def _each(change: Callable[..., torch.Tensor], *same: Condition) -> Condition:
    """A condition made of the tensors of conditions of one kind; shorter texts are padded."""
    if not isinstance(same[0], Text):
        return None if same[0] is None else change(*same)
    longest = max(text.mask.shape[1] for text in same)
    missing = [longest - text.mask.shape[1] for text in same]
    states = (pad(text.states, (0, 0, 0, n)) if n else text.states for text, n in zip(same, missing))
    return Text(change(*states), change(*(pad(t.mask, (0, n)) if n else t.mask for t, n in zip(same, missing))))
