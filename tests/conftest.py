"""What all tests share: where ops run, poisoned memory, thread counts, and the rule by which a kernel passes."""

from collections.abc import Callable, Iterator
from typing import Any

import backends
import pytest
import torch
from torch import Tensor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: begun last, they would leave all workers but one without work."""
    items.sort(key=lambda item: item.path.name not in ("test_install.py", "test_bench.py"))


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ops run where tests/backends.py says, but in tests marked `traced`, which hand an op to a compiler as it is."""
    if request.node.get_closest_marker("traced"):
        yield
        return
    with backends.schedule(request.node.nodeid), backends.on_backend():
        yield


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """torch.empty and torch.empty_like give NaN (integers: all ones), so that a row a kernel forgot to write shows."""
    real = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            t = allocate(*args, **kwargs)
            if type(t) is Tensor and t.device.type == "cpu":  # not the fake tensors of a compiler
                with torch.no_grad():
                    t.fill_(float("nan") if t.is_floating_point() else -1 if t.dtype.is_signed else 255)
            return t

        return wrapper

    for name, allocate in real.items():
        setattr(torch, name, poisoned(allocate))
    yield
    for name, allocate in real.items():
        setattr(torch, name, allocate)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """References are many small ops, for which the threads of a busy machine only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def error(x: Tensor, exact: Tensor) -> float:
    """Largest difference. NaN and Inf must stand in the same places."""
    x, exact = x.double(), exact.double()
    assert x.shape == exact.shape
    finite = exact.isfinite()
    torch.testing.assert_close(x.where(~finite, 0.0), exact.where(~finite, 0.0), equal_nan=True, rtol=0, atol=0)
    assert x[finite].isfinite().all(), "NaN or Inf where the reference has a number"
    return (x - exact).where(finite, 0.0).abs().max().item() if x.numel() else 0.0


def assert_as_good_as(kernel: Tensor, plain: Tensor, exact: Tensor, what: str = "result", tiny: float = 1e-6) -> None:
    """error(kernel) <= 2 * error(plain PyTorch in the same dtype) + tiny, both against float64."""
    finite = exact[exact.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    tiny = (1e-14 if kernel.dtype == torch.float64 else tiny) * max(scale, 1.0)
    got, bound = error(kernel, exact), 2 * error(plain, exact) + tiny
    assert got <= bound, f"{what}: error {got:.3g}, plain PyTorch allows {bound:.3g}, values up to {scale:.3g}"


def rounding(x: Tensor) -> float:
    """What rounding to x's dtype may change at x's largest value; 0 for float32, whose bounds are in the tests."""
    return 0.0 if x.dtype == torch.float32 else x.abs().max().item() * torch.finfo(x.dtype).eps / 2


def to_device(x: Any) -> Any:
    """Nested arguments with their tensors on the device of the tests, with the same strides."""
    if isinstance(x, Tensor):
        moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=backends.DEVICE)
        return moved.copy_(x)
    if isinstance(x, dict):
        return {k: to_device(v) for k, v in x.items()}
    if isinstance(x, tuple):
        parts = [to_device(v) for v in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x


def tensors_of(x: Any) -> list[Tensor]:
    """All tensors in nested tuples and dicts, in order."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = tuple(x.values())
    return [t for part in x for t in tensors_of(part)] if isinstance(x, (tuple, list)) else []
