"""fp32 or bf16: what the launcher says, or what is faster on this GPU or CPU."""

import contextlib
import os
import platform
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from system import UserError
from system.launchers import launcher_arguments
from system.processes import from_first, is_main

# Words of ONEDNN_MAX_CPU_ISA; by any other than these, oneDNN uses all that the CPU has
NO_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
NO_AMX = (*NO_BF16, "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", "AVX10_2_512")
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "L40S": 362, "4090": 165}  # bf16, dense, from the data sheets


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """A GPU's peak in bf16 by its data sheet; None = not known, or the precision is another."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and precision == "bf16" else ""
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def decide_precision(wanted: str, device: torch.device) -> str:
    """bf16 or fp32, the same on all processes, all of which must call this.

    "auto" follows the launcher's --mixed_precision. Without it, it is bf16 on CUDA devices of capability 8.0 and newer
    and on CPUs whose bf16 products are faster (`cpu_precision`), and fp32 elsewhere. Raises UserError for a launcher's
    word that is neither.
    """
    if wanted == "auto":
        wanted = launched_precision() or choose_precision(device)
    if wanted not in ("bf16", "fp32"):
        raise UserError(f"precision {wanted!r}; needed: bf16 or fp32 (fp16 overflows in long runs and is not offered)")
    return wanted


def launched_precision() -> str | None:
    """What `accelerate launch` was told; None = nothing. Without a flag it hands on "no", like --mixed_precision no."""
    handed_on = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if handed_on != "no":
        return handed_on
    return "fp32" if "--mixed_precision" in launcher_arguments() else None


def choose_precision(device: torch.device, of: str = "precision") -> str:
    """bf16 or fp32, as suits the first process's machine, and a line on it. All processes must call this."""
    return from_first(lambda: choose(device, of))


def choose(device: torch.device, of: str) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type != "cpu":
        return "fp32"
    chosen, reason = cpu_precision(cpu_flags(), os.environ.get("ONEDNN_MAX_CPU_ISA", ""))
    if is_main():
        print(f"{of:<10} auto is {chosen}: {reason}")
    return chosen


def cpu_precision(flags: Collection[str], max_isa: str = "") -> tuple[str, str]:
    """(bf16 or fp32, why) for a CPU with these flags and vendor, as /proc/cpuinfo has them.

    max_isa: ONEDNN_MAX_CPU_ISA, beyond which oneDNN, which multiplies the matrices, does not go. Measured: AMX tiles
    are several times as fast in bf16, AVX-512's bf16 instructions twice as fast on AMD's cores, and on Intel's they are
    half as fast as float32.
    """
    isa = max_isa.upper()
    if "amx_bf16" in flags and isa not in NO_AMX:
        return "bf16", "this CPU has bf16 matrix units (AMX)"
    if "avx512_bf16" in flags and isa not in NO_BF16:
        if "AuthenticAMD" in flags:
            return "bf16", "this CPU multiplies bf16 numbers twice as fast (AVX-512)"
        return "fp32", "without AMX, bf16 is slower on this CPU"
    if not flags:
        return "fp32", "nothing is known of this CPU"
    return "fp32", "this CPU has no bf16 units that torch uses"


def cpu_flags() -> set[str]:
    """The instructions and the vendor of this CPU; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features", "vendor_id")))
        return set(" ".join(told).split())
    return {platform.machine()} - {""}


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """on: float32 matrix products of CUDA devices in TF32 (10 bits of mantissa), several times as fast on A100s."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
