"""Runs a forward of complex numbers in real ones: ONNX has no complex numbers.

Forward itself stays as it is. What it gets for a complex parameter, and what it makes of complex numbers, is a `Pair`
of real tensors, which knows the functions that recurrences are written with. Before anything else is tried, its answers
are compared with those of the user's own model.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unroll.export.errors import COMPLEX, ExportError, attempt
from unroll.export.lifting.dataflow import Observer
from unroll.export.lifting.float64 import converted, double_precision, exact
from unroll.export.lifting.kept_values import NOT_OWN
from unroll.export.source_lines import current_line, source_line

#: The answers of both models in float64 may differ by so much of the largest: forward may ask for complex64.
_CLOSE = 1e-5

#: Functions that do the same to real and imaginary parts.
_EACH = {
    *("__getitem__", "view", "reshape", "unsqueeze", "squeeze", "transpose", "permute", "movedim", "expand"),
    *("repeat", "tile"),
    *("flatten", "unflatten", "contiguous", "clone", "detach", "select", "narrow", "index_select", "flip", "roll"),
    *("unbind", "chunk", "split", "sum", "mean", "cumsum", "neg", "zeros_like", "broadcast_to", "t", "T", "mT"),
}

#: The same; tensors among the operands may be real.
_JOINING = {"stack", "cat", "concat", "where"}

#: Functions that are linear in each of two operands.
_BILINEAR = {"matmul", "bmm", "mm", "mv", "einsum", "outer"}

#: Functions that make complex tensors of real ones.
_MAKING = {"complex", "polar", "view_as_complex", "cfloat", "cdouble"}


@dataclass(eq=False)
class Pair:
    """A complex tensor as two real ones, or a complex number as two numbers."""

    real: Any
    imag: Any

    @classmethod
    def of(cls, value: Any) -> "Pair":
        """From a tensor or a number of any kind."""
        if isinstance(value, Pair):
            return value
        if isinstance(value, Tensor):
            return cls(value, torch.zeros_like(value))
        number = complex(value)  # which no tensor rounds
        return cls(number.real, number.imag)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _apply(func.__name__, args, kwargs or {}, func)

    @property
    def dtype(self) -> torch.dtype:
        made: torch.dtype = self.real.dtype.to_complex()
        return made

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        if name in {"T", "mT", "H", "mH"}:
            return _apply(name, (self,), {})
        if name in {"size", "dim", "numel"} or not callable(getattr(Tensor, name)):
            return getattr(self.real, name)
        return lambda *args, **kwargs: _apply(name, (self, *args), kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        value = Pair.of(value)
        self.real[index], self.imag[index] = value.real, value.imag

    def __len__(self) -> int:
        return len(self.real)

    def __iter__(self) -> Iterator["Pair"]:
        return iter(_apply("unbind", (self,), {}))


def _operator(name: str) -> Callable[..., Any]:
    return lambda *args: _apply(name, args, {})


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "neg", "pow", "abs"):
    setattr(Pair, f"__{_name}__", _operator(f"__{_name}__"))
setattr(Pair, "__getitem__", _operator("__getitem__"))  # noqa: B010

pytree.register_pytree_node(Pair, lambda pair: ([pair.real, pair.imag], None), lambda parts, _: Pair(*parts))


def _add(one: Any, other: Any, *, alpha: Any = 1) -> Pair:
    one, other = Pair.of(one), Pair.of(other)
    return Pair(one.real + alpha * other.real, one.imag + alpha * other.imag)


def _product(one: Any, other: Any) -> Pair:
    if not isinstance(one, (Pair, complex)):
        one, other = other, one
    if not isinstance(other, (Pair, complex)):
        return Pair(one.real * other, one.imag * other)
    return Pair(one.real * other.real - one.imag * other.imag, one.real * other.imag + one.imag * other.real)


def _quotient(one: Any, other: Any) -> Pair:
    if not isinstance(other, (Pair, complex)):
        return Pair(one.real / other, one.imag / other)
    square = other.real * other.real + other.imag * other.imag
    turned = _product(one, other.conjugate() if isinstance(other, complex) else Pair(other.real, -other.imag))
    return Pair(turned.real / square, turned.imag / square)


def _power(one: Pair, exponent: Any) -> Pair:
    if not isinstance(exponent, int) or exponent < 1:
        raise _refusal("pow")
    made = one
    for _ in range(exponent - 1):
        made = _product(made, one)
    return made


def _cast(one: Any, *args: Any, **kwargs: Any) -> Pair:
    """To another device or complex type, both of which are the same here."""
    if any(isinstance(leaf, torch.dtype) and not leaf.is_complex for leaf in (*args, *kwargs.values())):
        raise _refusal("to")
    return Pair.of(one)


def _polar(length: Tensor, angle: Tensor) -> Pair:
    return Pair(length * angle.cos(), length * angle.sin())


def _length(one: Pair) -> Tensor:
    return (one.real * one.real + one.imag * one.imag).sqrt()


def _angle(one: Pair) -> Tensor:
    return torch.atan2(one.imag, one.real)


#: By the name of the function, without the underscores of an operator.
_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "radd"), _add),
    "sub": lambda one, other, alpha=1: _add(one, other, alpha=-alpha),
    "rsub": lambda one, other: _add(other, one, alpha=-1),
    **dict.fromkeys(("mul", "multiply", "rmul"), _product),
    "addcmul": lambda one, a, b, value=1: _add(one, _product(a, b), alpha=value),
    **dict.fromkeys(("div", "truediv", "true_divide"), _quotient),
    "rtruediv": lambda one, other: _quotient(other, one),
    "reciprocal": lambda one: _quotient(1.0, one),
    "pow": _power,
    "square": lambda one: _product(one, one),
    "exp": lambda one: _polar(one.real.exp(), one.imag),
    "log": lambda one: Pair(_length(one).log(), _angle(one)),
    **dict.fromkeys(("abs", "absolute"), _length),
    "angle": _angle,
    **dict.fromkeys(("conj", "conj_physical"), lambda one: Pair(one.real, -one.imag)),
    **dict.fromkeys(("H", "mH"), lambda one: Pair(one.real.mT, -one.imag.mT)),
    **dict.fromkeys(("to", "type", "type_as", "cfloat", "cdouble", "resolve_conj"), _cast),
    "is_complex": lambda one: True,
    "real": lambda one: one.real,
    "imag": lambda one: one.imag,
    "complex": Pair,
    "polar": _polar,
    "view_as_complex": lambda one: Pair(one[..., 0], one[..., 1]),
    "view_as_real": lambda one: torch.stack([one.real, one.imag], -1),
}


def _apply(name: str, args: Any, kwargs: Any, function: Any = None) -> Any:
    """Call a function of torch, or a method of a tensor, with pairs among its arguments."""
    plain = name.removeprefix("__").removesuffix("__")
    if rule := _RULES.get(plain):
        return rule(*args, **kwargs)
    if name in {"T", "mT"}:
        function = lambda tensor: getattr(tensor, name)  # noqa: E731
    elif function is None:
        function = getattr(Tensor, name)
    if plain in _JOINING:
        args = pytree.tree_map(lambda leaf: Pair.of(leaf) if _is_float(leaf) else leaf, args, is_leaf=_is_pair)
    leaves, structure = pytree.tree_flatten((args, kwargs), is_leaf=_is_pair)
    pairs = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Pair)]

    def call(*parts: str) -> Any:
        """With these parts of the pairs, one after the other."""
        given = dict(zip(pairs, parts, strict=True))
        each = [getattr(leaf, given[place]) if place in given else leaf for place, leaf in enumerate(leaves)]
        args, kwargs = pytree.tree_unflatten(each, structure)
        return function(*args, **kwargs)

    if plain in _BILINEAR and len(pairs) == 2:
        real = call("real", "real") - call("imag", "imag")
        return Pair(real, call("real", "imag") + call("imag", "real"))
    if name in _EACH or plain in _JOINING or (plain in _BILINEAR and len(pairs) == 1):
        real, imag = (call(*[part] * len(pairs)) for part in ("real", "imag"))
        return Pair(real, imag) if isinstance(real, Tensor) else tuple(map(Pair, real, imag))
    raise _refusal(plain)


def _is_pair(value: Any) -> bool:
    return isinstance(value, Pair)


def _is_float(value: Any) -> bool:
    return isinstance(value, (float, complex)) or (isinstance(value, Tensor) and value.is_floating_point())


def _refusal(name: str) -> ExportError:
    return ExportError("dtype", f"forward calls torch.{name} with complex numbers{current_line()}; {COMPLEX}")


class _InPairs(Observer):
    """Within, what would be complex is a pair."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_pair)
        if name in _MAKING or any(isinstance(leaf, (Pair, complex)) for leaf in leaves):
            return _apply(name, args, kwargs, func)
        if any(isinstance(leaf, torch.dtype) and leaf.is_complex for leaf in leaves):
            return _asked(func, name, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.is_complex():
            raise _refusal(name)
        return result


def _asked(func: Any, name: str, args: Any, kwargs: Any) -> Pair:
    """A call that asks for a complex dtype."""
    if name.removeprefix("new_").removesuffix("_like") not in {"zeros", "ones", "full", "empty", "to", "type"}:
        raise _refusal(name)
    args, kwargs = pytree.tree_map_only(torch.dtype, lambda dtype: dtype.to_real(), (args, kwargs))
    if name in {"to", "type"} and any(leaf is args[0].dtype for leaf in pytree.tree_leaves((args[1:], kwargs))):
        return Pair.of(args[0])  # torch.vmap cannot be traced with a cast in it
    return Pair.of(func(*args, **kwargs))


class ComplexNumbers(Observer):
    """Notices complex numbers. seen: were there any?"""

    def __init__(self) -> None:
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen = self.seen or (isinstance(result, Tensor) and result.is_complex())
        return result


def in_pairs(model: nn.Module, examples: list[dict[str, Any]]) -> nn.Module:
    """A copy of a model of complex numbers that computes with pairs.

    The model itself where it has no complex parameters, and makes more of complex numbers than pairs can: ONNX may know
    that, as it knows spectra.

    Args:
        model: the user's, on the CPU.
        examples: arguments of forward, of several sizes.

    Raises:
        ExportError: dtype, if an output is complex, or if pairs cannot follow a model with complex parameters.
    """
    made = copy.deepcopy(model)
    changed: dict[int, Any] = {}
    for module in made.modules():
        own = frozenset(_convert(module, changed))
        if own or not type(module).__module__.startswith("torch."):
            module.__class__ = _class(type(module))
            module.unroll_complex = own  # type: ignore[assignment]
    try:
        _check_same(converted(model, torch.float64), converted(made, torch.float64), examples)
    except ExportError:
        if changed:
            raise
        return model
    return made


def _check_same(model: nn.Module, pairs: nn.Module, examples: list[dict[str, Any]]) -> None:
    for example in examples:
        given, same = exact(example), exact(copy.deepcopy(example))
        with double_precision():
            expected = pytree.tree_leaves(attempt("the example", partial(model, **given)))
            if any(map(_is_complex, expected)):
                raise ExportError("dtype", f"an output is complex; {COMPLEX}")
            try:
                with torch.no_grad():
                    found = pytree.tree_leaves(pairs(**same))
            except ExportError:
                raise
            except Exception as error:
                raise ExportError(
                    "dtype", f"forward cannot be followed in real numbers{source_line(error)}; {COMPLEX}"
                ) from error
        if len(expected) != len(found) or not all(map(_is_close, expected, found)):
            raise ExportError("dtype", f"forward cannot be followed in real numbers; {COMPLEX}")


def _convert(module: nn.Module, changed: dict[int, Any]) -> Iterator[str]:
    """The names of its complex parameters and buffers, which become real, with an axis more."""
    for store in (module._parameters, module._buffers):
        for name, tensor in store.items():
            if tensor is not None and tensor.is_complex():
                real = torch.view_as_real(tensor.detach()).clone()
                made = nn.Parameter(real, requires_grad=False) if isinstance(tensor, nn.Parameter) else real
                store[name] = changed.setdefault(id(tensor), made)
                yield name
    for name, value in vars(module).items():
        if name not in NOT_OWN and any(_is_complex(leaf) for leaf in pytree.tree_leaves(value)):
            vars(module)[name] = pytree.tree_map(lambda t: Pair(t.real, t.imag) if _is_complex(t) else t, value)


def _is_complex(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_complex()


def _class(before: type[nn.Module]) -> type[nn.Module]:
    @wraps(before.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _InPairs():
            return before.forward(self, *args, **kwargs)

    def get(self: nn.Module, name: str) -> Any:
        value: Any = before.__getattr__(self, name)
        return Pair(value[..., 0], value[..., 1]) if name in vars(self).get("unroll_complex", ()) else value

    return type(before.__name__, (before,), {"forward": forward, "__getattr__": get})


def _is_close(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    scale = max(1.0, float(one.abs().max())) if one.numel() else 1.0
    return one.shape == other.shape and bool((one.double() - other.double()).abs().max() <= _CLOSE * scale)
