"""Where in the user's own code something failed: the module, and the line of its forward."""

import linecache
import traceback
from pathlib import Path

import torch
from torch import nn

_OWN = Path(__file__).parent
_TORCH = Path(torch.__file__).parent


def find_place(error: BaseException, model: nn.Module) -> str:
    """The innermost line of the user's code on the way to the error, as `part (Part): if y.sum() > 0 (net.py:12)`.

    Empty where no such code was on the way. The file is named without its folder.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    where = source = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if id(module) in paths:
            path = paths[id(module)]
            where = f"{path} ({type(module).__name__})" if path else type(module).__name__
        code = frame.f_code
        if where and not any(Path(code.co_filename).is_relative_to(folder) for folder in (_OWN, _TORCH)):
            text = linecache.getline(code.co_filename, line, frame.f_globals).strip().rstrip(":")
            at = f"{Path(code.co_filename).name}:{line}"
            source = f"{where}: {text} ({at})" if text else f"{where} ({at})"
    return source
