"""fp32 or bf16: what the launcher says, what is known of a GPU, or what a CPU is measured to be faster at."""

import contextlib
import hashlib
import json
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from system import UserError
from system.files import write_text_atomic
from system.launchers import launcher_arguments
from system.processes import from_first, is_main

Product = tuple[int, int, int, int]  # (pairs, rows, inner, columns): that many (rows, inner) @ (inner, columns)
LARGEST = 2**27  # multiply-adds; larger products are measured on fewer rows
SECONDS = 0.7  # of measuring
ROUNDS = 3


def decide_precision(
    wanted: str, device: torch.device, products: Callable[[], Counter[Product]], *, backward: bool
) -> str:
    """bf16 or fp32, the same on all processes, all of which must call this.

    "auto" follows the launcher's --mixed_precision. Without it, it is bf16 on CUDA devices of capability 8.0 and newer,
    on CPUs what takes less time for `products`, with those of their backward pass or without, and fp32 elsewhere.
    Raises UserError for anything else.
    """
    if wanted == "auto":
        wanted = launched_precision() or "auto"
    if wanted == "auto":
        return from_first(lambda: choose(device, products(), backward))
    if wanted not in ("bf16", "fp32"):
        raise UserError(
            f"precision {wanted!r}; needed: auto, fp32 or bf16 (fp16 overflows in long runs and is not offered)"
        )
    return wanted


def launched_precision() -> str | None:
    """What `accelerate launch` was told; None = nothing. Without a flag it hands on "no", like --mixed_precision no."""
    handed_on = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if handed_on != "no":
        return handed_on
    return "fp32" if "--mixed_precision" in launcher_arguments() else None


def choose(device: torch.device, products: Counter[Product], backward: bool) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type != "cpu":
        return "fp32"
    seconds = measured(products, backward)
    chosen = min(seconds, key=seconds.get)
    if is_main():
        figures = ", ".join(f"{name} {round(1e3 * s, 1):,g} ms" for name, s in seconds.items())
        what = "forward and backward" if backward else "forward"
        print(f"precision  auto is {chosen}: matrix products, {what}: {figures} (kept in {cache_folder()})")
    return chosen


def measured(products: Counter[Product], backward: bool) -> dict[str, float]:
    """Seconds of the products by precision, measured once per CPU, number of threads, torch version and shapes."""
    about = [cpu(), torch.get_num_threads(), torch.__version__, backward, sorted(products.items())]
    path = cache_folder() / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(path.read_text())
        return {name: float(kept[name]) for name in ("fp32", "bf16")}
    seconds = measure(products, backward)
    with contextlib.suppress(OSError):  # measured again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(seconds) + "\n")
    return seconds


def measure(products: Counter[Product], backward: bool) -> dict[str, float]:
    """Seconds of all products in either precision, in turns, those with the most work first, until the time is up."""
    seconds, started = {"fp32": 0.0, "bf16": 0.0}, time.perf_counter()
    for product, scale in sorted(within(products).items(), key=lambda item: -item[1] * math.prod(item[0])):
        if time.perf_counter() - started > SECONDS:
            break
        works = {"fp32": pass_of(product, torch.float32, backward), "bf16": pass_of(product, torch.bfloat16, backward)}
        best = dict.fromkeys(works, math.inf)
        for work in works.values():
            work()
        for _ in range(ROUNDS):
            for name, work in works.items():
                before = time.process_time()  # of this process alone: other load on the machine does not count
                work()
                best[name] = min(best[name], (time.process_time() - before) / torch.get_num_threads())
        for name in seconds:
            seconds[name] += scale * best[name]
    return seconds


def within(products: Counter[Product]) -> dict[Product, float]:
    """{product to measure: how often it counts}: those with too much work on fewer rows or pairs, which count more."""
    scaled: dict[Product, float] = {}
    for (pairs, rows, inner, columns), count in products.items():
        share = min(1.0, LARGEST / (pairs * rows * inner * columns))
        fewer = (max(1, int(pairs * share)), rows) if pairs > 1 else (1, max(1, int(rows * share)))
        product = (*fewer, inner, columns)
        scaled[product] = scaled.get(product, 0) + count * pairs * rows / math.prod(fewer)
    return scaled


def pass_of(product: Product, dtype: torch.dtype, backward: bool) -> Callable[[], object]:
    pairs, rows, inner, columns = product
    a, b = torch.randn(pairs, rows, inner, dtype=dtype), torch.randn(pairs, inner, columns, dtype=dtype)
    if pairs == 1:
        a, b = a[0], b[0].T.contiguous().T  # as a linear layer holds its weights
    if not backward:
        return lambda: a @ b
    grad = torch.randn(*a.shape[:-1], columns, dtype=dtype)
    return lambda: (a @ b, grad @ b.mT, a.mT @ grad)


def cpu() -> str:
    """The name and the instructions of this CPU."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "; ".join(dict.fromkeys(s for s in lines if s.startswith(("model name", "flags", "Features"))))
    return f"{platform.machine()} {platform.processor()}"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tread" / "precision"


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """on: float32 matrix products of CUDA devices in TF32 (10 bits of mantissa), several times as fast on A100s."""
    if not on:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
