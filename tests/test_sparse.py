"""Laws of sparse attention: of summaries, scores, lists, attention over them, and pages in main memory."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import CPU, GPU, Q_DTYPE, not_emulated
from conftest import rounding
from torch import Tensor

import kvkernels as kk
from kvkernels.formats import encode_page
from kvkernels.ops import _reference

HEADS, D, PAGE = 2, 64, 16
GROUP = 2  # query heads of a KV head
# Of two ways of computing the same; the CUDA kernels round weights to 16 bits.
LOOSE = {"rtol": 2e-5, "atol": 2e-5} if CPU else {"rtol": 2e-2, "atol": 2e-2}


def cache(lens: list[int], formats: tuple[str, ...] = ("bf16",), seed: int = 0, page: int = PAGE) -> tuple[Any, ...]:
    """kv, page_table, seq_lens, q."""
    gen = torch.Generator().manual_seed(seed)
    case = {"Hkv": HEADS, "D": D, "page_size": page, "lens": lens, "formats": formats}
    kv, table = _reference.random_cache(case, gen, lambda length: range(-(-length // page)))
    q = torch.randn(len(lens), HEADS * GROUP, D, generator=gen).to(Q_DTYPE)
    return kv, table, torch.tensor(lens, dtype=torch.int32), q


def lists(*rows: list[list[int]]) -> Tensor:
    """[B, Hkv, K] from the lists of the heads of each sequence."""
    width = max(len(own) for row in rows for own in row)
    return torch.tensor([[own + [-1] * (width - len(own)) for own in row] for row in rows], dtype=torch.int32)


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    out, lse = want
    torch.testing.assert_close(got[0], out.to(got[0].dtype), rtol=LOOSE["rtol"], atol=LOOSE["atol"] + 2 * rounding(out))
    torch.testing.assert_close(got[1], lse, **LOOSE)


# ---- attention


@pytest.mark.parametrize("formats", [("bf16",), ("t1.e5m3",), ("f16 NHD", "m31/u2", "kivi2")], ids=str)
def test_a_list_of_everything_is_dense_attention(formats: tuple[str, ...]) -> None:
    kv, table, lens, q = cache([150, 70], formats)
    if "f16 NHD" in formats and not CPU:
        q = q.half()
    want = kk.quant_attention(q, kv, table, lens, return_lse=True)
    pages = lists([[*range(10)]], [[*range(5)]])
    close(kk.sparse_attention(q, kv, table, lens, pages=pages, return_lse=True), want)
    tokens = lists([[*range(150)]], [[*range(70)]])
    close(kk.sparse_attention(q, kv, table, lens, tokens=tokens, return_lse=True), want)


@pytest.mark.parametrize("formats", [("bf16",), ("m42/b1", "u4")], ids=str)
def test_a_list_and_the_rest_merge_to_dense_attention(formats: tuple[str, ...]) -> None:
    kv, table, lens, q = cache([150, 70], formats)
    first = lists([[0, 3, 4, 9], [1]], [[2, 4], [0, 1, 2, 3, 4]])
    rest = lists([[1, 2, 5, 6, 7, 8], [0, *range(2, 10)]], [[0, 1, 3], []])
    a, b = (kk.sparse_attention(q, kv, table, lens, pages=p, return_lse=True) for p in (first, rest))
    close(kk.merge_states([a[0], b[0]], [a[1], b[1]]), kk.quant_attention(q, kv, table, lens, return_lse=True))


def test_pages_are_their_tokens() -> None:
    kv, table, lens, q = cache([150, 70], ("bf16", "u2"))
    pages = [[[0, 3, 9], [2, 5]], [[4], [0, 1]]]
    tokens = [[[t for p in own for t in range(p * PAGE, min(p * PAGE + PAGE, n))] for own in row]
              for row, n in zip(pages, (150, 70))]  # fmt: skip
    of_pages = kk.sparse_attention(q, kv, table, lens, pages=lists(*pages), return_lse=True)
    close(kk.sparse_attention(q, kv, table, lens, tokens=lists(*tokens), return_lse=True), of_pages)


# ---- summaries and scores


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("name", ["bf16", "u2"])
def test_minmax_scores_are_upper_bounds(name: str, bits: int) -> None:
    kv, table, lens, _ = cache([150, 70, 0], (name,))
    q = 3 * torch.randn(3, HEADS, D, generator=torch.Generator().manual_seed(5)).to(Q_DTYPE)
    bound = kk.score_pages(q, kk.page_summaries(kv, table, lens, "minmax", bits=bits), table, lens)
    best = kk.score_pages(q, kv, table, lens)
    alive = best > -math.inf
    assert alive.sum() == HEADS * (10 + 5)
    assert torch.equal(alive, bound > -math.inf)
    slack = 1e-5 if CPU else 2e-2  # of sums of D products; exact scores of the CUDA kernels round rotated queries
    assert (bound - best)[alive].min() > -slack * best[alive].abs().max()
    mean = kk.score_pages(q, kk.page_summaries(kv, table, lens, "mean", bits=bits), table, lens)
    assert (bound - mean)[alive].min() > 0


@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_scores_of_segments_that_are_pages(reduce: str) -> None:
    kv, table, lens, q = cache([160, 64], ("bf16", "u2"))
    starts = torch.arange(0, 176, PAGE)
    segments = torch.stack((starts, starts.clamp(max=64))).int()
    for kind in ("minmax", "mean"):
        of_pages, of_segments = (kk.page_summaries(kv, table, lens, kind, segments=s) for s in (None, segments))
        want = kk.score_pages(q, of_pages, table, lens, reduce=reduce)[..., :10]
        got = kk.score_pages(q, of_segments, table, lens, reduce=reduce)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        tokens = kk.score_tokens(q, of_segments, table, lens, reduce=reduce)
        assert torch.equal(tokens[..., :160], got.repeat_interleave(PAGE, 2))
        assert (tokens[..., 160:] == -math.inf).all()


def test_labels_of_all_channels_are_the_keys() -> None:
    kv, table, lens, q = cache([100, 33])
    every = torch.arange(D, dtype=torch.int32).repeat(HEADS, 1)
    labels = kk.page_summaries(kv, table, lens, "channels", channels=every)
    got, want = (kk.score_tokens(q, source, table, lens) for source in (labels, kv))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["u2", "m31/u2"])
@pytest.mark.parametrize("reduce", ["max", "softmax_max"])
def test_the_best_token_of_a_page(reduce: str, name: str) -> None:
    """Of each query row by itself, so one row to a KV head: for softmax they differ by what they are divided by."""
    kv, table, lens, q = cache([100, 33], (name,))
    tokens = kk.score_tokens(q[:, ::GROUP], kv, table, lens).unflatten(2, (-1, PAGE)).amax(3)
    got = kk.score_pages(q[:, ::GROUP], kv, table, lens, reduce=reduce)
    if reduce == "softmax_max":
        tokens = torch.softmax(tokens, 2).where(tokens > -math.inf, -math.inf)
    torch.testing.assert_close(got, tokens, rtol=1e-4, atol=1e-5)


def test_a_nan_key_shows_in_its_token_and_page() -> None:
    kv, table, lens, q = cache([100, 33])
    page = int(table[0, 2])
    kv.pools[0][page, 1, :2] = 0xFF  # token 0 of page 2, channel 0
    where = (torch.arange(table.shape[1] * PAGE) == 2 * PAGE).expand(2, HEADS, -1) & torch.tensor(
        [[[False], [True]], [[False], [False]]]
    )
    assert torch.equal(kk.score_tokens(q, kv, table, lens).isnan(), where)
    in_page = where.unflatten(2, (-1, PAGE)).any(3)
    sources = [
        kv,
        *(kk.page_summaries(kv, table, lens, kind, bits=bits) for kind in ("minmax", "mean") for bits in (16, 8)),
    ]
    for source in sources:
        assert torch.equal(kk.score_pages(q, source, table, lens).isnan(), in_page)
    soft = kk.score_tokens(q, kv, table, lens, reduce="softmax_sum")
    alive = torch.arange(soft.shape[2]) < lens[:, None, None]
    assert torch.equal(soft.isnan(), where.any(2, keepdim=True) & alive)


def test_results_go_where_they_are_told() -> None:
    kv, table, lens, q = cache([150, 70])
    summaries = kk.page_summaries(kv, table, lens)
    width = table.shape[1]
    scores, tokens = torch.empty(2, HEADS, width), torch.empty(2, HEADS, width * PAGE)
    assert kk.score_pages(q, summaries, table, lens, out=scores) is scores
    assert torch.equal(scores, kk.score_pages(q, summaries, table, lens))
    assert kk.score_tokens(q, kv, table, lens, out=tokens) is tokens
    assert torch.equal(tokens, kk.score_tokens(q, kv, table, lens))
    pages, few = (torch.empty(2, HEADS, k, dtype=torch.int32) for k in (4, 70))
    assert kk.select_pages(scores, lens, 4, page_size=PAGE, out=pages) is pages
    assert torch.equal(pages, kk.select_pages(scores, lens, 4, page_size=PAGE))
    assert kk.select_tokens(tokens, lens, 70, out=few) is few
    assert torch.equal(few, kk.select_tokens(tokens, lens, 70))
    out = torch.full_like(q, math.nan)
    assert kk.sparse_attention(q, kv, table, lens, pages=pages, out=out) is out
    assert torch.equal(out, kk.sparse_attention(q, kv, table, lens, pages=pages))


# ---- summaries in place


@pytest.mark.parametrize(("kind", "bits"), [("minmax", 16), ("minmax", 8), ("mean", 16), ("channels", 4)])
def test_summaries_that_grow_equal_new_ones(kind: str, bits: int) -> None:
    gen = torch.Generator().manual_seed(1)
    kv = kk.PagedKV.empty(["bf16", "u4"], 8, HEADS, D, PAGE)
    table = torch.tensor([[3, 1 << 28 | 5, 0, 7]], dtype=torch.int32)
    channels = torch.tensor([[1, 5, 9], [0, 2, 63]], dtype=torch.int32) if kind == "channels" else None
    empty = torch.zeros(1, dtype=torch.int32)
    grown = kk.page_summaries(kv, table, empty, kind, bits=bits, channels=channels)
    done = 0
    for step in (1, 14, 1, 1, 30, 3):
        k, v = torch.randn(2, step, HEADS, D, generator=gen)
        for i, position in enumerate(range(done, done + step)):
            entry = int(table[0, position // PAGE])
            slot = torch.tensor([(entry & 0xFFFF) * PAGE + position % PAGE])
            kk.write_kv(k[i : i + 1], v[i : i + 1], kv, entry >> 28, slot)
        lens, start = torch.tensor([[done + step], [done]], dtype=torch.int32)
        before = [r.data_ptr() for r in grown.records]
        grown = kk.page_summaries(kv, table, lens, start=start, out=grown)
        assert [r.data_ptr() for r in grown.records] == before
        done += step
        fresh = kk.page_summaries(kv, table, lens, kind, bits=bits, channels=channels)
        for mine, truth in zip(grown.records, fresh.records):
            assert torch.equal(mine, truth)


def test_start_leaves_pages_before_it_alone() -> None:
    kv, table, lens, _ = cache([100, 33])
    old = kk.page_summaries(kv, table, lens)
    old.records[0].fill_(7)
    table[0, :3] = _reference.NO_PAGE  # not looked at
    new = kk.page_summaries(kv, table, lens, start=torch.tensor([48, 33], dtype=torch.int32), out=old)
    touched = {int(p) for p in (new.records[0] != 7).any(2).any(1).nonzero()}
    assert touched == {int(table[0, i]) for i in range(3, 7)}


@not_emulated  # which takes two blocks that write the same bytes for a race
@pytest.mark.parametrize("kind", ["minmax", "mean", "channels"])
def test_sequences_that_share_full_pages_have_one_record(kind: str) -> None:
    kv, table, lens, _ = cache([100, 50], ("bf16", "u2"))
    channels = torch.tensor([[1, 5], [0, 63]], dtype=torch.int32) if kind == "channels" else None
    alone = kk.page_summaries(kv, table[:1], lens[:1], kind, channels=channels)
    both = table[:1].repeat(3, 1)
    lens = torch.tensor([100, 96, 64], dtype=torch.int32)
    got = kk.page_summaries(kv, both, lens, kind, channels=channels)
    for mine, truth in zip(got.records, alone.records):
        assert torch.equal(mine, truth)


# ---- finding a needle


@pytest.mark.parametrize("name", ["bf16", "u2"])
@pytest.mark.parametrize("method", ["minmax", "minmax 8", "mean", "exact", "channels", "channels 4"])
def test_the_page_of_a_needle_is_selected(method: str, name: str) -> None:
    kind, _, bits = method.partition(" ")
    length, needle, page = 1000, 555, 16
    gen = torch.Generator().manual_seed(2)
    k, v = torch.randn(2, 63, HEADS, page, D, generator=gen)
    q = torch.randn(1, HEADS * GROUP, D, generator=gen)
    k[needle // page, :, needle % page] += 2 * q[0, ::GROUP]
    fmt = kk.format(name)
    kv = kk.PagedKV((encode_page(fmt, k, v),), (fmt,), page)
    table, lens = torch.arange(63, dtype=torch.int32)[None], torch.tensor([length], dtype=torch.int32)
    q = q.to(Q_DTYPE)
    if kind in ("channels", "exact"):
        source: Any = kv
        if kind == "channels":
            channels = kk.calibrate_channels(k.transpose(1, 2), q[:, ::GROUP].float(), 16)
            source = kk.page_summaries(kv, table, lens, kind, bits=int(bits or 16), channels=channels)
        tokens = kk.select_tokens(kk.score_tokens(q, source, table, lens), lens, 40, recent_tokens=16)
        assert (tokens == needle).any(2).all()
    else:
        source = kk.page_summaries(kv, table, lens, kind, bits=int(bits or 16))
        pages = kk.select_pages(kk.score_pages(q, source, table, lens), lens, 6, page_size=page)
        assert (pages == needle // page).any(2).all()
        got = kk.sparse_attention(q[:, ::GROUP], kv, table, lens, pages=pages, scale=1.0)
        near = v[needle // page, :, needle % page]
        assert torch.nn.functional.cosine_similarity(got[0].float(), near, dim=1).min() > 0.7


# ---- pages in main memory


@pytest.mark.parametrize("name", ["u2", "bf16 HND"])
def test_offloaded_pages_give_the_same_attention(name: str) -> None:
    """Many steps of drifting lists; recent pages stay in a pool of their own."""
    kv, table, lens, q = cache([400, 290], (name, "bf16"))
    slots, budget = 9, 8
    small, state = kk.offload(kv, 0, slots, 2, table.shape[1])
    assert small.pools[1] is kv.pools[1]
    gen = torch.Generator().manual_seed(3)
    scores = torch.randn(2, HEADS, table.shape[1], generator=gen)
    copied = 0
    for step in range(12):
        scores += 0.3 * torch.randn(scores.shape, generator=gen)
        pages = kk.select_pages(scores, lens, budget, page_size=PAGE)
        if step == 8:
            state.reset(1)
        before = state.page_of.clone()
        entries = kk.gather_pages(state, table, pages)
        copied += int((state.page_of != before).sum())
        got = kk.sparse_attention(q, small, table, lens, pages=pages, entries=entries, return_lse=True)
        close(got, kk.sparse_attention(q, kv, table, lens, pages=pages, return_lse=True))
    offloaded = (table[:, :, None].transpose(1, 2) >> 28 == 0).sum().item()
    assert 0 < copied < 12 * 2 * HEADS * budget / 2, f"{copied} of {offloaded} pages"


def test_the_cache_of_offloaded_pages_is_not_read_as_pages() -> None:
    kv, table, lens, q = cache([400, 290], ("u2", "bf16"))
    small, state = kk.offload(kv, 0, 8, 2, table.shape[1])
    pages = lists([[1], [0]], [[5], [6]])
    entries = kk.gather_pages(state, table, pages)
    kk.sparse_attention(q, small, table, lens, pages=pages, entries=entries)
    pairs, tokens = torch.tensor([[0, 1]], dtype=torch.int32), torch.zeros(1, HEADS, D)
    calls: list[Callable[[kk.PagedKV], Any]] = [
        lambda kv: kk.quant_attention(q, kv, table, lens),
        lambda kv: kk.prefix_attention(q, kv, table, lens),
        lambda kv: kk.sparse_attention(q, kv, table, lens, pages=pages),
        lambda kv: kk.page_summaries(kv, table, lens, "mean"),
        lambda kv: kk.score_tokens(q, kv, table, lens),
        lambda kv: kk.read_kv(kv, 0, torch.arange(3)),
        lambda kv: kk.write_kv(tokens, tokens, kv, 0, torch.tensor([0])),
        lambda kv: kk.pack_pages(kv, 1, 0, pairs),
        lambda kv: kk.pack_pages(kv, 0, 1, pairs),
    ]
    for call in calls:
        call(kv)
        with pytest.raises(ValueError, match="holds a cache of pages in main memory"):
            call(small)
    with pytest.raises(ValueError, match="offload: pool 0 is in main memory already"):
        kk.offload(small, 0, 8, 2, table.shape[1])
    kk.write_kv(tokens, tokens, small, 1, torch.tensor([0]))


def test_only_what_is_missing_is_copied() -> None:
    kv, table, _, _ = cache([400, 290], ("u2",))
    _, state = kk.offload(kv, 0, 6, 2, table.shape[1])
    first = lists([[1, 4, 9], [0, 2, 3]], [[5], [6, 7, 8]])
    kk.gather_pages(state, table, first)
    want = state.cache.clone()
    host = state.host.clone()
    state.host.fill_(0xEE)
    for b, h, page in ((0, 0, 5), (1, 1, 0)):  # the only pages that are new below
        record = int(table[b, page])
        state.host[record, h] = host[record, h]
    second = lists([[1, 4, 5, 9], [0, 2, 3]], [[5], [0, 6, 7, 8]])
    entries = kk.gather_pages(state, table, second)
    changed = (state.cache != want).any(2)
    assert changed.sum() == 2
    for b, h, i, page in ((0, 0, 2, 5), (1, 1, 0, 0)):
        slot = int(entries[b, h, i])
        assert changed[slot, h]
        assert torch.equal(state.cache[slot, h], host[int(table[b, page]), h])


def test_offload_refuses() -> None:
    kv, *_ = cache([40])
    for change, message in (
        ({"pool": 1}, r"offload: pool must be in \[0, 1\), the pools of kv; got 1"),
        ({"slots": 0}, "offload: slots must be at least 1; got 0"),
        ({"batch": 0}, "offload: batch must be at least 1; got 0"),
        ({"max_pages": -1}, "offload: max_pages must be at least 1; got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            kk.offload(**{"kv": kv, "pool": 0, "slots": 2, "batch": 1, "max_pages": 3, **change})


@pytest.mark.skipif(not GPU, reason="about memory of the host beside that of a GPU")
def test_pageable_memory_is_refused_beside_a_gpu() -> None:
    kv, table, _, _ = cache([40])
    state = kk.offload(kv, 0, 2, 1, table.shape[1])[1]
    on_gpu = state._replace(**{name: getattr(state, name).cuda() for name in ("cache", "slot_of", "page_of", "hand")})
    pages = lists([[0], [1]]).cuda()
    with pytest.raises(ValueError, match="gather_pages: host must be pinned memory"):
        kk.gather_pages(on_gpu, table.cuda(), pages)
    entries = kk.gather_pages(on_gpu._replace(host=state.host.pin_memory()), table.cuda(), pages)
    assert torch.equal(on_gpu.cache[int(entries[0, 1, 0]), 1].cpu(), state.host[int(table[0, 1]), 1])
