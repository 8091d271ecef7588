"""One module per op: `races(threads, quick)` yields its cases. The folder is the list."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Protocol, cast

from bench.race import Race


class Op(Protocol):
    """`races` builds the tensors of a case when it is reached and drops them before the next."""

    def races(self, threads: int, quick: bool) -> Iterator[Race]: ...


def names() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def load(name: str) -> Op:
    return cast(Op, importlib.import_module(f"{__name__}.{name}"))
