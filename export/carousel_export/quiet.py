"""Silence for the exporters' chatter that says nothing of the model: each message by its own text."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.jit._trace import TracerWarning

# What torch 2.13 says while it exports, whatever the model is.
_KNOWN = (
    (r"# The axis name: .* will not be used", UserWarning),
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),
    (r"`torch\.jit\..*` is deprecated", DeprecationWarning),
)
_LOGGERS = {
    # Warns at each export that torchvision is not there.
    "torch.onnx._internal.exporter._registration": logging.ERROR,
    # Warns of the same line of the user's code that the error names.
    "torch.fx.experimental.symbolic_shapes": logging.ERROR,
    # Inform of every node that they leave as it is.
    "onnxscript": logging.WARNING,
    "onnx_ir": logging.WARNING,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Within, those messages are not shown. The tracer's guesses are not either: the parity gate decides on them."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name, level in _LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    try:
        with warnings.catch_warnings():
            for message, category in _KNOWN:
                warnings.filterwarnings("ignore", message=message, category=category)
            warnings.filterwarnings("ignore", category=TracerWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within, PyTorch runs on one thread; the caller's thread count and random state are as before afterwards.

    One thread, because on busy cores waiting threads cost a small layer a hundredfold.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Making a layer draws its first weights.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Said of every layer with proj_size, and no concern of the caller's.
            warnings.filterwarnings("ignore", r"LSTM with projections is not supported with oneDNN", UserWarning)
            yield
    finally:
        torch.set_num_threads(threads)
