"""Reads a pickled numpy array without letting the pickle run anything.

MaskDiT's shards hold pickles. A pickle is a program that may call whatever it names; here the names that an array needs
refer to the records below and every other name is refused, so that no call reaches numpy or anything else.
"""

import pickle
import pickletools
from io import BytesIO

import numpy as np

from system import UserError
from system.limits import PICKLE_STEPS

DTYPES = {"f2": np.float16, "f4": np.float32, "f8": np.float64}


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


def read_pickled_array(contents: bytes) -> np.ndarray:
    """The float array in `pickle.dumps(array)`. Raises UserError for anything else; nothing in it is ever run."""
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(contents)):
            if number > PICKLE_STEPS or opcode.name.endswith("PUT") and int(argument) > PICKLE_STEPS:
                raise UserError(f"is a pickle of more than {PICKLE_STEPS} steps or records; an array has fewer")
        _, shape, dtype, fortran_order, numbers = _ArrayUnpickler(BytesIO(contents)).load().state
        numbers = np.frombuffer(numbers, np.dtype(DTYPES[dtype.arguments[0]]).newbyteorder(dtype.state[1]))
        return numbers.reshape(shape, order="F" if fortran_order else "C")
    except UserError:
        raise
    except Exception as error:  # a crafted pickle can fail in any way
        raise UserError(f"is not a pickled array ({type(error).__name__})") from None
