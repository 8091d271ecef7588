"""What to raise when an op has failed: which argument, the rule and the value."""

from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor


def refused(function: Callable[..., Any], e: Exception, given: Mapping[str, Any], *others: str) -> Exception:
    """What to raise for `e`, in which `function` ended: a TypeError for an argument of a wrong type, a ValueError for
    what this package refused (torch 2.15 makes a RuntimeError of std::invalid_argument), else e itself.

    Types are looked at only now, by the annotations of `function`: before each call that would take longer than the
    checks of the op. given: its arguments by name. others: ops that it is made of, whose refusals become its own.
    """
    op, text = function.__name__, str(e)
    said = next((name for name in (op, *others) if text.startswith(f"{name}: ")), None)
    hints = get_type_hints(function)
    arguments = {name: value for name, value in given.items() if name in hints}
    for name, value in arguments.items():
        if wrong := _mismatch(name, value, hints[name], said is not None):
            return TypeError(f"{op}: {wrong}")
    if said is not None:
        return (TypeError if isinstance(e, TypeError) else ValueError)(op + text.removeprefix(said))
    # What a wrapper stumbles over when it reads sizes, before the op could say what it wants.
    for name, t in _tensors(arguments):
        if isinstance(e, IndexError) and t.dim() < 1 + ("." in name):
            return ValueError(f"{op}: {name} must have more dims, got {list(t.shape)}")
        if isinstance(e, ZeroDivisionError) and t.shape[-1] == 0:
            return ValueError(f"{op}: {name} must not be empty in its last dim, got {list(t.shape)}")
    return e


def _mismatch(name: str, value: Any, hint: Any, numbers_only: bool) -> str | None:
    """ "NAME must be RULE, got VALUE" where a value, or a part of it, is not what its annotation says.

    numbers_only: nothing but a number or None in place of a tensor counts. torch makes tensors of those, and the C++
    checks then speak of shapes.
    """
    kinds = get_args(hint) if _is_union(hint) else (hint,)
    if value is None and NoneType in kinds:
        return None
    for kind in kinds:
        parts = _parts(name, value, kind)
        if parts is not None:
            return next((wrong for part in parts if (wrong := _mismatch(*part, numbers_only))), None)
    if any(_fits(value, kind) for kind in kinds):
        return None
    if numbers_only and not (Tensor in kinds and (value is None or isinstance(value, Real))):
        return None
    return f"{name} must be {' or '.join(map(_rule, kinds))}, got {_shown(value)}"


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _parts(name: str, value: Any, kind: Any) -> list[tuple[str, Any, Any]] | None:
    """Names, values and annotations of the parts of a value that has the outer form of `kind`; None: it has not."""
    if hasattr(kind, "_fields"):
        hints = get_type_hints(kind)
        return [(f"{name}.{f}", getattr(value, f), hints[f]) for f in kind._fields] if isinstance(value, kind) else None
    inner = get_args(kind)
    if not inner or not isinstance(value, (tuple, list)):
        return None
    if get_origin(kind) is not tuple or Ellipsis in inner:
        inner = inner[:1] * len(value)
    return [(f"{name}[{i}]", x, h) for i, (x, h) in enumerate(zip(value, inner))] if len(value) == len(inner) else None


def _fits(value: Any, kind: Any) -> bool:
    if kind in (int, bool):
        return hasattr(value, "__index__") and not isinstance(value, Tensor)
    if kind is float:
        return isinstance(value, (Real, torch.SymFloat, torch.SymInt))
    return get_origin(kind) is None and isinstance(value, kind)


def _rule(kind: Any) -> str:
    """An annotation in words."""
    words = {Tensor: "a tensor", NoneType: "None", int: "an int", float: "a number", torch.dtype: "a torch.dtype"}
    if kind in words:
        return words[kind]
    if get_origin(kind) is None:
        return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
    inner = get_args(kind)
    items = _rule(get_args(inner[0])[0] if _is_union(inner[0]) else inner[0]).split()[-1] + "s"
    return f"{len(inner)} {items}" if get_origin(kind) is tuple and Ellipsis not in inner else f"a sequence of {items}"


def _shown(value: Any) -> str:
    """Numbers, strings and None by value, short sequences of them too, anything else by the name of its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if type(value) in (tuple, list) and len(value) <= 4:
        inner = ", ".join(map(_shown, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return type(value).__name__


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (tuple, list)):
            fields = getattr(value, "_fields", range(len(value)))
            yield from _tensors({f"{name}.{field}": part for field, part in zip(fields, value)})
