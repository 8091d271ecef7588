"""What every op does with the arguments it is given, over all ops: tensors it writes, values of a wrong type."""

from typing import Any

import pytest
import torch
from backends import on_cpu_only
from conftest import tensors_of, to_device
from torch import Tensor

import kvkernels as kk
from kvkernels.ops import OPS, _scores

# Where a wrapper finds its op; the rest are made of those.
FOUND: dict[str, tuple[Any, str]] = {name: (op, "_op") for name, op in OPS.items() if hasattr(op, "_op")}
FOUND["score_tokens"] = (_scores, "_score_tokens")


def first_case(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return to_device(OPS[name].make(OPS[name].cases()[0]))


@pytest.mark.once
@pytest.mark.traced
@pytest.mark.parametrize("name", FOUND)
def test_a_write_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the version of each tensor of the caller that the schema calls written, under no_grad too, and of no other."""
    args, options = first_case(name)
    with torch.no_grad():
        result = getattr(kk, name)(*args, **options)
    if "out" in getattr(kk, name).__annotations__:
        options["out"] = result[0] if options.get("return_lse") else result
    own = {id(t) for t in tensors_of((args, options))}
    flat: list[tuple[bool, Tensor, int]] = []
    real = getattr(*FOUND[name])

    def record(*given: Any) -> Any:
        for argument, value in zip(real._schema.arguments, given):
            written = argument.alias_info is not None and argument.alias_info.is_write
            tensors = tensors_of(tuple(value) if isinstance(value, list) else value)
            flat.extend((written, t, t._version) for t in tensors if id(t) in own)
        return real(*given)

    monkeypatch.setattr(*FOUND[name], record)
    with torch.no_grad():
        getattr(kk, name)(*args, **options)
    assert flat
    for written, t, version in flat:
        assert t._version == version + written


@on_cpu_only
def test_a_changed_tensor_has_no_gradient() -> None:
    """A backward pass that saved a state refuses to run once a later step has changed it."""
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 16, 1, 8, generator=gen) for _ in range(3))
    pool = torch.randn(2, 1, 8, 8, generator=gen)
    slots = torch.arange(2, dtype=torch.int32)

    def step() -> None:
        kk.delta_rule_step(q[:, 0], k[:, 0], v[:, 0], None, state=pool, slots=slots)

    k.requires_grad_()
    o = kk.delta_rule(q, k, v, None, initial_state=pool)
    with torch.no_grad():
        step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
    with torch.inference_mode():
        pool = pool.clone()
    with torch.no_grad():
        step()  # a tensor of inference mode counts nothing
