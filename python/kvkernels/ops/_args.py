"""What the wrappers share: from a PagedKV to the flat arguments of an op, and checks that C++ cannot make."""

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from kvkernels.paged_kv import OFFLOADED, KVTransform, PagedKV, format_code

NO_TRANSFORM = (None, None, None)  # centre, balance, order


def all_pools(op: str, kv: PagedKV) -> tuple[list[Tensor], list[int]]:
    """Tensors of all pools in a row, and one format code per pool."""
    pools, formats = kv.pools, kv.formats
    if len(pools) != len(formats):
        raise ValueError(f"{op}: kv has {len(pools)} pools, but {len(formats)} formats")
    tensors: list[Tensor] = []
    codes: list[int] = []
    for pool, fmt in zip(pools, formats):
        codes.append(format_code(fmt, pool))
        if isinstance(pool, tuple):
            tensors += pool
        else:
            tensors.append(pool)
    for i in kv.offloaded:
        codes[i] |= OFFLOADED
    return tensors, codes


def basis(transform: KVTransform) -> list[Tensor]:
    """As a list of tensors, which has no place for None."""
    centre, balance, order = transform
    return [centre, balance] if order is None else [centre, balance, order]


def one_pool(op: str, kv: PagedKV, pool: int, name: str = "pool") -> tuple[Tensor, Tensor | None, int]:
    """First tensor, V cache (None for records) and format code of a pool."""
    if not 0 <= pool < len(kv.pools):
        raise ValueError(f"{op}: {name} must be in [0, {len(kv.pools)}), the pools of kv; got {pool}")
    tensors = kv.pools[pool]
    code = format_code(kv.formats[pool], tensors)
    if pool in kv.offloaded:
        code |= OFFLOADED
    return (*tensors, code) if isinstance(tensors, tuple) else (tensors, None, code)


def parts(extra: Sequence[Tensor] | None, plan: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """The tensors of these options of the attention ops, by what they are called in messages."""
    named = dict(zip(("extra k", "extra v", "extra bias"), extra or ()))
    named.update(zip(("plan.nodes", "plan.order", "plan.leaf"), plan or ()))
    return named


def bad_window(op: str, left: int, right: int) -> NoReturn:
    rule = "left must be at least 0, or -1 for all" if left < -1 else "attention is causal, so right must be -1 or 0"
    raise ValueError(f"{op}: window = ({left}, {right}): {rule}")


def no_split(op: str) -> NoReturn:
    """0 is how the op is told None."""
    raise ValueError(f"{op}: split_tokens must be a positive multiple of 16 (or None), got 0")


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    """For grad mode: an op without a backward must not be asked for one in silence."""
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise ValueError(
                f"{op}: {name} requires grad, but the op has no backward; call it under torch.no_grad() "
                f"or pass {name}.detach()"
            )


def written(*tensors: Tensor | None) -> None:
    """Counts a write into tensors of the caller, as torch's own in-place ops do, under no_grad too: a backward pass
    that has saved one of them then refuses to run, where it would compute a wrong gradient."""
    if not is_compiling():  # functionalisation counts there
        for t in tensors:
            if t is not None:
                increment_version(t)  # passes over those of inference mode, which have no counter


def same_device(op: str, **tensors: Tensor | None) -> None:
    """For fake kernels, which also answer calls that mix meta tensors with others."""
    given = [(name, t.device) for name, t in tensors.items() if t is not None]
    first, device = given[0]
    for name, other in given:
        if other != device:
            raise ValueError(f"{op}: {name} is on {other}, but {first} is on {device}")
