"""What every op promises, over all ops and all their cases: right against the reference, poison left alone, the same
bits for any thread count, usable by torch.compile. A new op is tested by being in kvkernels/ops."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import CPU, DEVICE, GPU, Q_DTYPE, SANITIZED, not_emulated
from conftest import assert_as_good_as, rounding, tensors_of, to_device
from torch import Tensor

import kvkernels as kk
from kvkernels.formats import CODECS
from kvkernels.ops import OPS, _attention, _reference

Case = dict[str, Any]
CASES = [(name, case) for name, op in OPS.items() for case in op.cases()]


def label(name: str, case: Case) -> str:
    """The op and what the case does not share with the op's first case."""
    first = OPS[name].cases()[0]
    own = {k: v for k, v in case.items() if first.get(k) != v}
    return "-".join([name, *(f"{k}={v}".replace(" ", "").replace("'", "") for k, v in own.items())])


def as_tuple(x: Any) -> tuple[Tensor, ...]:
    return tuple(tensors_of(x))


@pytest.mark.parametrize(("name", "case"), CASES, ids=[label(*c) for c in CASES])
def test_matches_reference(name: str, case: Case, threads: Callable[[int], None]) -> None:
    op, function = OPS[name], getattr(kk, name)
    made = op.make(case)
    in_place = getattr(op, "IN_PLACE", ())  # where the reference returns what the op leaves there
    exact: tuple[Any, ...] = ()
    plain: tuple[Any, ...] = ()
    if not SANITIZED:
        args, kwargs = copy.deepcopy(made)
        exact = as_tuple(op.reference(*args, **{**kwargs, "dtype": torch.float64}))  # may write into its args
        written = tensors_of(args)
    for n in (1, 2) if CPU else (1,):
        args, kwargs = copy.deepcopy(made)
        threads(n)
        got = as_tuple((function(*args, **kwargs), *(kwargs[name] for name in in_place)))
        threads(1)
        if SANITIZED:
            continue
        assert len(got) == len(exact)
        if got and not plain:
            fresh, kwargs = copy.deepcopy(made)
            plain = as_tuple(op.reference(*fresh, **{**kwargs, "dtype": got[0].dtype}))
        for i, result in enumerate(got):
            if not result.is_floating_point():
                assert torch.equal(result, exact[i]), f"result {i} with {n} threads"
                continue
            assert_as_good_as(result, plain[i], exact[i], f"result {i} with {n} threads")
        for mine, truth in zip(tensors_of(args), written):
            # bytes, ids, and arguments that are only read
            torch.testing.assert_close(mine, truth, rtol=0, atol=0, equal_nan=True)


ALL_OPTIONS = {**_attention.TOGETHER, "Hq": 8, "head_map": (1, 0, 1, 1, 1, 1, 1, 0)}
SPLIT: list[Case] = [
    {"formats": ("u2",), "Tq": 1},
    {"formats": ("bf16",), "Tq": 1},
    {"formats": ("bf16", "u2", "m31/t1"), "Tq": 3, "window": 500},
    {"formats": ("kivi2", "u3/b1.e5m3"), "Tq": 2, "softcap": 9.0, "sinks": True, "alibi": 2},
    {"formats": ("f16 NHD",), "Tq": 1, "dtype": "bfloat16"},
    {**ALL_OPTIONS, "formats": ("bf16",)},
    {**ALL_OPTIONS, "formats": ("m42/u2", "t1", "u4"), "transform": True},
    {"op": "flash_decode", "cache": "bf16 MLA", "D": 576, "Hk": 1, "Hv": 1, "Hq": 16},
    {"op": "flash_decode", "cache": "bf16 NHD", "Hk": 4, "Hv": 2, "page_size": 5},
    {"op": "sparse_attention", "of": "pages", "formats": ("bf16",)},
    {"op": "sparse_attention", "of": "tokens", "formats": ("bf16", "u2", "m31/t1"), "transform": True, "Tq": 2},
    {"op": "sparse_attention", "of": "entries", "formats": ("kivi2", "u3/u2"), "window": 900},
]


@pytest.mark.parametrize("split_tokens", [16, 128, 1 << 20])
@pytest.mark.parametrize("case", SPLIT, ids=[label(c.get("op", "quant_attention"), c) for c in SPLIT])
def test_bits_do_not_depend_on_threads_or_company(
    case: Case, split_tokens: int, threads: Callable[[int], None]
) -> None:
    full: Case = {"Hq": 8, "Hkv": 2, "D": 128, "page_size": 32, "dtype": "float32", "Tq": 1, **case,
                  "part": 0.5, "lens": (700, 33, 0, 1, 1500)}  # fmt: skip
    name = case.get("op", "quant_attention")
    attend = getattr(kk, name)
    (q, *cache, table, lens), options = OPS[name].make(full)
    options["split_tokens"] = split_tokens
    threads(1)
    out, lse = attend(q, *cache, table, lens, **options)
    threads(2 if CPU else 1)
    for rows in (slice(0, 5), *(slice(i, i + 1) for i in range(5)), slice(1, 4)):
        some = dict(options)
        for option, value in options.items():
            if option in ("tree_mask", "alibi_slopes") and value.dim() == 2:
                some[option] = value[rows]
            elif option == "extra":
                some[option] = tuple(x[rows] for x in value)
            elif option in ("pages", "tokens", "entries"):
                some[option] = value[rows]
        part, part_lse = attend(q[rows], *cache, table[rows], lens[rows], **some)
        assert torch.equal(part, out[rows])
        assert torch.equal(part_lse, lse[rows])


def test_read_kv_writes_where_it_is_told() -> None:
    op = OPS["read_kv"]
    (kv, pool, slots), _ = op.make({**op.cases()[0], "format": "u2"})
    k, v = kk.read_kv(kv, pool, slots, torch.bfloat16)
    out = torch.full_like(k, float("nan")), torch.full_like(v, float("nan"))
    assert kk.read_kv(kv, pool, slots, out=out)[0] is out[0]
    assert torch.equal(out[0], k)
    assert torch.equal(out[1], v)
    with pytest.raises(ValueError, match="k must be contiguous"):
        kk.read_kv(kv, pool, slots, out=(out[0].transpose(0, 1).contiguous().transpose(0, 1), out[1]))


def test_out_and_lse_options() -> None:
    case = {
        "Tq": 2,
        "Hq": 4,
        "Hkv": 2,
        "D": 64,
        "page_size": 16,
        "lens": (40, 3),
        "dtype": "float16",
        "formats": ("u4",),
    }
    args, options = OPS["quant_attention"].make(case)
    out, lse = kk.quant_attention(*args, **options)
    assert lse.dtype == torch.float32
    assert lse.shape == (2, 2, 4)
    assert torch.equal(kk.quant_attention(*args), out)
    wide = torch.full((2, 2, 4, 100), 7.0, dtype=torch.float16)
    given = wide[..., 20:84]
    assert kk.quant_attention(*args, out=given) is given
    assert torch.equal(given, out)
    assert (wide[..., :20] == 7).all()
    assert (wide[..., 84:] == 7).all()


def test_records_and_caches_agree() -> None:
    """The same bf16 numbers as a page record, as NHD and as HND caches: the same result from each."""
    gen = torch.Generator().manual_seed(1)
    k, v = (torch.randn(5, 2, 32, 64, generator=gen).bfloat16() for _ in range(2))
    record = torch.stack((k, v), 2).flatten(2).view(torch.uint8)
    bf16 = kk.format("bf16")
    pools: list[Any] = [record, (k, v), tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))]
    table, lens = torch.tensor([[3, 0, 4]], dtype=torch.int32), torch.tensor([77], dtype=torch.int32)
    q = torch.randn(1, 4, 64, generator=gen).to(Q_DTYPE)
    results = [kk.quant_attention(q, kk.PagedKV((p,), (bf16,), 32), table, lens) for p in pools]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


def test_kivi2_decodes_to_numbers_that_float16_has_not() -> None:
    """zero + 3 * scale goes up to four times the largest float16."""
    gen = torch.Generator().manual_seed(0)
    page = (2e5 * torch.rand(1, 2, 2, 16, 64, generator=gen)).bfloat16()  # [page, head, side, token, channel]
    kivi2 = kk.format("kivi2")
    pools = (page.flatten(2).view(torch.uint8), torch.zeros(1, 2, kivi2.page_bytes(16, 64), dtype=torch.uint8))
    kv = kk.PagedKV(pools, (kk.format("bf16"), kivi2), 16)
    kk.pack_pages(kv, 0, 1, torch.tensor([[0, 0]], dtype=torch.int32))
    q = 1e-6 * torch.randn(1, 4, 64, generator=gen).bfloat16()
    args = q, kv, torch.tensor([[1 << 28]], dtype=torch.int32), torch.tensor([16], dtype=torch.int32)
    reference = OPS["quant_attention"].reference
    exact = reference(*args)
    assert exact.abs().max() > 70000
    assert_as_good_as(kk.quant_attention(*args), reference(*args, dtype=torch.bfloat16), exact)


@pytest.mark.parametrize("seed", range(8))
def test_rotated_queries_keep_their_bits(seed: int) -> None:
    """Large scores over few keys: a float16 query, once rotated, has more bits than float16 holds."""
    op = OPS["quant_attention"]
    case = {"Tq": 1, "Hq": 8, "Hkv": 2, "D": 128, "page_size": 16, "lens": (3,), "dtype": "float16",
            "formats": ("u4",), "transform": True, "scale": 1.0}  # fmt: skip
    args, options = op.make(case, seed)
    exact = op.reference(*args, **options)
    plain = op.reference(*args, **options, dtype=torch.float16)
    for got, near, truth in zip(kk.quant_attention(*args, **options), plain, exact):
        assert_as_good_as(got, near, truth)


def test_one_pool_in_two_halves_merges_to_the_whole() -> None:
    case = {"Tq": 1, "Hq": 4, "Hkv": 2, "D": 128, "page_size": 16, "lens": (96, 160), "dtype": "float32",
            "formats": ("u2",), "transform": True}  # fmt: skip
    (q, kv, table, lens), options = OPS["quant_attention"].make(case)
    out, lse = kk.quant_attention(q, kv, table, lens, **options)
    head = torch.tensor([48, 32], dtype=torch.int32)
    first = kk.quant_attention(q, kv, table, head, return_lse=True)
    rest = torch.stack([table[0].roll(-3), table[1].roll(-2)])
    second = kk.quant_attention(q, kv, rest, lens - head, return_lse=True)
    merged = kk.merge_states([first[0], second[0]], [first[1], second[1]])
    torch.testing.assert_close(
        merged[0], out, rtol=2e-5, atol=2e-5 + 3 * rounding(out)
    )  # of two parts and of the whole
    torch.testing.assert_close(merged[1], lse, rtol=1e-5, atol=1e-5)


@not_emulated  # which copies what an op is given
@pytest.mark.parametrize("name", ["u2", "bf16", "bf16 NHD"])
def test_pools_past_2_to_the_31(name: str, tmp_path: Path) -> None:
    """The last pages of a pool of more than 2^31 elements (a sparse file) work like those of a small pool."""
    heads, D, page_size = 8, 128, 64
    fmt = kk.format(name.partition(" ")[0])
    page = heads * (page_size * D if " " in name else fmt.page_bytes(page_size, D))  # elements
    pages = (1 << 31) // page + 100
    dtype = torch.bfloat16 if " " in name else torch.uint8

    def sparse(file: str) -> Tensor:
        if GPU:
            flat = torch.zeros(pages * page, dtype=dtype, device=DEVICE)
        else:
            flat = torch.from_file(str(tmp_path / file), shared=True, size=pages * page, dtype=dtype)
        return flat.view(pages, page_size, heads, D).transpose(1, 2) if " " in name else flat.view(pages, heads, -1)

    big: Any = (sparse("k"), sparse("v")) if " " in name else sparse("kv")
    small = tuple(x[:3].clone() for x in big) if " " in name else big[:3].clone()
    gen = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2 * page_size, heads, D, generator=gen) for _ in range(2))
    q = torch.randn(1, 32, D, generator=gen).to(Q_DTYPE)
    lens = torch.tensor([100], dtype=torch.int32)
    results = []
    for pool, last in ((small, 2), (big, pages - 1)):
        kv = kk.PagedKV((pool, pool), (fmt, fmt), page_size)
        slots = torch.arange(2 * page_size) + (last - 1) * page_size
        kk.write_kv(k, v, kv, 0, slots)
        kk.pack_pages(kv, 0, 1, torch.tensor([[last, last - 2]], dtype=torch.int32))
        table = torch.tensor([[last - 1, 1 << 28 | last - 2]], dtype=torch.int32)
        results.append((*kk.read_kv(kv, 0, slots), kk.quant_attention(q, kv, table, lens)))
    for mine, truth in zip(results[1], results[0]):
        assert torch.equal(mine, truth)


def some_cases(name: str) -> list[Case]:
    """A plain case, one with two separate caches where the op takes them, and the richest."""
    cases = [c for c in OPS[name].cases() if 0 not in (*(c.get(k) for k in "TNSB"), *c.get("rows", ()))]
    return [cases[0], *[c for c in cases if "NHD" in str(c)][:1], max(cases, key=len)]


SOME = [(name, case) for name in OPS for case in some_cases(name)]
REGISTERED = [c for c in SOME if hasattr(OPS[c[0]], "_op")]  # the rest are made of those


@pytest.mark.once
@pytest.mark.traced
@pytest.mark.parametrize(("name", "case"), REGISTERED, ids=[label(*c) for c in REGISTERED])
def test_opcheck(name: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS[name]
    args, kwargs = to_device(op.make(case))
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    for attribute in {"_op", "_plain_op"} & vars(op).keys():
        real = getattr(op, attribute)

        def record(*flat: Any, real: Any = real) -> Any:
            calls.append((real, flat))
            return real(*flat)

        monkeypatch.setattr(op, attribute, record)
    getattr(kk, name)(*args, **kwargs)
    torch.library.opcheck(*calls[0])


@pytest.mark.once
@pytest.mark.traced
@pytest.mark.parametrize("name", OPS)
def test_compiles_whole(name: str) -> None:
    torch.compiler.reset()  # the ops share the code of `step`, and with it the limit on recompiles
    function = getattr(kk, name)

    def step(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return None if result is None else tuple(2 * r for r in as_tuple(result))

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if name == "quant_attention" else "aot_eager")
    for case in some_cases(name):
        args, kwargs = to_device(OPS[name].make(case))
        eager = as_tuple(step(*args, **kwargs))
        written = tensors_of((args, kwargs))
        args, kwargs = to_device(OPS[name].make(case))
        with torch.no_grad():
            got = as_tuple(compiled(*args, **kwargs))
        for mine, truth in zip((*got, *tensors_of((args, kwargs))), (*eager, *written)):
            torch.testing.assert_close(mine, truth, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.once
@pytest.mark.traced
def test_compiled_sizes_do_not_recompile_each_time() -> None:
    """A decode loop: batch, lengths and table widths change, two graphs (static, dynamic) must serve."""
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: kk.quant_attention(*args), fullgraph=True, backend=graphs)
    for B in (2, 3, 4, 5):
        case = {"Tq": 1, "Hq": 4, "Hkv": 2, "D": 64, "page_size": 16, "lens": (40 + 16 * B,) * B, "dtype": "float32",
                "formats": ("u2",)}  # fmt: skip
        args, _ = to_device(OPS["quant_attention"].make(case))
        args = (args[0], _fixed_size(args[1], 64), *args[2:])
        torch.testing.assert_close(compiled(*args), kk.quant_attention(*args))
    assert graphs.frame_count <= 2


def _fixed_size(kv: kk.PagedKV, pages: int) -> kk.PagedKV:
    pool = kv.pools[0]
    assert isinstance(pool, torch.Tensor)
    return kv._replace(pools=(torch.cat([pool, pool.new_zeros(pages - len(pool), *pool.shape[1:])]),))


def test_fwht_gradient() -> None:
    for n in (8, 12, 40):
        x = torch.randn(3, 2, n, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: kk.fwht(x, 0.5), (x,))
    x = torch.randn(4, 64, requires_grad=True)
    kk.fwht(x).sum().backward()  # the gradient arrives expanded, without a stride
    assert x.grad is not None
    torch.testing.assert_close(x.grad, kk.fwht(torch.ones(4, 64)))


def test_fwht_twice_is_identity() -> None:
    x = torch.randn(5, 96)
    torch.testing.assert_close(kk.fwht(kk.fwht(x)), x)


def test_cost_counts_something() -> None:
    for name, case in CASES:
        moved, flops = OPS[name].cost(case)
        assert moved >= 0, label(name, case)
        assert flops >= 0, label(name, case)


@pytest.mark.once
def test_page_bytes_agree() -> None:
    """The C++ size of a page is the Python one, for every pair of formats."""
    for k, v in itertools.product(CODECS.values(), CODECS.values()):
        if v.KEYS_ONLY:
            with pytest.raises(
                (ValueError, RuntimeError), match=f"{v.NAME} is a format for keys; its values need another"
            ):
                torch.ops.kvkernels.page_bytes(k.NUMBER, v.NUMBER, 16, 64)
            continue
        fmt = kk.format(k.NAME, v.NAME)
        for head_dim in (64, 128, 256):
            for page_size in (16, 48, 256):
                got = torch.ops.kvkernels.page_bytes(k.NUMBER, v.NUMBER, page_size, head_dim)
                assert got == fmt.page_bytes(page_size, head_dim), (fmt.name, head_dim, page_size)


def test_references_refuse_what_release_kernels_may_not_see() -> None:
    case = {"Tq": 1, "Hq": 2, "Hkv": 1, "D": 64, "page_size": 16, "lens": (40,), "dtype": "float32", "formats": ("u2",)}
    (q, kv, table, lens), _ = OPS["quant_attention"].make(case)
    reference = OPS["quant_attention"].reference
    with pytest.raises(ValueError, match=r"seq_lens\[0\] = -1 is negative"):
        reference(q, kv, table, lens * 0 - 1)
    with pytest.raises(ValueError, match="page_table is too narrow"):
        reference(q, kv, table[:, :1], lens)
    for entry, message in (
        (5 << 28, "means pool 5, but there are 1"),
        (77, "means page 77 of pool 0"),
        (-4, "means pool"),
    ):
        bad = table.clone()
        bad[0, 1] = entry
        with pytest.raises(ValueError, match=message):
            reference(q, kv, bad, lens)
    with pytest.raises(ValueError, match=r"slots\[0\] = 100000, but pool 0 has"):
        OPS["read_kv"].reference(kv, 0, torch.tensor([100000]))
    assert _reference.num_pages(kv, 0) < 77


@pytest.mark.once
def test_info() -> None:
    info = kk.info()
    assert set(info["ops"]) == set(OPS)
    assert all("cpu" in op["backends"] for op in info["ops"].values())
    assert info["isa"] in info["isas"]
    assert info["formats"]["u2"]["bits_per_element"] == 2.125
    assert info["formats"]["m31"]["bits_per_element"] == 2.125  # of keys, as it holds no values
    assert "m31" in info["ops"]["write_kv"]["formats"]
    assert "kivi2" not in info["ops"]["write_kv"]["formats"]
    text = str(info)
    assert all(name in text for name in (*OPS, *info["formats"]))


@pytest.mark.once
def test_formats_is_a_function_beside_a_package() -> None:
    import kvkernels.formats.u4  # noqa: F401  must not turn kk.formats into the package
    from kvkernels.formats import u2

    assert u2.NAME == "u2"
    assert kk.formats()[0] == kk.format("bf16")
