"""Reads a pickled numpy array without letting the pickle run anything.

MaskDiT's shards hold pickles. A pickle is a program that may call whatever it names; here the names that an array needs
refer to the records below and every other name is refused, so that no call reaches numpy or anything else.
"""

import pickle
from io import BytesIO

import numpy as np

from system import UserError

DTYPES = {"f2": np.float16, "f4": np.float32, "f8": np.float64}


class _Array:
    """Stands in for numpy's _reconstruct(ndarray, (0,), b"b"), and for the array that its state then fills."""

    def __init__(self, subtype, shape, typecode):
        self.state = None

    def __setstate__(self, state):
        self.state = state


class _Dtype:
    """Stands in for numpy.dtype("f4", False, True)."""

    def __init__(self, code, align=False, copy=False):
        self.code, self.state = code, None

    def __setstate__(self, state):
        self.state = state


class _Subtype:
    """Stands in for numpy.ndarray, which is only ever an argument."""


def _frombuffer(numbers, dtype, shape, order) -> _Array:
    """Stands in for numpy's function of this name, which pickles of protocol 5 name."""
    array = _Array(None, (), b"")
    array.state = (1, shape, dtype, order == "F", numbers)
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, in which pickles of protocol 2 wrap their bytes."""
    return text.encode("latin1")


STANDINS = {
    ("_codecs", "encode"): _encode,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("numpy", "ndarray"): _Subtype,
    ("numpy", "dtype"): _Dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in STANDINS:
            raise UserError(f"the pickle asks for {module}.{name}; only plain arrays are read")
        return STANDINS[module, name]


def read_pickled_array(contents: bytes) -> np.ndarray:
    """The float array in `pickle.dumps(array)`. Raises UserError for anything else; nothing in it is ever run."""
    try:
        array = _ArrayUnpickler(BytesIO(contents)).load()
        version, shape, dtype, fortran_order, numbers = array.state
        numbers = np.frombuffer(numbers, np.dtype(DTYPES[dtype.code]).newbyteorder(dtype.state[1]))
        return numbers.reshape(shape, order="F" if fortran_order else "C")
    except UserError:
        raise
    except Exception as error:  # a crafted pickle can fail in any way
        raise UserError(f"is not a pickled array ({type(error).__name__})") from None
