"""The emulator finds planted mistakes, says nothing of kernels without any, and knows where the PTX ISA puts what.

The modules kvkernels_simt_selftest_{fast,check} are built by CMake (-DKVKERNELS_SIMT=ON, target simt) into build/simt;
KVKERNELS_SIMT_DIR names another folder. The schedule, with its seed, is part of each test's name.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytestmark = pytest.mark.once

FOLDER = Path(os.environ.get("KVKERNELS_SIMT_DIR", Path(__file__).parents[2] / "build" / "simt"))
SCHEDULES: dict[str, dict[str, Any]] = {
    "ascending-late": {"threads": "ascending", "blocks": "ascending", "copies": "late"},
    "descending-early": {"threads": "descending", "blocks": "descending", "copies": "early"},
    "random3-late": {"threads": "random", "blocks": "random", "copies": "late", "seed": 3},
    "random4-early": {"threads": "random", "blocks": "random", "copies": "early", "seed": 4},
    "random5-resident4": {"threads": "random", "blocks": "random", "copies": "random", "seed": 5, "resident": 4},
}
PREEMPTED = {
    f"random{seed}-preempted": {
        "threads": "random",
        "blocks": "random",
        "copies": "random",
        "seed": seed,
        "resident": 3,
        "preempt": 5,
    }
    for seed in (6, 7, 8)
}


def module(flavour: str) -> Any:
    name = f"kvkernels_simt_selftest_{flavour}"
    if name not in sys.modules:
        path = FOLDER / f"{name}.so"
        if not path.exists():
            pytest.skip(f"{path} is not built (make simt, or cmake -DKVKERNELS_SIMT=ON and target simt)")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        sys.modules[name] = loaded
    return sys.modules[name]


@pytest.fixture(params=["fast", "check"])
def simt(request: pytest.FixtureRequest) -> Any:
    m = module(request.param)
    m.clear()
    m.options()
    return m


@pytest.fixture
def check() -> Any:
    m = module("check")
    m.clear()
    m.options()
    return m


# ---- the kernels: each function runs one, with or without a mistake, and returns (result, what is right, tolerance)
Result = tuple[np.ndarray, np.ndarray, float]


def output(m: Any, name: str, shape: Any, dtype: Any = np.float32) -> Any:
    return m.array(name, np.full(shape, np.nan if dtype == np.float32 else -1, dtype), writable=True)


def call(kernel: Any, *args: Any) -> None:
    """A launch with reports raises, as in the library, and errors() has them all."""
    try:
        kernel(*args)
    except RuntimeError as e:
        if "in kernel" not in str(e):
            raise


def decode(m: Any, bug: str) -> Result:
    rng = np.random.default_rng(1)
    page_size, kv_heads, heads, splits, max_pages = 4, 2, 8, 2, 60
    lens = np.array([225, 240], np.int32)  # the second sequence ends where the page table does
    pages = -(-lens // page_size)
    table = np.full((2, max_pages), 1 << 20, np.int32)  # an entry that must not be used leads out of the caches
    order = rng.permutation(pages.sum()).astype(np.int32)
    table[0, : pages[0]], table[1, : pages[1]] = order[: pages[0]], order[pages[0] :]
    q = rng.standard_normal((2, heads, 64)).astype(np.float16)
    k, v = rng.standard_normal((2, pages.sum(), page_size, kv_heads, 64)).astype(np.float16)
    right = np.zeros((2, heads, 64))
    for b in range(2):
        ks, vs = (x[table[b, : pages[b]]].reshape(-1, kv_heads, 64)[: lens[b]].astype(float) for x in (k, v))
        for h in range(heads):
            s = ks[:, h // 4] @ q[b, h].astype(float) / 8
            p = np.exp(s - s.max())
            right[b, h] = p @ vs[:, h // 4] / p.sum()
    for x in (k, v):
        x[table[0, pages[0] - 1], lens[0] % page_size :] = np.nan
    out = m.array("out", np.full((2, heads, 64), np.nan, np.float16).view(np.uint16), writable=True)
    call(
        m.decode,
        *(m.array(n, x.view(np.uint16)) for n, x in (("q", q), ("k", k), ("v", v))),
        m.array("page_table", table),
        m.array("seq_lens", lens),
        out,
        output(m, "partial_out", (2, heads, splits, 64)),
        output(m, "partial_ml", (2, heads, splits, 2)),
        bug,
    )
    return out.view(np.float16).astype(float), right, 3e-3


def scores(m: Any, bug: str) -> Result:
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((100, 64)).astype(np.float16), rng.standard_normal((70, 64)).astype(np.float16)
    s = output(m, "s", (100, 70))
    call(m.scores, m.array("q", q.view(np.uint16)), m.array("k", k.view(np.uint16)), s, bug)
    return s, q.astype(float) @ k.astype(float).T, 1e-3


def scan(m: Any, bug: str) -> Result:
    rng = np.random.default_rng(3)
    heads, tokens = 2, 40
    q, k, v = rng.standard_normal((3, heads, tokens, 64)).astype(np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.random((heads, tokens)).astype(np.float32)
    right = np.zeros(q.shape)
    for h in range(heads):
        state = np.zeros((64, 64))
        for t in range(tokens):
            state += np.outer(beta[h, t] * (v[h, t] - state @ k[h, t]), k[h, t])
            right[h, t] = state @ q[h, t]
    o = output(m, "o", q.shape)
    call(m.scan, *(m.array(n, x) for n, x in (("q", q), ("k", k), ("v", v), ("beta", beta))), o, bug)
    return o, right, 1e-3


def reverse_warps(m: Any, bug: str) -> Result:
    x = np.random.default_rng(4).random(512).astype(np.float32)
    out = output(m, "out", 512)
    call(m.reverse_warps, m.array("in", x), out, bug)
    return out, x.reshape(-1, 32)[:, ::-1].reshape(-1), 0


def total(m: Any, bug: str) -> Result:
    x = np.random.default_rng(5).integers(0, 100, 3000).astype(np.float32)
    out = output(m, "out", 1)
    counter = m.array("counter", np.zeros(1, np.uint32), writable=True)
    call(m.sum, m.array("in", x), output(m, "partial", 12), counter, out, bug)
    return out, x.sum(keepdims=True), 0


def histogram(m: Any, bug: str) -> Result:
    x = np.random.default_rng(6).integers(0, 16, 500).astype(np.int32)
    out = output(m, "out", 16, np.int32)
    call(m.histogram, m.array("in", x), out, bug)
    return out, np.bincount(x, minlength=16), 0


def running_sums(m: Any, bug: str) -> Result:
    x = np.random.default_rng(7).integers(0, 100, 8).astype(np.float32)
    out = output(m, "out", 32)
    call(m.running_sums, m.array("in", x), out, bug)
    return out, x.sum() + 8 * np.arange(32), 0


def rotate(m: Any, bug: str) -> Result:
    out = output(m, "out", 128 if bug == "shared_overrun" else 100)
    call(m.rotate, out, bug)
    return out, (np.arange(out.size) + 1) % out.size, 0


def reverse_block(m: Any, bug: str) -> Result:
    out = output(m, "out", 128)
    call(m.reverse_block, out, bug)
    return out, np.arange(127, -1, -1), 0


def handshake(m: Any, bug: str) -> Result:
    flag, out = m.array("flag", np.zeros(1, np.int32), writable=True), output(m, "out", 2, np.int32)
    call(m.handshake, flag, out)
    return out, np.array([42, 43]), 0


def count_up(m: Any, bug: str) -> Result:
    x = np.arange(64, dtype=np.float32)
    io = m.array("io", x, writable=bug != "read_only")
    call(m.count_up, io, "none" if bug == "read_only" else bug)
    return io, x + 1, 0


def lanes(m: Any, bug: str) -> Result:
    i = np.arange(32)
    right = np.empty((9, 32), int)
    right[0] = np.uint32(sum(1 << j for j in range(0, 32, 3))).astype(np.int32)
    right[1] = 1 + 2
    right[2] = 7**2
    right[3] = (i // 8 * 8 + 3) ** 2
    right[4] = np.where(i % 16 < 3, i, i - 3)
    right[5] = np.where(i % 16 > 12, i, i + 3)
    right[6] = i ^ 5
    right[7] = 496 - 1000
    right[8] = np.where(i < 16, 3, 16 + i % 4)
    out = output(m, "out", (9, 32), np.int32)
    call(m.lanes, out, bug)
    return out, right, 0


def shifts(m: Any, bug: str) -> Result:
    out = output(m, "out", 32, np.int32).view(np.uint32)
    call(m.shifts, m.array("in", np.arange(32, dtype=np.int32)), out, bug)
    return out, 1 << np.arange(32), 0


Kernel = Callable[[Any, str], Result]
KERNELS: list[Kernel] = [
    decode, scores, scan, reverse_warps, total, histogram, running_sums, rotate, reverse_block, count_up, lanes, shifts,
]  # fmt: skip


def run(m: Any, kernel: Kernel, bug: str) -> tuple[bool, list[str]]:
    """Is the result wrong, and what was reported?"""
    m.clear()
    got, right, tolerance = kernel(m, bug)
    return not bool(np.all(np.abs(got.astype(float) - right) <= tolerance)), m.errors()


@pytest.mark.parametrize("schedule", [*SCHEDULES, *PREEMPTED])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.__name__)
def test_right_without_reports(simt: Any, kernel: Kernel, schedule: str) -> None:
    simt.options(**{**SCHEDULES, **PREEMPTED}[schedule])
    wrong, reports = run(simt, kernel, "none")
    assert not reports
    assert not wrong


# ---- planted mistakes
class Planted(NamedTuple):
    kernel: Kernel
    bug: str
    report: str  # what the check build says, in every schedule; "": nothing, only the result is wrong
    fast: str  # under which schedules (FAST) the fast build gives a report or a wrong result


PLANTED = [
    Planted(decode, "no_barrier_after_wait", "data race in shared memory|uninitialised", "always"),
    Planted(decode, "short_shuffle", "", "always"),
    Planted(decode, "no_wait_for_first_tile", "cp.async is in flight", "late"),
    Planted(decode, "past_page_table", "read of 4 bytes outside .*\n.*'page_table'.* passes by 4 bytes", "always"),
    Planted(decode, "no_barrier_before_reuse", "data race in shared memory|cp.async is in flight", "early"),
    Planted(decode, "wide_store", "misaligned access", "always"),
    Planted(decode, "half_mask", "mask 0xffff, which does not name the caller", "always"),
    Planted(decode, "divergent_barrier", "barrier divergence|data race in shared memory", "always"),
    Planted(scores, "mma_no_barrier", "data race in shared memory|uninitialised", "always"),
    Planted(scores, "ldmatrix_order", "", "always"),
    Planted(scores, "mma_no_wait", "cp.async is in flight", "always"),
    Planted(scores, "accumulator_layout", "", "always"),
    Planted(scores, "row_past_end", "write of 4 bytes outside .*\n.*'s'", "always"),
    Planted(scan, "scan_no_barrier", "data race in shared memory", "always"),
    Planted(reverse_warps, "no_syncwarp", "data race in shared memory|uninitialised", "always"),
    Planted(reverse_warps, "split_syncwarp", "data race in shared memory|uninitialised", "always"),
    Planted(total, "last_by_block_index", "data race on array 'partial'", "order"),
    Planted(histogram, "histogram_without_atomics", "data race in shared memory", "never"),
    Planted(running_sums, "local_overrun", "index outside an array", "always"),
    Planted(rotate, "early_return", "has exited the kernel|have exited the kernel", "always"),
    Planted(rotate, "shared_overrun", "index outside an array", "always"),
    Planted(reverse_block, "dynamic_too_small", "outside the 256 dynamic bytes", "always"),
    Planted(count_up, "misaligned", "misaligned access", "always"),
    Planted(count_up, "read_only", "write to read-only array 'io' at byte", "never"),
    Planted(lanes, "exited_lane", "reads lane 31, which has exited", "always"),
    Planted(shifts, "shift", "shift by more than the type has bits", "always"),
]
FAST = {
    "always": list(SCHEDULES),
    "late": ["ascending-late", "random3-late"],
    "early": ["descending-early", "random4-early"],
    "order": ["descending-early", "random3-late", "random4-early", "random5-resident4"],
    "never": [],
}


def test_every_bug_is_planted(simt: Any) -> None:
    assert sorted(p.bug for p in PLANTED) == sorted({*simt.BUGS, "read_only"} - {"none"})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("planted", PLANTED, ids=lambda p: p.bug)
def test_check_build_finds(check: Any, planted: Planted, schedule: str) -> None:
    check.options(**SCHEDULES[schedule])
    wrong, reports = run(check, planted.kernel, planted.bug)
    if not planted.report:
        assert wrong
        assert not reports
        return
    found = [r for r in reports if re.search(planted.report, r)]
    assert found, reports
    assert re.search(r"\w+\.cu:\d+ in .*\n    in kernel selftest::\w+_kernel", found[0]), found[0]


@pytest.mark.parametrize(
    ("planted", "schedule"),
    [pytest.param(p, s, id=f"{p.bug}-{s}") for p in PLANTED for s in FAST[p.fast]],
)
def test_fast_build_finds(planted: Planted, schedule: str) -> None:
    m = module("fast")
    m.options(**SCHEDULES[schedule])
    wrong, reports = run(m, planted.kernel, planted.bug)
    assert wrong or reports


# ---- known memory
def test_regions(check: Any) -> None:
    """Memory of numpy, as bind hands over a tensor: known for a while, by name and to the byte."""
    x = np.zeros(66, np.float32)

    def reports() -> str:
        check.clear()
        call(check.count_up, x[:64], "none")
        return "\n".join(check.errors())

    assert reports() == ""  # nothing is known: nothing is checked
    other = np.zeros(4, np.float32)
    check.add_region("other", other, True)
    assert re.search("outside every known array.*\n    nearest array: 'other' \\(16 bytes\\)", reports())
    check.add_region("x", x[:64], False)
    assert "write to read-only array 'x' at byte" in reports()
    check.add_region("again", x, True)  # an output that lies over an input
    assert reports() == ""
    check.clear_regions()
    check.add_region("short", x[:63], True)
    assert re.search("nearest array: 'short' \\(252 bytes\\), whose end the access passes by 4 bytes", reports())
    check.clear_regions()
    assert reports() == ""


def test_a_region_has_two_names(check: Any) -> None:
    """Reads through a read-only name race with writes through another."""
    x = np.ones(3000, np.float32)
    counter, out = np.zeros(1, np.uint32), np.zeros(1, np.float32)
    check.add_region("in", x, False)
    check.add_region("partial", x[:12], True)
    check.add_region("counter", counter, True)
    check.add_region("out", out, True)
    call(check.sum, x, x[:12], counter, out, "none")
    assert any("data race on array" in r for r in check.errors())
    check.clear_regions()


def test_guard_page(simt: Any) -> None:
    """Even the fast build sees what passes the end of an array of its own."""
    io = simt.array("io", np.zeros(60, np.float32), writable=True)
    view = np.lib.stride_tricks.as_strided(io, (64,))
    with pytest.raises(RuntimeError, match="'io'"):
        simt.count_up(view, "none")
    simt.clear()


def test_arrays_are_freed(check: Any) -> None:
    a = check.array("a", np.arange(10))
    part = a[3:]
    del a
    assert part.tolist() == list(range(3, 10))
    check.count_up(check.array("io", np.zeros(64, np.float32), writable=True), "none")
    assert check.errors() == []


# ---- launches and schedules
def test_a_failed_launch_is_over(simt: Any) -> None:
    """The launch is abandoned and said to have failed, once; the next one runs."""
    out = output(simt, "out", (9, 32), np.int32)
    with pytest.raises(RuntimeError, match="reads lane 31, which has exited"):
        simt.lanes(out, "exited_lane")
    assert (out[5:] == -1).all()
    assert len(simt.errors()) == 1
    assert run(simt, lanes, "none") == (False, [])


def test_shared_memory_limit(simt: Any) -> None:
    simt.options(smem=511)
    with pytest.raises(RuntimeError, match=r"invalid launch: .* 512 bytes of dynamic shared memory"):
        simt.reverse_block(output(simt, "out", 128), "none")


def test_blocks_that_wait_for_each_other(simt: Any) -> None:
    """They need to be resident together, as on a GPU; otherwise the wait is said to be endless."""
    for threads in ("ascending", "descending", "random"):
        simt.options(threads=threads, blocks="descending", resident=2)
        assert run(simt, handshake, "") == (False, [])
    simt.options(blocks="descending")
    wrong, reports = run(simt, handshake, "")
    assert wrong
    assert "what it waits for never comes" in reports[0]


def test_a_seed_is_a_schedule(check: Any) -> None:
    def report(seed: int) -> list[str]:
        check.options(threads="random", blocks="random", seed=seed, preempt=7)
        return run(check, histogram, "histogram_without_atomics")[1]

    assert report(1) == report(1)
    assert len({tuple(report(seed)) for seed in range(10)}) > 1


def test_options(simt: Any) -> None:
    with pytest.raises(ValueError, match="threads must be one of ascending, descending, random; got up"):
        simt.options(threads="up")
    with pytest.raises(ValueError, match="copies must be one of late, early, random; got now"):
        simt.options(copies="now")
    with pytest.raises(ValueError, match=r"resident must be in 1\.\.4; got 5"):
        simt.options(resident=5)


def test_every_instruction_has_a_twin() -> None:
    """What ptx.cuh has for nvcc and what the emulator has: the same functions."""
    root = Path(__file__).parents[2]
    real, emulated = (
        sorted(re.findall(r"^(?:__device__ __forceinline__|inline) \w+ (\w+)\(", (root / f).read_text(), re.M))
        for f in ("csrc/cuda/ptx.cuh", "tests/simt/simt_ptx.h")
    )
    assert real == emulated
    assert "mma_m16n8k16_f16" in real


# ---- where matrix instructions keep their elements, from the PTX ISA, "Matrix Fragments for mma.m16n8k16 with
# floating point type", "ldmatrix" and "movmatrix"
LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4  # groupID, threadID_in_group


def a_place(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of A's element i, of each lane."""
    row = GROUP if 0 <= i < 2 or 4 <= i < 6 else GROUP + 8
    return row, MEMBER * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(i: int) -> tuple[np.ndarray, np.ndarray]:
    return MEMBER * 2 + (i & 1) + (8 if i >= 2 else 0), GROUP


def c_place(i: int) -> tuple[np.ndarray, np.ndarray]:
    return GROUP if i < 2 else GROUP + 8, MEMBER * 2 + (i & 1)


def encode(x: np.ndarray, bf16: bool) -> np.ndarray:
    if not bf16:
        return x.astype(np.float16).view(np.uint16)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def mma(m: Any, bf16: bool, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """d of a [16][16] and b [16][8], given as the bits of 16-bit numbers, and c [16][8]."""
    in_a, in_b, in_c = np.empty((32, 8), np.uint16), np.empty((32, 4), np.uint16), np.empty((32, 4), np.float32)
    for i in range(8):
        in_a[:, i] = a[a_place(i)]
    for i in range(4):
        in_b[:, i], in_c[:, i] = b[b_place(i)], c[c_place(i)]
    out = output(m, "d", (32, 4))
    m.mma(bf16, m.array("a", in_a.view(np.uint32)), m.array("b", in_b.view(np.uint32)), m.array("c", in_c), out)
    d = np.full((16, 8), np.nan)
    for i in range(4):
        d[c_place(i)] = out[:, i]
    return d


@pytest.mark.parametrize("bf16", [False, True], ids=["f16", "bf16"])
def test_mma_places(simt: Any, bf16: bool) -> None:
    """Each element has a value of its own, and a unit matrix carries it to where it can be seen."""
    zero = np.zeros((16, 8), np.float32)
    a = np.arange(1, 257, dtype=np.float32).reshape(16, 16)
    for half in range(2):
        unit = np.zeros((16, 8), np.float32)
        unit[8 * half : 8 * half + 8] = np.eye(8)
        d = mma(simt, bf16, encode(a, bf16), encode(unit, bf16), zero)
        np.testing.assert_array_equal(d, a[:, 8 * half : 8 * half + 8])
    b = np.arange(1, 129, dtype=np.float32).reshape(16, 8)
    np.testing.assert_array_equal(mma(simt, bf16, encode(np.eye(16), bf16), encode(b, bf16), zero), b)
    c = np.arange(128, dtype=np.float32).reshape(16, 8)
    np.testing.assert_array_equal(mma(simt, bf16, encode(np.zeros((16, 16)), bf16), encode(zero, bf16), c), c)
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    np.testing.assert_array_equal(mma(simt, bf16, encode(a, bf16), encode(b, bf16), c), a @ b + c)


def test_mma_numbers(simt: Any) -> None:
    """Every fp16 number is what it is, subnormal ones and infinities too."""
    every = np.arange(1 << 16, dtype=np.uint16)
    unit = np.zeros((16, 8), np.float16)
    unit[:8] = np.eye(8)
    zero = np.zeros((16, 8), np.float32)
    finite = every[np.isfinite(every.view(np.float16))]
    for part in finite.reshape(-1, 16, 8)[::7]:  # 7: a part of them in each build, all exponents
        a = np.concatenate([part, np.zeros((16, 8), np.uint16)], 1)
        got = mma(simt, False, a, unit.view(np.uint16), zero)
        np.testing.assert_array_equal(got, part.view(np.float16).astype(np.float64))
    special = np.zeros((16, 16), np.float16)
    special[:3, 0] = np.inf, -np.inf, np.nan
    got = mma(simt, False, special.view(np.uint16), np.ones((16, 8), np.float16).view(np.uint16), zero)
    np.testing.assert_array_equal(got[:4, 0], [np.inf, -np.inf, np.nan, 0])


# "Matrix Fragments for mma.m16n8k8", .tf32; C and D lie as above.
def tf32_a_place(i: int) -> tuple[np.ndarray, np.ndarray]:
    return GROUP if i in (0, 2) else GROUP + 8, MEMBER if i < 2 else MEMBER + 4


def tf32_b_place(i: int) -> tuple[np.ndarray, np.ndarray]:
    return MEMBER + 4 * i, GROUP


def mma_tf32(m: Any, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """d of a [16][8], b [8][8] and c [16][8]."""
    in_a, in_b, in_c = (np.empty((32, n), np.float32) for n in (4, 2, 4))
    for i in range(4):
        in_a[:, i], in_c[:, i] = a[tf32_a_place(i)], c[c_place(i)]
    for i in range(2):
        in_b[:, i] = b[tf32_b_place(i)]
    out = output(m, "d", (32, 4))
    m.mma_tf32(m.array("a", in_a), m.array("b", in_b), m.array("c", in_c), out)
    d = np.full((16, 8), np.nan)
    for i in range(4):
        d[c_place(i)] = out[:, i]
    return d


def test_mma_tf32_places(simt: Any) -> None:
    zero = np.zeros((16, 8), np.float32)
    a = np.arange(1, 129, dtype=np.float32).reshape(16, 8)
    np.testing.assert_array_equal(mma_tf32(simt, a, np.eye(8), zero), a)
    b = np.arange(1, 65, dtype=np.float32).reshape(8, 8)
    np.testing.assert_array_equal(mma_tf32(simt, np.eye(16, 8), b, zero)[:8], b)
    np.testing.assert_array_equal(mma_tf32(simt, np.eye(16, 8, -8), b, zero)[8:], b)
    c = np.arange(128, dtype=np.float32).reshape(16, 8)
    np.testing.assert_array_equal(mma_tf32(simt, zero, np.zeros((8, 8)), c), c)
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    np.testing.assert_array_equal(mma_tf32(simt, a, b, c), a @ b + c)


def test_mma_tf32_numbers(simt: Any) -> None:
    """Operands lose their low 13 bits; tf32() rounds, and keeps infinities and NaN."""
    x = np.array([1 + 2**-10 + 2**-11, 1 + 2**-23, -(2 - 2**-23), 2**-126, np.inf, -np.inf, np.nan, 3e38], np.float32)
    a = np.zeros((16, 8), np.float32)
    a[:8, 0] = x
    zero = np.zeros((16, 8), np.float32)
    truncated = np.array([1 + 2**-10, 1, -(2 - 2**-10), 2**-126, np.inf, -np.inf, np.nan], np.float32)
    got = mma_tf32(simt, a, np.eye(8)[:, [0] * 8], zero)
    np.testing.assert_array_equal(got[:7, 0], truncated)
    out = output(simt, "out", 32)
    simt.tf32(simt.array("in", np.resize(x, 32)), out)
    nearest = np.array([1 + 2**-9, 1, -2, 2**-126, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(out[:7], nearest)
    random = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    simt.tf32(simt.array("in", random), out)
    assert not (out.view(np.uint32) & 0x1FFF).any()
    assert (np.abs(out - random) <= np.abs(random) * 2**-11).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_places(simt: Any, transposed: bool) -> None:
    """x4: lane 8 i + r gives the address of row r of matrix i; register i holds two neighbours of its row lane / 4."""
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out = output(simt, "out", (32, 4), np.int32).view(np.uint32)
    simt.ldmatrix(transposed, simt.array("in", matrices), out)
    stored = matrices.transpose(0, 2, 1) if transposed else matrices
    for i in range(4):
        low, high = out[:, i] & 0xFFFF, out[:, i] >> 16
        np.testing.assert_array_equal(low, stored[i, GROUP, 2 * MEMBER])
        np.testing.assert_array_equal(high, stored[i, GROUP, 2 * MEMBER + 1])


def test_movmatrix_places(simt: Any) -> None:
    matrix = np.arange(64, dtype=np.uint32).reshape(8, 8)

    def fragment(x: np.ndarray) -> np.ndarray:
        return x[GROUP, 2 * MEMBER] | x[GROUP, 2 * MEMBER + 1] << 16

    out = output(simt, "out", 32, np.int32).view(np.uint32)
    simt.movmatrix(simt.array("in", fragment(matrix)), out)
    np.testing.assert_array_equal(out, fragment(matrix.T))
