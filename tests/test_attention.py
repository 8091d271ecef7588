"""Laws of the attention ops, each against a computation that does without the option in question."""

import math
from typing import Any

import pytest
import torch
from backends import CPU, Q_DTYPE
from conftest import assert_as_good_as, rounding
from torch import Tensor

import kvkernels as kk
from kvkernels.ops import OPS, _attention, _reference, plan_prefix

HEADS, D = 2, 64
# Of two ways of computing the same; the CUDA kernels round weights to 16 bits.
LOOSE = {"rtol": 2e-5, "atol": 2e-5} if CPU else {"rtol": 2e-2, "atol": 2e-2}


def tokens(n: int, gen: torch.Generator, heads: int = HEADS) -> tuple[Tensor, Tensor]:
    """k_cache and v_cache of blocks of one token: a block table is then a list of tokens."""
    k, v = torch.randn(2, n, 1, heads, D, generator=gen).bfloat16()
    return k, v


def rows(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """block_table and seq_lens."""
    table = torch.full((len(lists), max(map(len, lists))), _attention.NO_PAGE, dtype=torch.int32)
    for row, own in zip(table, lists):
        row[: len(own)] = torch.tensor(own)
    return table, torch.tensor([len(own) for own in lists], dtype=torch.int32)


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    out, lse = want
    torch.testing.assert_close(got[0], out.to(got[0].dtype), rtol=LOOSE["rtol"], atol=LOOSE["atol"] + 2 * rounding(out))
    torch.testing.assert_close(got[1], lse, **LOOSE)


BRANCHING = [
    {},
    {"window": (6, 0)},
    {"alibi_slopes": torch.tensor([0.3, 0.1, 0.02, 0.5])},
    {"head_windows": torch.tensor([[3, 2], [0, 9]], dtype=torch.int32), "softcap": 3.0, "sinks": torch.ones(4)},
]


@pytest.mark.parametrize("options", BRANCHING, ids=["plain", "window", "alibi", "head_windows"])
@pytest.mark.parametrize("prefix", [0, 1, 40])
def test_a_tree_of_drafts_is_each_of_its_branches(prefix: int, options: dict[str, Any]) -> None:
    """Seven drafts, two below each but the last four, against decoding the end of every branch by itself."""
    gen = torch.Generator().manual_seed(prefix)
    k, v = tokens(prefix + 7, gen)
    q = torch.randn(1, 7, 4, D, generator=gen).to(Q_DTYPE)
    branches: list[list[int]] = []
    for i in range(7):
        branches.append([*(branches[(i - 1) // 2] if i else []), i])
    bits = torch.tensor([[sum(1 << j for j in branch) for branch in branches]], dtype=torch.int32)
    table, lens = rows([list(range(prefix + 7))])
    tree = kk.flash_decode(q, k, v, table, lens, tree_mask=bits, return_lse=True, **options)
    table, lens = rows([[*range(prefix), *(prefix + j for j in branch)] for branch in branches])
    alone = kk.flash_decode(q[0], k, v, table, lens, return_lse=True, **options)
    close((tree[0][0], tree[1][0]), alone)


@pytest.mark.parametrize("window", [-1, 0, 17])
def test_queries_together_are_queries_one_by_one(window: int) -> None:
    gen = torch.Generator().manual_seed(0)
    k, v = tokens(100, gen)
    q = torch.randn(1, 5, 4, D, generator=gen).to(Q_DTYPE)
    own = torch.randperm(100, generator=gen).tolist()
    options: dict[str, Any] = {"window": (window, 0), "alibi_slopes": torch.full((4,), 0.1), "return_lse": True}
    together = kk.flash_decode(q, k, v, *rows([own]), **options)
    one_by_one = kk.flash_decode(q[0], k, v, *rows([own[: 96 + i] for i in range(5)]), **options)
    close((together[0][0], together[1][0]), one_by_one)


def test_a_streaming_head_is_attention_over_its_sinks_and_window() -> None:
    gen = torch.Generator().manual_seed(0)
    k, v = tokens(300, gen)
    q = torch.randn(1, 4, D, generator=gen).to(Q_DTYPE)
    windows = [(5, 20), (0, -1)]
    got = kk.flash_decode(q, k, v, *rows([list(range(300))]), return_lse=True,
                          head_windows=torch.tensor(windows, dtype=torch.int32))  # fmt: skip
    seen = [[*range(5), *range(300 - 21, 300)], list(range(300))]
    for g in range(2):
        heads = slice(2 * g, 2 * g + 2)
        part = kk.flash_decode(q[:, heads].contiguous(), k[:, :, g : g + 1], v[:, :, g : g + 1], *rows([seen[g]]),
                               return_lse=True)  # fmt: skip
        close((got[0][:, heads], got[1][:, heads]), part)


@pytest.mark.parametrize("dropped", [1, 7])
def test_an_extra_token_stands_for_its_number(dropped: int) -> None:
    """bias = ln n: as n tokens with that key and value."""
    gen = torch.Generator().manual_seed(dropped)
    k, v = tokens(50, gen)
    q = torch.randn(2, 4, D, generator=gen).to(Q_DTYPE)
    table, lens = rows([[3, 5, 7], []])
    k[40:], v[40:] = k[40], v[40]
    extra = (k[40].to(Q_DTYPE), v[40].to(Q_DTYPE), torch.full((1, HEADS), math.log(dropped)))
    got = kk.flash_decode(q, k, v, table, lens, softcap=4.0, extra=extra, return_lse=True)
    copies = list(range(40, 40 + dropped))
    close(got, kk.flash_decode(q, k, v, *rows([[*copies, 3, 5, 7], copies]), softcap=4.0, return_lse=True))


@pytest.mark.parametrize("cap", [1e4, 1e6, 1e30])
def test_a_cap_far_above_every_score_changes_nothing(cap: float) -> None:
    gen = torch.Generator().manual_seed(0)
    k, v = tokens(200, gen)
    q = 3 * torch.randn(1, 4, D, generator=gen).to(Q_DTYPE)
    pages = rows([list(range(200))])
    capped = kk.flash_decode(q, k, v, *pages, softcap=cap, return_lse=True)
    close(capped, kk.flash_decode(q, k, v, *pages, return_lse=True))


def test_head_map_says_which_head_reads_which() -> None:
    gen = torch.Generator().manual_seed(0)
    k, v = tokens(60, gen, heads=4)
    q = torch.randn(2, 9, D, generator=gen).to(Q_DTYPE)
    table, lens = rows([list(range(33)), list(range(60))])
    head_map = [3, 0, 3, 3, 1, 3, 0, 3, 3]
    out, lse = kk.flash_decode(q, k, v, table, lens, head_map=head_map, return_lse=True)
    for h, head in enumerate(head_map):
        one = kk.flash_decode(q[:, h : h + 1].contiguous(), k[:, :, head : head + 1], v[:, :, head : head + 1],
                              table, lens, return_lse=True)  # fmt: skip
        close((out[:, h : h + 1], lse[:, h : h + 1]), one)


def test_unequal_heads_are_equal_heads_repeated() -> None:
    gen = torch.Generator().manual_seed(0)
    k, _ = tokens(60, gen, heads=2)
    _, v = tokens(60, gen, heads=3)
    q = torch.randn(2, 12, D, generator=gen).to(Q_DTYPE)
    where = rows([list(range(33)), list(range(60))])
    got = kk.flash_decode(q, k, v, *where, return_lse=True)
    close(got, kk.flash_decode(q, k.repeat_interleave(3, 2), v.repeat_interleave(2, 2), *where, return_lse=True))


def test_values_within_keys_are_values_beside_them() -> None:
    gen = torch.Generator().manual_seed(0)
    k = torch.randn(5, 16, 1, 576, generator=gen).bfloat16()
    q = torch.randn(2, 16, 576, generator=gen).to(Q_DTYPE)
    table, lens = torch.tensor([[4, 0, 2], [1, 3, 0]], dtype=torch.int32), torch.tensor([40, 17], dtype=torch.int32)
    got = kk.flash_decode(q, k, k[..., :512], table, lens, scale=0.1, return_lse=True)
    close(got, kk.flash_decode(q, k, k[..., :512].clone(), table, lens, scale=0.1, return_lse=True))


@pytest.mark.parametrize("step", [1, 7, 16])
def test_decoding_in_steps_is_a_prefill(step: int) -> None:
    """Every token of a sequence, `step` at a time, against causal attention over all at once."""
    gen = torch.Generator().manual_seed(step)
    n = 50
    k, v = tokens(n, gen)
    q = torch.randn(n, 4, D, generator=gen).to(Q_DTYPE)
    whole = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1)[None] for x in (q, k[:, 0], v[:, 0])), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    parts = [kk.flash_decode(q[None, i : i + step], k, v, *rows([list(range(min(i + step, n)))]))[0]
             for i in range(0, n, step)]  # fmt: skip
    got = torch.cat(parts)
    torch.testing.assert_close(got.double(), whole, rtol=LOOSE["rtol"], atol=LOOSE["atol"] + 2 * rounding(got))


@pytest.mark.parametrize("formats", [("bf16",), ("u2",), ("bf16", "m31/t1", "u4")], ids=["bf16", "u2", "mixed"])
@pytest.mark.parametrize("tree", plan_prefix.TREES)
def test_a_plan_changes_nothing(tree: str, formats: tuple[str, ...]) -> None:
    """Shared tokens read once, against every sequence by itself."""
    case = {"tree": tree, "B": 11, "pages": 10, "Tq": 1, "Hq": 4, "Hkv": 2, "D": 128, "page_size": 16,
            "dtype": "float32", "formats": formats, "least": 0}  # fmt: skip
    (q, kv, table, lens), options = OPS["prefix_attention"].make(case)
    plan = options.pop("plan")
    want = kk.quant_attention(q, kv, table, lens, **options)
    close(kk.prefix_attention(q, kv, table, lens, plan=plan, **options), want)
    close(kk.prefix_attention(q, kv, table, lens, **options), want)
    close(kk.quant_attention(q, kv, table, lens, plan=kk.plan_decode(lens), **options), want)


def test_flash_decode_takes_a_plan() -> None:
    gen = torch.Generator().manual_seed(0)
    k, v = tokens(80, gen)
    q = torch.randn(3, 2, 4, D, generator=gen).to(Q_DTYPE)
    table, lens = rows([[*range(30), 40, 41, 42], [*range(30), *range(50, 60)], [70, 71]])
    plan = kk.plan_prefix(table, lens, 1, num_queries=2, min_tokens=0)
    assert plan.nodes[0].tolist() == [0, 2, 0, 30, -1]
    got = kk.flash_decode(q, k, v, table, lens, plan=plan, return_lse=True)
    close(got, kk.flash_decode(q, k, v, table, lens, return_lse=True))


def test_plans_leave_small_nodes_out() -> None:
    """T (n - 1) >= min_tokens * n: 64 tokens of 2 sequences save 32 tokens each."""
    table = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 5], [6, 6, 6, 6, 6]], dtype=torch.int32)
    lens = torch.tensor([80, 80, 80], dtype=torch.int32)
    shared = [[0, 2, 0, 64, -1], [0, 1, 64, 80, 0], [1, 2, 64, 80, 0], [2, 3, 0, 80, -1]]
    assert kk.plan_prefix(table, lens, 16, min_tokens=32).nodes[:4].tolist() == shared
    for plan in (kk.plan_prefix(table, lens, 16, min_tokens=33), kk.plan_decode(lens)):
        assert plan.nodes[:4].tolist() == [[0, 1, 0, 80, -1], [1, 2, 0, 80, -1], [2, 3, 0, 80, -1], [0, 0, 0, 0, -1]]
        assert plan.leaf.tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [1, 16])
def test_any_number_of_blocks_and_strides_agree(size: int) -> None:
    """NHD, HND, a slice of a wider cache, K and V interleaved: the same bits from each."""
    gen = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 9, size, HEADS, D, generator=gen).bfloat16()
    q = torch.randn(2, 4, D, generator=gen).to(Q_DTYPE)
    table = torch.tensor([[8, 3, 5], [0, 1, 2]], dtype=torch.int32)
    lens = torch.tensor([2 * size + 1, size], dtype=torch.int32)
    want = kk.flash_decode(q, k, v, table, lens)
    together, wide = torch.stack((k, v), 1), torch.cat((k, v), -1)
    for a, b in (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)],
        [together[:, 0], together[:, 1]],
        [wide[..., :D], wide[..., D:]],
    ):
        assert torch.equal(kk.flash_decode(q, a, b, table, lens), want)


def test_the_references_of_all_ops_agree() -> None:
    """The same numbers as a pool, as caches, and in plain float64 arithmetic on one tensor."""
    gen = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 3, 16, HEADS, D, generator=gen).half()
    q = _reference.randn((1, 4, D), gen)
    table, lens = torch.tensor([[2, 0, 1]], dtype=torch.int32), torch.tensor([37], dtype=torch.int32)
    flat_k, flat_v = (x[[2, 0, 1]].flatten(0, 1)[:37].double().repeat_interleave(2, 1) for x in (k, v))
    scores = torch.einsum("hd,thd->ht", q[0].double(), flat_k) / math.sqrt(D)
    want = torch.einsum("ht,thd->hd", scores.softmax(-1), flat_v)[None], scores.logsumexp(-1)[None]
    kv = kk.PagedKV.from_caches(k, v)
    for got in (
        OPS["flash_decode"].reference(q, k, v, table, lens, return_lse=True),
        OPS["quant_attention"].reference(q, kv, table, lens, return_lse=True),
        OPS["prefix_attention"].reference(q, kv, table, lens, return_lse=True),
    ):
        for mine, truth in zip(got, want):
            torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)


NAN, INF = math.nan, math.inf
# bf16 caches can hold NaN and Inf in K and V; split_tokens: states are merged
NON_FINITE: list[dict[str, Any]] = [
    {"formats": ("bf16 NHD",)},
    {"formats": ("f16 HND",), "dtype": "bfloat16", "Tq": 2},
    {"formats": ("bf16 NHD",), "dtype": "bfloat16", "softcap": 5.0},
    {"formats": ("u2",), "dtype": "bfloat16", "transform": True},
    {"formats": ("bf16 NHD", "u4"), "lens": (200, 3), "split_tokens": 32},
    {"formats": ("u8",), "dtype": "bfloat16", "Tq": 2, "window": 20},
]


@pytest.mark.parametrize("joins", [(), ("sinks",), ("sinks", "extra")], ids=["alone", "sinks", "sinks+extra"])
@pytest.mark.parametrize("case", NON_FINITE, ids=lambda c: "+".join(c["formats"]).replace(" ", ""))
def test_nan_and_inf_stay_in_their_rows(case: dict[str, Any], joins: tuple[str, ...]) -> None:
    """One number of one argument is NaN or Inf: the result is not finite where the reference's is, and nowhere else."""
    op = OPS["quant_attention"]
    full: dict[str, Any] = {"Tq": 1, "Hq": 4, "Hkv": 2, "D": D, "page_size": 16, "lens": (40, 3, 0), "dtype": "float32",
                            **case, **({"sinks": True} if "sinks" in joins else {}),
                            **({"extra": "shared"} if "extra" in joins else {})}  # fmt: skip

    def poisoned(place: str, value: float) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (q, kv, table, lens), options = op.make(full)
        page = int(table[0, 0])
        side = {"k": 0, "v": 1}.get(place)
        if place == "q":
            q.view(len(lens), -1, 4, D)[0, 0, 1, 5] = value
        elif side is not None:
            kv.pools[page >> 28][side][page & (1 << 28) - 1, 1, 7, 9] = value
        elif place == "sinks":
            options["sinks"][2] = value
        else:
            x = options["extra"][["k", "v", "bias"].index(place[6:])]
            x.view(2, -1)[1, -1] = value
        return (q, kv, table, lens), options

    caches = full["formats"][0].endswith("HD")
    places = ["q", *(["k", "v"] if caches else []), *joins[:1][: "sinks" in joins]]
    places += [f"extra {x}" for x in ("k", "v", "bias") if "extra" in joins]
    for place in places:
        # of a rotated query every channel is infinite or NaN, by the order of the sums
        for value in (NAN,) if place == "q" and full["formats"] != ("bf16 NHD",) else (NAN, INF, -INF):
            if place == "v" and full["Tq"] > 1:
                continue  # a weight of 0 takes no NaN out of a product: rows that do not see the token may be NaN too
            args, options = poisoned(place, value)
            exact = op.reference(*args, **options)
            plain = op.reference(*args, **options, dtype=args[0].dtype)
            for i, (got, near, truth) in enumerate(zip(kk.quant_attention(*args, **options), plain, exact)):
                assert_as_good_as(got, near, truth, f"{place} = {value}: {'out' if i == 0 else 'lse'}")
