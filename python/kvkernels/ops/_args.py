"""What the wrappers share: from a PagedKV to the flat arguments of an op, and checks that C++ cannot make."""

from typing import NoReturn

from torch import Tensor

from kvkernels.paged_kv import TWO_CACHES, PagedKV


def all_pools(op: str, kv: PagedKV) -> tuple[list[Tensor], list[int]]:
    """Tensors of all pools in a row, and one format code per pool."""
    pools, formats = kv.pools, kv.formats
    if len(pools) != len(formats):
        raise ValueError(f"{op}: kv has {len(pools)} pools, but {len(formats)} formats")
    tensors: list[Tensor] = []
    codes: list[int] = []
    for pool, fmt in zip(pools, formats):
        if isinstance(pool, tuple):
            tensors += pool
            codes.append(fmt.code | TWO_CACHES)
        else:
            tensors.append(pool)
            codes.append(fmt.code)
    return tensors, codes


def one_pool(op: str, kv: PagedKV, pool: int, name: str = "pool") -> tuple[Tensor, Tensor | None, int]:
    """First tensor, V cache (None for records) and format code of a pool."""
    if not 0 <= pool < len(kv.pools):
        raise ValueError(f"{op}: {name} must be in [0, {len(kv.pools)}), the pools of kv; got {pool}")
    tensors = kv.pools[pool]
    return (*tensors, kv.code(pool)) if isinstance(tensors, tuple) else (tensors, None, kv.code(pool))


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    """For grad mode: an op without a backward must not be asked for one in silence."""
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise ValueError(
                f"{op}: {name} requires grad, but the op has no backward; call it under torch.no_grad() "
                f"or pass {name}.detach()"
            )


def no_tensor(op: str, name: str, got: object, expected: str = "a tensor") -> NoReturn:
    raise TypeError(f"{op}: {name} must be {expected}, got {type(got).__name__}")


def same_device(op: str, **tensors: Tensor | None) -> None:
    """For fake kernels, which also answer calls that mix meta tensors with others."""
    given = [(name, t.device) for name, t in tensors.items() if t is not None]
    first, device = given[0]
    for name, other in given:
        if other != device:
            raise ValueError(f"{op}: {name} is on {other}, but {first} is on {device}")
