"""tier_tokens, lay_tokens: tokens are in the pools that their scores give them, and attention over the mix is right."""

import math
from typing import Any

import pytest
import torch
from backends import CPU, Q_DTYPE
from conftest import rounding
from torch import Tensor

import kvkernels as kk
from kvkernels.paged_kv import PAGE_BITS, PAGE_MASK

HEADS, D, PAGE = 2, 64, 16


def test_tiers_follow_the_scores() -> None:
    """40 + 9 tokens in pool 0: what is more than whole pages of the others. 20 are rounded up to 32."""
    gen = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 209, generator=gen)
    tiers = kk.tier_tokens(scores, (40, 20), page_size=PAGE)
    for row, own in zip(scores, tiers):
        assert own.bincount().tolist() == [49, 32, 128]
        assert row[own == 0].min() > row[own == 1].max()
        assert row[own == 1].min() > row[own == 2].max()
    assert tiers.dtype == torch.int32


@pytest.mark.parametrize(
    ("length", "counts"),
    [(0, [0, 0, 0]), (7, [7, 0, 0]), (24, [24, 0, 0]), (26, [26, 0, 0]), (40, [24, 16, 0]), (60, [28, 32, 0]),
     (97, [33, 48, 16]), (100, [36, 48, 16])],
)  # fmt: skip
def test_short_prompts_fill_the_important_tiers(length: int, counts: list[int]) -> None:
    scores = torch.full((1, 100), torch.nan)
    scores[:, :length] = torch.rand(1, length, generator=torch.Generator().manual_seed(length))
    tiers = kk.tier_tokens(scores, (24, 33), page_size=PAGE, seq_lens=torch.tensor([length], dtype=torch.int32))
    assert [int((tiers == pool).sum()) for pool in range(3)] == counts
    assert (tiers[:, length:] == -1).all()


def test_recent_tokens_and_sinks_come_first() -> None:
    scores = torch.rand(1, 128, generator=torch.Generator().manual_seed(0))
    scores[:, :3] = torch.inf
    tiers = kk.tier_tokens(scores, (16,), page_size=PAGE, recent_tokens=10)
    assert (tiers[0, :3] == 0).all()
    assert (tiers[0, -10:] == 0).all()
    best = scores[0, 3:-10].topk(3).indices + 3
    assert set((tiers[0] == 0).nonzero().flatten().tolist()) == {0, 1, 2, *best.tolist(), *range(118, 128)}
    even = kk.tier_tokens(torch.zeros(1, 64), (16,), page_size=PAGE)
    assert (even[0] == 0).nonzero().flatten().tolist() == list(range(16))  # of equal ones the earlier


def transform() -> kk.KVTransform:
    gen = torch.Generator().manual_seed(7)
    order = torch.stack([torch.randperm(D, generator=gen) for _ in range(HEADS)]).int()
    return kk.KVTransform(torch.randn(HEADS, D, generator=gen), torch.rand(HEADS, D, generator=gen) + 0.5, order)


def test_attention_is_that_over_the_tokens_of_all_tiers() -> None:
    """Dense attention in float64 over what each pool holds, before and after tokens are appended behind the prompt."""
    gen = torch.Generator().manual_seed(0)
    lens = [150, 40, 0]
    k, v = torch.randn(2, 3, 150, HEADS, D, generator=gen)
    kv = kk.PagedKV.empty(["bf16", "u4", "m31/t1.e5m3"], 12, HEADS, D, PAGE, transform=transform())
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    tiers = kk.tier_tokens(torch.rand(3, 150, generator=gen), (32, 48), page_size=PAGE, seq_lens=seq_lens)
    free = [torch.randperm(12, generator=gen), torch.randperm(12, generator=gen).tolist(), range(12)]
    layout = kk.lay_tokens(k, v, kv, tiers, free)
    assert layout.seq_lens.tolist() == lens

    decoded = torch.zeros(2, 3, 150, HEADS, D)  # of the tokens, by their numbers in the prompts
    for b, length in enumerate(lens):
        assert sorted(layout.order[b, :length].tolist()) == list(range(length))
        assert (layout.order[b, length:] == -1).all()
        for place, token in enumerate(layout.order[b, :length].tolist()):
            entry = int(layout.page_table[b, place // PAGE])
            assert entry >> PAGE_BITS == tiers[b, token]
            assert layout.slots[b, place] == (entry & PAGE_MASK) * PAGE + place % PAGE
            got = kk.read_kv(kv, entry >> PAGE_BITS, layout.slots[b, place : place + 1])
            decoded[0, b, token], decoded[1, b, token] = got[0][0], got[1][0]
    given = torch.stack((k, v))
    near = (decoded - given).flatten(3).square().sum(3) / given.flatten(3).square().sum(3)
    for pool, bound in ((0, 1e-5), (1, 0.1), (2, 1.0)):  # 2 is that of another token
        assert near[:, tiers == pool].max() < bound, pool

    q = torch.randn(3, 3, 2 * HEADS, D, generator=gen).to(Q_DTYPE)
    close(kk.quant_attention(q[:, 0], kv, layout.page_table, layout.seq_lens), q[:, :1], decoded, lens, [0, 0, 0])
    more = torch.randn(2, 3, 3, HEADS, D, generator=gen).bfloat16().float()
    table = torch.nn.functional.pad(layout.page_table, (0, 1), value=-1)
    new = iter(free[0][6:].tolist())
    for b, length in enumerate(lens):
        for place in range(length, length + 3):
            if place % PAGE == 0:
                table[b, place // PAGE] = kv.entry(0, next(new))
        slots = [int(table[b, place // PAGE]) * PAGE + place % PAGE for place in range(length, length + 3)]
        kk.write_kv(more[0, b], more[1, b], kv, 0, torch.tensor(slots))
    got = kk.quant_attention(q, kv, table, layout.seq_lens + 3)
    whole = torch.zeros(2, 3, 153, HEADS, D)
    for b, length in enumerate(lens):
        whole[:, b, : length + 3] = torch.cat([decoded[:, b, :length], more[:, b]], 1)
    for i in range(3):
        close(got[:, i], q[:, i : i + 1], whole, lens, [i + 1] * 3)


def close(got: Tensor, q: Tensor, kv: Tensor, lens: list[int], more: list[int]) -> None:
    for b, length in enumerate(lens):
        k, v = kv[:, b, : length + more[b]].double().repeat_interleave(2, 2)
        scores = torch.einsum("hd,thd->ht", q[b, 0].double(), k) / math.sqrt(D)
        want = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
        loose = 2e-5 if CPU else 2e-2
        torch.testing.assert_close(got[b].double(), want, rtol=loose, atol=loose + 2 * rounding(got[b]))


def test_tokens_may_be_left_out() -> None:
    gen = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, 50, HEADS, D, generator=gen).bfloat16()
    kv = kk.PagedKV.empty(["bf16", "u8"], 4, HEADS, D, PAGE)
    tiers = torch.full((1, 50), -1)
    tiers[0, 1:40:2], tiers[0, 2:34:2] = 0, 1
    layout = kk.lay_tokens(k, v, kv, tiers, [[3, 1], [2]])
    assert layout.order[0, :36].tolist() == [*range(2, 34, 2), *range(1, 40, 2)]
    assert layout.page_table.tolist() == [[1 << PAGE_BITS | 2, 3, 1, -1]]
    assert torch.equal(kk.read_kv(kv, 0, layout.slots[0, 16:36], torch.bfloat16)[0], k[0, 1:40:2])


TIERS = torch.zeros(1, 20, dtype=torch.int32)
KV = kk.PagedKV.empty(["bf16", "u2"], 2, HEADS, D, PAGE)
X = torch.zeros(1, 20, HEADS, D)


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(5)}, r"scores must be \[B, T\] floating point; got torch.float32 \[5\]"),
        ({"scores": torch.zeros(1, 5).int()}, r"scores must be \[B, T\] floating point; got torch.int32"),
        ({"budgets": ()}, r"budgets must be one number of tokens or more, at least 0; got \[\]"),
        ({"budgets": (4, -1)}, r"budgets must be .* got \[4, -1\]"),
        ({"page_size": 0}, "page_size must be at least 1; got 0"),
        ({"recent_tokens": 5}, r"recent_tokens must be 0 to budgets\[0\] = 4, of pool 0; got 5"),
        (
            {"seq_lens": torch.tensor([1, 2])},
            r"seq_lens must be int32 \[B\] = \[1\], from scores; got torch.int64 \[2\]",
        ),
        ({"seq_lens": torch.tensor([1.0])}, r"seq_lens must be int32 .*; got torch.float32 \[1\]"),
        ({"seq_lens": torch.tensor([6])}, r"seq_lens\[0\] must be 0 to T = 5, from scores; got 6"),
        ({"seq_lens": torch.tensor([-1])}, r"seq_lens\[0\] must be 0 to T = 5, from scores; got -1"),
        ({"seq_lens": torch.tensor([1], device="meta")}, "seq_lens is on meta, but scores is on cpu"),
        ({"scores": torch.tensor([[1, 2, torch.nan]])}, r"scores\[0, 2\] is NaN"),
    ],
)
def test_tier_tokens_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"tier_tokens: {message}"):
        kk.tier_tokens(**{"scores": torch.zeros(1, 5), "budgets": (4,), "page_size": 16, **change})


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (10.7,)}, r"budgets\[0\] must be an integer; got 10.7"),
        ({"page_size": 16.0}, "page_size must be an integer; got 16.0"),
        ({"recent_tokens": "1"}, "recent_tokens must be an integer; got '1'"),
    ],
)
def test_tier_tokens_takes_integers(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"tier_tokens: {message}"):
        kk.tier_tokens(**{"scores": torch.zeros(1, 5), "budgets": (4,), "page_size": 16, **change})


@pytest.mark.once
def test_nothing_to_tier() -> None:
    for shape in ((0, 5), (2, 0)):
        tiers = kk.tier_tokens(torch.zeros(shape), (4,), page_size=16)
        assert tiers.shape == shape
        x = torch.zeros(*shape, HEADS, D)
        layout = kk.lay_tokens(x, x, KV, tiers, [[0], [1]])
        assert layout.seq_lens.tolist() == [0] * shape[0]
    unknown = torch.full((1, 5), torch.nan)
    unknown[0, :3] = 0  # those of recent tokens and past the end are not read
    tiers = kk.tier_tokens(unknown, (4,), page_size=16, recent_tokens=1, seq_lens=torch.tensor([4]))
    assert tiers.tolist() == [[0, 0, 0, 0, -1]]


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": X[:, 1:]}, r"v must have k's shape \[1, 20, 2, 64\]; got \[1, 19, 2, 64\]"),
        ({"pages": [range(100, 105), [0]]}, "pages of pool 0 must be 0 to 1; got 100"),
        ({"pages": [[0, 1], [-1]]}, "pages of pool 1 must be 0 to 1; got -1"),
        ({"k": X[0]}, r"k must be \[B, T, Hkv, D\] and tiers int32 \[B, T\]; got \[20, 2, 64\]"),
        ({"tiers": TIERS[:, 1:]}, r".* tiers int32 \[B, T\]; got .* torch.int32 \[1, 19\]"),
        ({"tiers": TIERS + 2}, "tiers name pool 2, but there are 2"),
        (
            {"tiers": TIERS + 1},
            "tiers of sequence 0 have 20 tokens in pool 1, no whole pages of 16; only pool 0",
        ),
        ({"pages": [[0, 1]]}, "pages must be a list for each of the 2 pools; got 1"),
        ({"pages": [[0], [1]]}, "pool 0 needs 2 pages; got 1"),
    ],
)
def test_lay_tokens_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"lay_tokens: {message}"):
        kk.lay_tokens(**{"k": X, "v": X, "kv": KV, "tiers": TIERS, "pages": [[0, 1], [0, 1]], **change})
