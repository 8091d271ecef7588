"""Where the ops of a test run: CPU kernels; CUDA kernels in the emulator; CUDA kernels on a GPU.

    pytest                                                          the CPU kernels
    KVKERNELS_LIBRARY=build/simt/kvkernels_simt_check.so pytest     the CUDA kernels, on this machine's CPU (tests/simt)
    KVKERNELS_TEST_DEVICE=cuda pytest                               the CUDA kernels, on a GPU

In the last two every CPU tensor that an op is given is copied, gaps between its rows included: into memory that ends at
a guard page, or onto the GPU. What the op wrote is copied back. A tensor that is on the GPU already stays there.

KVKERNELS_SIMT       late (default) | early | random: when the emulator lets cp.async land
KVKERNELS_SIMT_SEED  order of threads and blocks; unless this is set every test has its own, printed when it fails
"""

import ctypes
import importlib.util
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kvkernels._library import LIBRARY
from kvkernels.ops import OPS

SIMT: bool = json.loads(torch.ops.kvkernels.build_info())["simt"]
DEVICE = os.environ.get("KVKERNELS_TEST_DEVICE", "cpu")
GPU = DEVICE.startswith("cuda")
CPU = not SIMT and not GPU  # the CPU kernels
# AddressSanitizer is in this process, and looks at what kernels touch. Builds without it compare what the same calls
# compute: references take seven times as long as the kernels here.
SANITIZED = hasattr(ctypes.CDLL(None), "__asan_init")

# Of queries where a test does not care: the CUDA kernels multiply 16-bit numbers.
Q_DTYPE = torch.float32 if CPU else torch.bfloat16

on_gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU: KVKERNELS_TEST_DEVICE=cuda")
on_cpu_only = pytest.mark.skipif(not CPU, reason="about the CPU kernels")
not_emulated = pytest.mark.skipif(SIMT, reason="not in the emulator")


def _emulator() -> ModuleType:
    """The library itself, which is a Python module too."""
    spec = importlib.util.spec_from_file_location(LIBRARY.stem, LIBRARY)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulator = _emulator() if SIMT else None


@contextmanager
def schedule(name: str) -> Iterator[None]:
    """Runs kernels in a random order that the name of the test decides; fails on any report of the emulator."""
    if emulator is None:
        yield
        return
    copies = os.environ.get("KVKERNELS_SIMT", "late")
    seed = int(os.environ.get("KVKERNELS_SIMT_SEED") or zlib.crc32(name.encode()))
    print(f"emulator: KVKERNELS_LIBRARY={LIBRARY} KVKERNELS_SIMT={copies} KVKERNELS_SIMT_SEED={seed}")
    emulator.clear()
    emulator.options(
        threads="random",
        blocks="random",
        copies=copies,
        seed=seed,
        resident=1 + seed % 3,
        preempt=200 if emulator.checking else 0,
    )
    try:
        yield
    finally:
        reports = emulator.errors()
        emulator.clear()
        if reports:
            pytest.fail("the emulator reports:\n\n" + "\n\n".join(reports), pytrace=False)


def place(name: str, t: Tensor, written: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The copy of a tensor that the op gets, and as bytes the copy and the original, gaps included. The copy begins as
    far from a multiple of 16 as the original does."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
    flat = t.as_strided((span,), (1,), t.storage_offset()).view(torch.uint8)
    lead = t.data_ptr() % 16
    data = torch.cat((torch.full((lead,), 0xFF, dtype=torch.uint8), flat))
    data = torch.from_numpy(emulator.array(name, data.numpy(), writable=written)) if emulator else data.to(DEVICE)
    copy = data[lead:]
    return copy.view(t.dtype).as_strided(t.shape, t.stride()), copy, flat


def within(t: Tensor, other: Tensor) -> bool:
    """Does t lie in the memory of `other`, as the values of MLA do in the keys?"""
    if t.dtype != other.dtype or t.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return False
    first = [x.storage_offset() for x in (t, other)]
    last = [x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) for x in (t, other)]
    return first[0] >= first[1] and last[0] <= last[1]


def home(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(t.cpu() for t in result)
    return result.cpu() if isinstance(result, Tensor) else result


def elsewhere(op: Any) -> Callable[..., Any]:
    """The op on copies of its tensors."""
    arguments = op._schema.arguments

    def call(*args: Any) -> Any:
        if any(isinstance(a, Tensor) and a.requires_grad and torch.is_grad_enabled() for a in args):
            return home(op(*(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args)))
        written: list[tuple[Tensor, Tensor]] = []
        read: list[tuple[Tensor, Tensor]] = []

        def put(name: str, a: Any, write: bool) -> Any:
            if isinstance(a, (list, tuple)):
                return [put(name, x, write) for x in a]
            if not isinstance(a, Tensor) or a.device.type != "cpu":
                return a
            if a.numel() == 0:
                return a.to(DEVICE)
            for whole, copy in () if write else read:
                if within(a, whole):
                    offset = copy.storage_offset() + a.storage_offset() - whole.storage_offset()
                    return copy.as_strided(a.shape, a.stride(), offset)
            copy, mine, original = place(name, a, write)
            if write:
                written.append((original, mine))
            else:
                read.append((a, copy))
            return copy

        with torch.no_grad():
            moved = [
                put(arg.name, a, arg.alias_info is not None and arg.alias_info.is_write)
                for arg, a in zip(arguments, args)
            ]
            try:
                result = op(*moved)
            finally:
                for original, mine in written:
                    original.copy_(mine)
            return home(result)

    return call


@contextmanager
def on_backend() -> Iterator[None]:
    """Ops called through kvkernels run where this file's first lines say."""
    if CPU:
        yield
        return
    names = ("_op", "_plain_op", "_backward_op")  # some modules call others
    real = {(module, n): getattr(module, n) for module in OPS.values() for n in names if hasattr(module, n)}
    for (module, name), op in real.items():
        setattr(module, name, elsewhere(op))
    try:
        yield
    finally:
        for (module, name), op in real.items():
            setattr(module, name, op)


def sixteen_bits(case: dict[str, Any]) -> dict[str, Any]:
    """A case of attention as the CUDA kernels take it: bfloat16 q where a page is, which float16 cannot hold."""
    if CPU or case["dtype"] == "bfloat16":
        return case
    return {**case, "dtype": "bfloat16" if "bf16" in str(case.get("cache", case.get("formats"))) else "float16"}


for _name in ("quant_attention", "flash_decode", "prefix_attention", "sparse_attention"):
    _op = OPS[_name]
    _op.make = lambda case, seed=0, make=_op.make: make(sixteen_bits(case), seed)  # type: ignore[attr-defined]
