"""Laws that hold for any sizes, with sizes drawn by hypothesis."""

import math
from typing import Any

import pytest
import torch
from backends import CPU, SANITIZED, SIMT
from conftest import assert_as_good_as, rounding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvkernels as kk
from kvkernels.formats import CODECS
from kvkernels.ops import OPS, _attention, plan_prefix

EXAMPLES = 80 if CPU else 6 if SIMT else 40
settings.register_profile(
    "kvkernels", deadline=None, max_examples=EXAMPLES, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
settings.load_profile("kvkernels")

PAIRS = [kk.format(k, v).name for k in CODECS for v in CODECS if not CODECS[v].KEYS_ONLY]
TOKEN_WISE = [name for name in PAIRS if not kk.format(name).whole_pages]
attention, merge = OPS["quant_attention"], OPS["merge_states"]


@st.composite
def attention_cases(draw: st.DrawFn, names: list[str] = PAIRS, Tq: int = 16) -> dict[str, Any]:
    """Any mix of formats, ragged lengths around page and interval borders, any options."""
    formats = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)))
    packed = any(kk.format(name).packed for name in formats)
    page_size = draw(st.sampled_from((16, 32, 48, 128) if packed else (1, 2, 7, 16, 33, 64)))
    length = st.integers(0, 3 * page_size + 40) | st.sampled_from((page_size, 2 * page_size, 257))
    heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    case: dict[str, Any] = {
        "formats": formats,
        "page_size": page_size,
        "lens": tuple(draw(st.lists(length, min_size=1, max_size=4))),
        "D": draw(st.sampled_from((64, 128, 256) if packed else (64, 80, 96, 112, 128, 192, 256))),
        "Hkv": heads,
        "Hq": heads * group,
        "Tq": draw(st.integers(1, Tq)),
        "dtype": draw(st.sampled_from(("float32", "float16", "bfloat16"))),
        "transform": draw(st.booleans()),
    }
    for name, values in (
        ("window", st.integers(0, 200)),
        ("softcap", st.floats(0.5, 50.0)),
        ("sinks", st.just(True)),
        ("alibi", st.sampled_from((1, 2))),
        ("split_tokens", st.integers(1, 12).map(lambda n: 16 * n)),
        ("tree", st.just(True)),
        ("extra", st.sampled_from(("own", "shared"))),
        ("head_map", st.tuples(*[st.integers(0, heads - 1)] * (heads * group))),
        ("head_windows", st.tuples(*[st.tuples(st.integers(0, 80), st.integers(-1, 150))] * heads)),
    ):
        if draw(st.integers(0, 3)) == 0:
            case[name] = draw(values)
    if "head_windows" in case:
        case.pop("window", None)
    return case


@st.composite
def decode_cases(draw: st.DrawFn) -> dict[str, Any]:
    """The same for two caches: unequal numbers of heads, layouts, values within keys."""
    case = draw(attention_cases(names=["bf16"]))
    k, v = draw(st.sampled_from(("bf16", "f16"))), draw(st.sampled_from(("bf16", "f16")))
    case.update(Hk=case["Hkv"], Hv=case["Hkv"], cache=f"{k}/{v} {draw(st.sampled_from(('NHD', 'HND')))}")
    if draw(st.integers(0, 4)) == 0:
        case.update(D=576, cache=f"{k} {draw(st.sampled_from(('NHD', 'MLA')))}")
    elif draw(st.booleans()) and not {"extra", "head_map", "head_windows"} & set(case):
        case.update(Hk=draw(st.integers(1, 4)), Hv=draw(st.integers(1, 4)))
        case["Hq"] = math.lcm(case["Hk"], case["Hv"]) * draw(st.integers(1, 4))
    return case


@st.composite
def prefix_cases(draw: st.DrawFn) -> dict[str, Any]:
    """The same for sequences that share pages, in all ways that plan_prefix.random_batch() knows."""
    case = draw(attention_cases())
    for option in ("window", "head_windows", "split_tokens"):  # not together with a plan
        case.pop(option, None)
    case["page_size"] = min(case["page_size"], 48)
    case.update(drafts=case.pop("tree", None), tree=draw(st.sampled_from(plan_prefix.TREES)))
    case.update(
        B=draw(st.integers(0, 12)), pages=draw(st.integers(2, 9)), least=draw(st.sampled_from((0, 0, 40, None)))
    )
    return case


@st.composite
def sparse_cases(draw: st.DrawFn) -> dict[str, Any]:
    """The same over lists of pages, of tokens, or of entries."""
    case = draw(attention_cases())
    case.update(
        of=draw(st.sampled_from(("pages", "tokens", "entries"))), part=draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    )
    case["shared"] = draw(st.sampled_from(("", "", "heads", "both")))
    return case


CASES = {"flash_decode": decode_cases, "prefix_attention": prefix_cases, "sparse_attention": sparse_cases}


def assert_is_the_reference(got: Any, op: Any, args: Any, options: dict[str, Any]) -> None:
    """(out, lse) of an attention op, whose arguments are as they were."""
    if SANITIZED:
        return
    exact = op.reference(*args, **options)
    plain = op.reference(*args, **options, dtype=got[0].dtype)
    for i in (0, 1):
        # A sequence of one token has one score, which plain PyTorch may hit by luck: allow the rounding of its terms,
        # q.mu among them, which are ten times the score.
        assert_as_good_as(got[i], plain[i], exact[i], ("out", "lse")[i], tiny=1e-5)


@settings(max_examples=5 * EXAMPLES // 2)
@given(case=attention_cases(), seed=st.integers(0, 1000), n=st.sampled_from((1, 2)))
def test_attention_is_the_reference(case: dict[str, Any], seed: int, n: int) -> None:
    args, options = attention.make(case, seed)
    torch.set_num_threads(n)
    got = kk.quant_attention(*args, **options)
    torch.set_num_threads(1)
    assert_is_the_reference(got, attention, args, options)


@pytest.mark.parametrize("name", CASES)
@given(data=st.data(), seed=st.integers(0, 1000), n=st.sampled_from((1, 2)))
def test_other_attention_is_the_reference(name: str, data: st.DataObject, seed: int, n: int) -> None:
    op, case = OPS[name], data.draw(CASES[name]())
    args, options = op.make(case, seed)
    torch.set_num_threads(n)
    got = getattr(kk, name)(*args, **options)
    torch.set_num_threads(1)
    assert_is_the_reference(got, op, args, options)


@given(
    tree=st.sampled_from(plan_prefix.TREES),
    B=st.integers(0, 70),
    pages=st.integers(1, 40),
    page_size=st.sampled_from((1, 3, 16)),
    num_queries=st.integers(1, 16),
    min_tokens=st.sampled_from((0, 1, 7, 64)),
    seed=st.integers(0, 1000),
)
def test_a_plan_is_the_definition(
    tree: str, B: int, pages: int, page_size: int, num_queries: int, min_tokens: int, seed: int
) -> None:
    case = {"tree": tree, "B": B, "pages": pages, "page_size": page_size, "num_queries": num_queries,
            "min_tokens": min_tokens, "seed": 0}  # fmt: skip
    args, options = OPS["plan_prefix"].make(case, seed)
    for got, want in zip(kk.plan_prefix(*args, **options), OPS["plan_prefix"].reference(*args, **options)):
        assert torch.equal(got, want)


@given(case=attention_cases(), seed=st.integers(0, 1000))
def test_sixteen_bit_queries_cost_the_rounding_of_the_result(case: dict[str, Any], seed: int) -> None:
    """A sharper bound than plain PyTorch's error in that dtype: q is exact in float32, only `out` is rounded."""
    case = {**case, "dtype": "bfloat16"}
    args, options = attention.make(case, seed)
    got = kk.quant_attention(*args, **options)
    if SANITIZED:
        return
    exact = attention.reference(*args, **options)
    scale = max(1.0, exact[0].abs().max().item())
    assert (got[0].double() - exact[0]).abs().max() <= scale * (2**-8 + 1e-3)
    seen = exact[1].isfinite()
    assert torch.equal(got[1].isfinite(), seen)
    torch.testing.assert_close(got[1][seen].double(), exact[1][seen], rtol=1e-3, atol=1e-3)


@given(case=attention_cases(Tq=1), cut=st.integers(0, 400), seed=st.integers(0, 1000))
def test_any_cut_merges_to_the_whole(case: dict[str, Any], cut: int, seed: int) -> None:
    """Attention over the first pages and over the rest, merged, is attention over all."""
    for option in ("window", "alibi", "sinks", "extra", "head_windows"):  # these look at the sequence as a whole
        case.pop(option, None)
    case["dtype"] = "float32"
    (q, kv, table, lens), options = attention.make(case, seed)
    out, lse = kk.quant_attention(q, kv, table, lens, **options)
    pages = torch.minimum(torch.full_like(lens, cut // case["page_size"]), lens // case["page_size"])
    head = (pages * case["page_size"]).int()
    rest = torch.stack([row.roll(-int(n)) for row, n in zip(table, pages)])
    parts = [kk.quant_attention(q, kv, table, head, **options), kk.quant_attention(q, kv, rest, lens - head, **options)]
    merged = kk.merge_states([p[0] for p in parts], [p[1] for p in parts])
    torch.testing.assert_close(merged[0], out, rtol=1e-4, atol=1e-4 + 3 * rounding(out))
    torch.testing.assert_close(merged[1], lse, rtol=1e-4, atol=1e-4)


@given(case=attention_cases(), seed=st.integers(0, 1000))
def test_where_pages_lie_does_not_matter(case: dict[str, Any], seed: int) -> None:
    """Other physical pages, a wider table: the same bits."""
    (q, kv, table, lens), options = attention.make(case, seed)
    want = kk.quant_attention(q, kv, table, lens, **options)
    pools, moved = [], table.clone()
    for i, pool in enumerate(kv.pools):
        assert isinstance(pool, torch.Tensor)
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed + i))
        pools.append(pool[order])
        where = (table >> 28) == i
        where &= table != 0x7FFFFFFF
        moved[where] = (i << 28 | order.argsort()[table[where].long() & 0x0FFFFFFF]).int()
    wide = torch.cat([moved, torch.full((len(lens), 5), -1, dtype=torch.int32)], 1)[:, : table.shape[1] + 3]
    got = kk.quant_attention(q, kv._replace(pools=tuple(pools)), wide, lens, **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@given(
    name=st.sampled_from(TOKEN_WISE),
    D=st.sampled_from((64, 128, 256)),
    T=st.integers(0, 70),
    heads=st.integers(1, 3),
    page_size=st.sampled_from((16, 32, 80)),
    dtype=st.sampled_from(("float32", "float16", "bfloat16")),
    scale=st.sampled_from((0.0, 1e-30, 1e-6, 1.0, 1e4, 1e30)),
    seed=st.integers(0, 1000),
)
def test_write_kv_writes_the_definition(
    name: str, D: int, T: int, heads: int, page_size: int, dtype: str, scale: float, seed: int
) -> None:
    """Bytes of the reference, in any order and any number of calls; other tokens untouched; read_kv gives them back."""
    case = {"format": name, "D": D, "T": T, "Hkv": heads, "page_size": page_size, "dtype": dtype, "transform": seed % 2}
    write = OPS["write_kv"]
    (k, v, kv, pool, slots), _ = write.make(case, seed)
    k, v = k * scale, v * scale
    start = kv.pools[0].clone()
    write.reference(k, v, kv, pool, slots)
    want = kv.pools[0].clone()
    kv.pools[0].copy_(start)
    kk.write_kv(k, v, kv, pool, slots)
    assert torch.equal(kv.pools[0], want)
    kv.pools[0].copy_(start)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    for part in order.split(max(1, T // 3)) if T else ():
        kk.write_kv(k[part], v[part], kv, pool, slots[part])
    assert torch.equal(kv.pools[0], want)
    got = kk.read_kv(kv, pool, slots)
    exact = OPS["read_kv"].reference(kv, pool, slots, dtype=torch.float32)
    for mine, truth in zip(got, exact):
        torch.testing.assert_close(mine, truth, rtol=0, atol=0, equal_nan=True)


@given(
    src=st.sampled_from(PAIRS),
    dst=st.sampled_from(PAIRS),
    D=st.sampled_from((64, 128, 256)),
    N=st.integers(0, 9),
    heads=st.integers(1, 3),
    page_size=st.sampled_from((16, 48, 64)),
    seed=st.integers(0, 1000),
)
def test_pack_pages_writes_the_definition(
    src: str, dst: str, D: int, N: int, heads: int, page_size: int, seed: int
) -> None:
    pack = OPS["pack_pages"]
    case = {"src": src, "dst": dst, "D": D, "N": N, "Hkv": heads, "page_size": page_size, "transform": seed % 2}
    args, _ = pack.make(case, seed)
    pack.reference(*args)
    want = args[0].pools[1].clone()
    args, _ = pack.make(case, seed)
    kk.pack_pages(*args)
    assert torch.equal(args[0].pools[1], want)


@given(data=st.data(), n=st.sampled_from((1, 2)))
def test_selection_is_a_sort(data: st.DataObject, n: int) -> None:
    """Of few or many different scores, with more or fewer items than are wanted, forced ones among them."""
    draw = data.draw
    size = draw(st.sampled_from((1, 16)))
    items = draw(st.integers(1, 60) | st.sampled_from((255, 256, 257, 1024, 3000)))
    lens = tuple(draw(st.lists(st.integers(0, items * size) | st.just(items * size), min_size=1, max_size=3)))
    case: dict[str, Any] = {"H": draw(st.integers(1, 3)), "n": items, "page_size": size, "lens": lens,
                            "sink": draw(st.integers(0, 4)), "recent": draw(st.integers(0, 4)),
                            "row_k": draw(st.booleans()), "nan": draw(st.booleans()),
                            "close": draw(st.booleans())}  # fmt: skip
    case["k"] = max(1, case["sink"] + case["recent"] + draw(st.integers(0, 20) | st.integers(0, items)))
    if draw(st.booleans()):
        case["values"] = draw(st.integers(1, 300))
    op = OPS["select_pages"]
    args, options = op.make(case, draw(st.integers(0, 1000)))
    torch.set_num_threads(n)
    got = kk.select_pages(*args, **options)
    torch.set_num_threads(1)
    assert torch.equal(got, op.reference(*args, **options))


@given(case=attention_cases(), kind=st.sampled_from(("minmax", "mean", "channels")), bits=st.sampled_from((16, 8, 4)),
       r=st.integers(1, 40), reduce=st.sampled_from(("max", "sum", "softmax_max", "softmax_sum")),
       seed=st.integers(0, 1000))  # fmt: skip
def test_summaries_and_scores_are_the_reference(
    case: dict[str, Any], kind: str, bits: int, r: int, reduce: str, seed: int
) -> None:
    if case["page_size"] % 16 or (bits == 4 and kind != "channels"):
        bits = 16
    case.update(kind=kind, bits=bits, r=min(r, case["D"]), reduce=reduce)
    op = OPS["page_summaries"]
    args, options = op.make(case, seed)
    summaries = kk.page_summaries(*args, **options)
    for mine, truth in zip(summaries.records, op.reference(*args, **options).records):
        assert torch.equal(mine, truth)
    kv, table, lens = args
    q = _attention.random_queries(case, case["D"], torch.Generator().manual_seed(seed))
    names = ("score_tokens",) if kind == "channels" else ("score_pages", "score_tokens", "score_pages")
    for name, source in zip(names, (summaries, kv, kv)):
        score, reference = getattr(kk, name), OPS[name].reference
        got = score(q, source, table, lens, reduce=reduce)
        if SANITIZED:
            continue
        exact, plain = (reference(q, source, table, lens, reduce=reduce, dtype=d) for d in (torch.float64, q.dtype))
        assert_as_good_as(got, plain, exact, name, tiny=1e-5)


@given(S=st.integers(1, 6), N=st.integers(1, 20), D=st.integers(1, 140), seed=st.integers(0, 1000))
def test_merging_is_associative(S: int, N: int, D: int, seed: int) -> None:
    (outs, lses), _ = merge.make({"S": S, "N": (N,), "D": D, "dtype": "float32", "empty": seed % 2}, seed)
    want = kk.merge_states(outs, lses)
    out, lse = outs[0], lses[0]
    for i in range(1, S):
        out, lse = kk.merge_states([out, outs[i]], [lse, lses[i]])
    if S == 1:
        out, lse = kk.merge_states([out], [lse])
    torch.testing.assert_close(out, want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want[1], rtol=1e-5, atol=1e-5)


@given(
    odd=st.sampled_from((1, 12, 20, 28)),
    k=st.integers(0, 7),
    rows=st.integers(0, 9),
    dtype=st.sampled_from(("float32", "float16", "bfloat16", "float64")),
    seed=st.integers(0, 1000),
)
def test_fwht_is_the_matrix_and_its_own_inverse(odd: int, k: int, rows: int, dtype: str, seed: int) -> None:
    (x,), _ = OPS["fwht"].make({"rows": (rows,), "n": odd << k, "dtype": dtype}, seed)
    got = kk.fwht(x)
    exact = OPS["fwht"].reference(x)
    plain = OPS["fwht"].reference(x, dtype=x.dtype)
    assert_as_good_as(got, plain, exact)
    if dtype in ("float32", "float64"):
        torch.testing.assert_close(kk.fwht(got), x)


@pytest.mark.parametrize("name", ["u8", "u4", "u3", "u2", "kivi2", "t1.e5m3", "b1", "m31/u2"])
def test_odd_values_have_defined_results(name: str) -> None:
    """Constant, zero, huge, tiny, NaN and Inf tokens: what the definition says, and nothing leaks to other tokens."""
    page = torch.randn(1, 64, 2, 128, generator=torch.Generator().manual_seed(0))
    for token, value in enumerate((0.0, -0.0, 3.0, 1e-30, 1e30, 3e38, float("nan"), float("inf"), -float("inf"))):
        page[:, token] = value
    page[:, 12, :, 5] = float("nan")
    wide = kk.PagedKV.empty(["bf16", name], 1, 2, 128, 64)
    k = page[0].transpose(0, 1)[None].bfloat16()
    wide.pools[0].copy_(torch.stack((k, k), 2).flatten(2).view(torch.uint8))
    pairs = torch.zeros(1, 2, dtype=torch.int32)
    OPS["pack_pages"].reference(wide, 0, 1, pairs)
    want = wide.pools[1].clone()
    wide.pools[1].zero_()
    kk.pack_pages(wide, 0, 1, pairs)
    assert torch.equal(wide.pools[1], want)
    got = kk.read_kv(wide, 1, torch.arange(64))
    exact = OPS["read_kv"].reference(wide, 1, torch.arange(64), dtype=torch.float32)
    for mine, truth in zip(got, exact):
        torch.testing.assert_close(mine, truth, rtol=0, atol=0, equal_nan=True)
    assert got[1][20:].isfinite().all()
