"""Random numbers that depend on what they are for, never on how the work is split.

The maths takes `generators`, one of

    None                         torch's default generator, as in torch.rand
    torch.Generator              one stream for the whole batch
    [torch.Generator, ...]       one stream a row: sampling, where an image depends on its own seed alone
    Rows(generator, start, n)    rows start.. of draws made for a global batch of n: training, where every process draws
                                 for the whole batch and keeps its own rows, so that a step is the same on 1 or 64 GPUs

No state is saved in checkpoints: generators are made afresh from a key such as (seed, "train", step).
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """Rows `start`, `start + 1`, ... of draws from `generator` for `total` rows."""

    generator: torch.Generator
    start: int
    total: int


Generators = torch.Generator | Rows | Sequence[torch.Generator] | None


def seeded_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the hash of `key`: equal keys give equal streams, on any machine with the same device
    type."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(shape: Sequence[int], generators: Generators = None, *, device=None, dtype=torch.float32) -> torch.Tensor:
    """N(0, 1) numbers of the given shape; the first axis counts rows."""
    return _draw(torch.randn, shape, generators, device, dtype)


def uniform(shape: Sequence[int], generators: Generators = None, *, device=None, dtype=torch.float32) -> torch.Tensor:
    """Numbers from [0, 1) of the given shape; the first axis counts rows."""
    return _draw(torch.rand, shape, generators, device, dtype)


def _draw(source: Callable, shape: Sequence[int], generators: Generators, device, dtype) -> torch.Tensor:
    rows, *rest = shape
    if generators is None:
        return source(rows, *rest, device=device, dtype=dtype)
    if isinstance(generators, torch.Generator):
        out = source(rows, *rest, generator=generators, device=generators.device, dtype=dtype)
    elif isinstance(generators, Rows):
        generator, start, total = generators
        assert start + rows <= total, f"rows {start}..{start + rows} of {total}"
        out = source(total, *rest, generator=generator, device=generator.device, dtype=dtype)[start : start + rows]
    else:
        assert len(generators) == rows, f"{len(generators)} generators for {rows} rows"
        out = torch.stack([source(rest, generator=g, device=g.device, dtype=dtype) for g in generators])
    return out.to(device, non_blocking=True) if device is not None else out
