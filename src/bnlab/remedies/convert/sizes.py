"""Sizes of tensors that note when code compares them, which is how a forward depends on the size of a batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["WatchedSizes", "is_of_torch"]


def is_of_torch(frame: FrameType) -> bool:
    """Return whether a frame runs code of torch or bnlab."""
    name = frame.f_globals.get("__name__", "")
    return bool(name == "torch" or name.startswith(("torch.", "bnlab.")))


class _Noting:
    """A mixin for numbers made of sizes of the input, which note when code compares or converts them."""

    noted: list[bool]


class _Size(_Noting, int):
    """A size of the input, or a whole number made of sizes."""


class _Ratio(_Noting, float):
    """A ratio made of sizes."""


def _noting(value: float, noted: list[bool]) -> Any:
    number: Any = (_Size if isinstance(value, int) else _Ratio)(value)
    number.noted = noted
    return number


def _calculation(plain: type, name: str) -> Callable[..., Any]:
    def calculated(self: _Noting, *others: Any) -> Any:
        result = getattr(plain, name)(self, *others)
        return _noting(result, self.noted) if type(result) in (int, float) else result

    return calculated


def _comparison(plain: type, name: str) -> Callable[..., Any]:
    def compared(self: _Noting, *others: Any) -> Any:
        self.noted.append(True)
        return getattr(plain, name)(self, *others)

    return compared


_CALCULATIONS = ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "truediv", "rtruediv", "pow", "neg")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne", "bool", "int", "float")
for _kind, _plain in ((_Size, int), (_Ratio, float)):
    for _name in _CALCULATIONS:
        setattr(_kind, f"__{_name}__", _calculation(_plain, f"__{_name}__"))
    for _name in _COMPARISONS:
        setattr(_kind, f"__{_name}__", _comparison(_plain, f"__{_name}__"))
    _kind.__hash__ = _plain.__hash__  # type: ignore[method-assign]


_SIZES = (Tensor.size, Tensor.numel, Tensor.nelement)


class WatchedSizes(TorchFunctionMode):
    """Returns sizes of tensors that note when code compares them."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[bool] = []

    @property
    def compared(self) -> bool:
        """Whether code compared a size."""
        return bool(self._noted)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Size) and not is_of_torch(sys._getframe(1)):  # noqa: SLF001
            return tuple(_noting(size, self._noted) for size in result)
        if func in _SIZES and type(result) is int and not is_of_torch(sys._getframe(1)):  # noqa: SLF001
            return _noting(result, self._noted)
        if func is Tensor.__len__:
            self._noted.append(True)
        return result
