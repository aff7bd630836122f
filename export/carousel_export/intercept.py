"""Functions of a model's own code, answered otherwise while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Intercept(TorchFunctionMode):
    """Within, PyTorch's functions of a tensor go through `answer`."""

    def __init__(self) -> None:
        super().__init__()
        self._suspended = False

    def answer(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a function returns; here it is called as it is."""
        return func(*args, **kwargs)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within, functions are as they are: for layers that know of time themselves."""
        before, self._suspended = self._suspended, True
        try:
            yield
        finally:
            self._suspended = before

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._suspended or not args or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        return self.answer(func, *args, **(kwargs or {}))
