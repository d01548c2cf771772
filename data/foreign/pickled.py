"""Reads a pickled numpy array without letting the pickle run anything.

MaskDiT's shards hold pickles. A pickle is a program that may call whatever it names; here the names that an array needs
refer to the records below and every other name is refused, so that no call reaches numpy or anything else.
"""

import pickle
import pickletools
from io import BytesIO

import numpy as np

from data.archives import fits
from system import UserError
from system.limits import PICKLE_STEPS

# What the unpickler and the stand-ins below raise at crafted pickles.
CRAFTED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError,
    MemoryError,
)  # fmt: skip


class _Record:
    """Stands in for what a pickle makes: an array by numpy's _reconstruct(ndarray, (0,), b"b"), or dtype("f4")."""

    def __init__(self, *arguments):
        self.arguments, self.state = arguments, None

    def __setstate__(self, state):
        self.state = state


def _frombuffer(numbers, dtype, shape, order) -> _Record:
    """Stands in for numpy's function of this name, which pickles of protocol 5 name."""
    array = _Record()
    array.state = (1, shape, dtype, order == "F", numbers)
    return array


STANDINS = {
    ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # pickles of protocol 2 wrap their bytes in it
    ("numpy.core.multiarray", "_reconstruct"): _Record,
    ("numpy._core.multiarray", "_reconstruct"): _Record,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "ndarray"): _Record,
    ("numpy", "dtype"): _Record,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in STANDINS:
            raise UserError(f"the pickle asks for {module}.{name}; only plain arrays are read")
        return STANDINS[module, name]


def _dtype(record: _Record) -> np.dtype | None:
    """The type of floating point numbers that a record stands in for, None for anything else."""
    match record.arguments, record.state:
        case ["f2" | "f4" | "f8" as kind, *_], [_, "<" | ">" as order, *_]:
            return np.dtype(order + kind)
    return None


def read_pickled_array(contents: bytes, source: str) -> np.ndarray:
    """The float array in `pickle.dumps(array)`, in place. Raises UserError, which begins with `source`, for all else.

    Nothing in the pickle is ever run.
    """
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(contents)):
            if number > PICKLE_STEPS or opcode.name.endswith("PUT") and int(argument) > PICKLE_STEPS:
                raise UserError(f"it has more than {PICKLE_STEPS} steps or records; an array has fewer")
        loaded = _ArrayUnpickler(BytesIO(contents)).load()
    except CRAFTED as error:
        raise UserError(f"{source} is not a pickled array ({' '.join(str(error).split()):.200})") from None
    match loaded:
        case _Record(state=[_, tuple(shape), _Record() as kind, fortran_order, bytes() | bytearray() as numbers]):
            dtype = _dtype(kind)
            if dtype and fits(shape, dtype, len(numbers)):
                return np.ndarray(shape, dtype, numbers, order="F" if fortran_order else "C")
    raise UserError(f"{source} is no pickle of an array of floating point numbers")
