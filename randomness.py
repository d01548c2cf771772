"""Random numbers that depend on their purpose, never on how the work is split.

The maths takes `generators`, one of

    None                               torch's default generator, as in torch.rand
    torch.Generator                    one stream for the whole batch
    [torch.Generator, ...]             one stream per row: sampling, where an image depends on its own seed alone
    BatchSlice(generator, start, n)    rows start.. of draws for a global batch of n: training, where every process
                                       draws for the whole batch and keeps its own rows, so that a step is the same on
                                       1 or 64 GPUs

Checkpoints hold no random state: generators are made anew from a key such as (seed, "train", step).
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class BatchSlice(NamedTuple):
    """Rows `start`, `start + 1`, ... of draws from `generator` for `total` rows."""

    generator: torch.Generator
    start: int
    total: int

    def __call__(self, shape: Sequence[int], device: torch.device | str | None) -> torch.Tensor:
        """What routing_module draws from: numbers from [0, 1)."""
        return uniform(shape, self, device=device)


Generators = torch.Generator | BatchSlice | Sequence[torch.Generator] | None


def seeded_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the hash of `key`: equal keys give equal streams on devices of one type."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(shape: Sequence[int], generators: Generators = None, *, device=None) -> torch.Tensor:
    """N(0, 1) float32 numbers of the given shape, whose first axis is the batch."""
    return _draw(torch.randn, shape, generators, device)


def uniform(shape: Sequence[int], generators: Generators = None, *, device=None) -> torch.Tensor:
    """Float32 numbers from [0, 1) of the given shape, whose first axis is the batch."""
    return _draw(torch.rand, shape, generators, device)


def _draw(source: Callable, shape: Sequence[int], generators: Generators, device) -> torch.Tensor:
    rows, *rest = shape
    if generators is None:
        return source(rows, *rest, device=device)
    if isinstance(generators, torch.Generator):
        out = source(rows, *rest, generator=generators, device=generators.device)
    elif isinstance(generators, BatchSlice):
        generator, start, total = generators
        assert start + rows <= total, f"rows {start}..{start + rows} of {total}"
        out = source(total, *rest, generator=generator, device=generator.device)[start : start + rows]
    else:
        assert len(generators) == rows, f"{len(generators)} generators for {rows} rows"
        out = torch.stack([source(rest, generator=g, device=g.device) for g in generators])
    return out.to(device, non_blocking=True) if device is not None else out
