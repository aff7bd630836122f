"""The files of the installed package g2pM (0.1.2.5, Apache-2.0): trained weights and tables, pickled."""

import importlib.resources
import io
import pickle
from typing import Any

import numpy as np

# What NumPy itself puts in the pickle of an array; asked of NumPy, because its home differs between versions.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and Python's own containers, strings and numbers; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}: only NumPy arrays are read") from None


def read(name: str) -> Any:
    """The content of one of the package's pickles, such as `np_ckpt.pkl`."""
    return loads((importlib.resources.files("g2pM") / name).read_bytes())


def loads(data: bytes) -> Any:
    """Unpickles arrays and plain values. Raises `pickle.UnpicklingError` for anything else."""
    return ArrayUnpickler(io.BytesIO(data)).load()
