"""What the attention ops share: one definition, and the options of their cases."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvkernels.ops import _reference
from kvkernels.plan import Plan

NO_PAGE = _reference.NO_PAGE
Extra = tuple[Tensor, Tensor, Tensor]


def reference(
    q: Tensor,
    rows: Callable[[int, Tensor], tuple[Tensor, Tensor]],
    kv_heads: tuple[int, int],
    v_dim: int,
    seq_lens: Tensor,
    *,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    head_windows: Tensor | None = None,
    extra: Extra | None = None,
    head_map: Sequence[int] | None = None,
    split_tokens: int | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
    selected: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention, one query and head at a time, in `dtype`. split_tokens and plan change nothing.

    A NaN score or sink makes the row NaN. A score of -inf is a token that is not seen, a sink of +inf takes all weight:
    out 0, lse +inf. A score of +inf: out NaN, lse +inf.

    selected: bool [B, groups, tokens], what a KV head reads; None: everything.

    rows(b, seen) -> keys [L, Hk, D] and values [L, Hv, v_dim] of sequence b; seen bool [L]: other tokens are not used.
    """
    queries = q.to(dtype) if q.dim() == 4 else q.to(dtype).unsqueeze(1)
    B, Tq, Hq, D = queries.shape
    Hk, Hv = kv_heads
    groups = math.lcm(Hk, Hv)
    group_of = [h * groups // Hq for h in range(Hq)] if head_map is None else head_map
    scale = D**-0.5 if scale is None else scale

    def capped(scores: Tensor) -> Tensor:
        return softcap * torch.tanh(scores / softcap) if softcap > 0 else scores

    out = torch.zeros(B, Tq, Hq, v_dim, dtype=dtype)
    lse = torch.full((B, Tq, Hq), -math.inf, dtype=dtype)
    for b, length in enumerate(seq_lens.tolist()):
        if length < 0:
            raise ValueError(f"seq_lens[{b}] = {length} is negative")
        key_at, query_at, visible = positions(length, Tq, None if tree_mask is None else tree_mask[b])
        if window[0] >= 0:
            visible = visible & (key_at >= query_at[:, None] - window[0])
        sees = [visible] * groups
        if head_windows is not None:
            for g, (sink, recent) in enumerate(head_windows.tolist()):
                if recent >= 0:
                    sees[g] = visible & ((key_at < sink) | (key_at >= query_at[:, None] - recent))
        if selected is not None:
            sees = [visible_to & selected[b, g, :length] for g, visible_to in enumerate(sees)]
        keys, values = rows(b, torch.stack(sees).any(0).any(0))
        for i in range(Tq):
            for h in range(Hq):
                g, query = group_of[h], queries[b, i, h]
                seen = sees[g][i]
                k, v = keys[seen, g * Hk // groups].to(dtype), values[seen, g * Hv // groups].to(dtype)
                scores = capped(scale * (k @ query))
                if alibi_slopes is not None:
                    slope = (alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[b])[h].to(dtype)
                    scores = scores - slope * (query_at[i] - key_at[seen]).to(dtype)
                if extra is not None:
                    more_k, more_v, bias = (x[b % len(x), g].to(dtype) for x in extra)
                    if bias != -math.inf:
                        scores = torch.cat((scores, capped(scale * (more_k @ query))[None] + bias))
                        v = torch.cat((v, more_v[None]))
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1].to(dtype)))
                if len(scores) == 0:
                    continue
                total = torch.logsumexp(scores, 0)
                lse[b, i, h] = total
                if total == -math.inf:
                    continue
                weights = torch.softmax(scores, 0) if total.isfinite() else torch.exp(scores - total)
                out[b, i, h] = math.nan if total.isnan() else weights[: len(v)] @ v
    if q.dim() == 3:
        out, lse = out.squeeze(1), lse.squeeze(1)
    return (out, lse) if return_lse else out


def positions(length: int, Tq: int, tree: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the keys [length] and of the queries [Tq], and who sees whom [Tq, length], windows aside."""
    key_at, query_at = torch.arange(length), torch.arange(length - Tq, length)
    if tree is None:
        return key_at, query_at, key_at <= query_at[:, None]
    ancestors = (tree[:, None] >> torch.arange(Tq) & 1) == 1  # [query, token of the tree]
    query_at = length - Tq + ancestors.sum(1) - 1
    visible = torch.ones(Tq, length, dtype=torch.bool)
    if own := min(Tq, length):  # tokens of the tree before the sequence's first do not exist
        key_at[-own:] = query_at[-own:]
        visible[:, -own:] = ancestors[:, -own:]
    return key_at, query_at, visible


def rows_of_pages(
    page_table: Tensor,
    page_size: int,
    k_shape: tuple[int, int],
    v_shape: tuple[int, int],
    read: Callable[[int, str], tuple[Tensor, Tensor]],
    name: str = "page_table",
) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
    """`rows` of reference(). Shapes are (heads, head dim); read(entry, what to call it) -> keys [Hk, page_size, D] and
    values [Hv, page_size, v_dim] of a page. Pages that nobody sees are not read: their rows are NaN."""

    def rows(b: int, seen: Tensor) -> tuple[Tensor, Tensor]:
        length = len(seen)
        pages = -(-length // page_size)
        if pages > page_table.shape[1]:
            raise ValueError(
                f"{name} is too narrow: seq_lens[{b}] = {length} needs {pages} pages of {page_size} tokens, "
                f"but {name}.size(1) = {page_table.shape[1]}"
            )
        k, v = (torch.full((pages, page_size, *s), math.nan, dtype=torch.float64) for s in (k_shape, v_shape))
        for i in (seen.nonzero().flatten() // page_size).unique().tolist():
            page_k, page_v = read(int(page_table[b, i]), f"{name}[{b}, {i}]")
            k[i], v[i] = page_k.transpose(0, 1), page_v.transpose(0, 1)
        return k.flatten(0, 1)[:length], v.flatten(0, 1)[:length]

    return rows


# ---- cases

# Every option alone, and all that go together, for 4 query heads and 2 KV heads.
OPTIONS: list[dict[str, Any]] = [
    {"Tq": 5},
    {"Tq": 16, "lens": (70, 16, 0, 7)},
    {"window": 40},
    {"window": 0},
    {"Tq": 4, "window": 33, "lens": (129, 3, 35, 64)},
    {"softcap": 5.0},
    {"sinks": True},
    {"alibi": 1},
    {"alibi": 2, "Tq": 3},
    {"scale": 0.3},
    {"split_tokens": 16},
    {"split_tokens": 48, "Tq": 2},
    {"tree": True, "Tq": 7},
    {"tree": True, "Tq": 16, "lens": (129, 16, 5, 40), "alibi": 1, "window": 20},
    {"head_windows": ((4, 20), (0, -1)), "lens": (300, 30, 0, 129)},
    {"head_windows": ((37, 5), (3, 40)), "lens": (300, 1, 64, 129), "Tq": 3},
    {"extra": "own"},
    {"extra": "shared", "Tq": 2, "softcap": 4.0},
    {"head_map": (1, 0, 1, 1)},
    {"head_map": (1, 1, 1, 1), "Tq": 2},
]
TOGETHER: dict[str, Any] = {
    "Tq": 6, "Hq": 6, "lens": (300, 4, 0, 129), "tree": True, "head_windows": ((20, 60), (3, 9)), "extra": "own",
    "head_map": (1, 0, 1, 1, 1, 0), "sinks": True, "alibi": 2, "softcap": 8.0, "scale": 0.2, "split_tokens": 64,
}  # fmt: skip


def seen_pages(case: dict[str, Any], length: int) -> Counter[int]:
    """Page -> how many of its tokens some query may look at."""
    sink, window = 0, case.get("window", -1)
    if "head_windows" in case:
        sinks, windows = zip(*case["head_windows"])
        sink, window = max(sinks), -1 if min(windows) < 0 else max(windows)
    first = max(0, length - case["Tq"] - window) if window >= 0 else 0
    return Counter(i // case["page_size"] for i in range(length) if i < sink or i >= first)


def random_tree(Tq: int, gen: torch.Generator) -> list[int]:
    """Ancestor bits of a forest of Tq tokens, parents before children."""
    bits: list[int] = []
    for i in range(Tq):
        parent = int(torch.randint(-1, i, (1,), generator=gen)) if i else -1
        bits.append((bits[parent] if parent >= 0 else 0) | 1 << i)
    return bits


def random_options(case: dict[str, Any], groups: int, D: int, v_dim: int, gen: torch.Generator) -> dict[str, Any]:
    """Keyword arguments of a case. An extra token without weight (bias -inf) holds NaN."""
    B, Hq, dtype = len(case["lens"]), case["Hq"], getattr(torch, case["dtype"])
    options: dict[str, Any] = {k: case[k] for k in ("scale", "softcap", "split_tokens", "head_map") if k in case}
    options["return_lse"] = case.get("return_lse", True)
    if "window" in case:
        options["window"] = (case["window"], 0)
    if case.get("sinks"):
        options["sinks"] = 2 * _reference.randn((Hq,), gen)
    if case.get("alibi"):
        slopes = 2.0 ** -torch.arange(1.0, Hq + 1)
        options["alibi_slopes"] = slopes if case["alibi"] == 1 else slopes + torch.rand(B, 1, generator=gen)
    if case.get("tree"):
        trees = [random_tree(case["Tq"], gen) for _ in range(B)]
        options["tree_mask"] = torch.tensor(trees, dtype=torch.int32).view(B, case["Tq"])
    if "head_windows" in case:
        options["head_windows"] = torch.tensor(case["head_windows"], dtype=torch.int32)
    if "extra" in case:
        n = B if case["extra"] == "own" else 1
        k, v = (_reference.randn((n, groups, d), gen, dtype) for d in (D, v_dim))
        bias = 3 + _reference.randn((n, groups), gen)
        if case["extra"] == "own":
            bias[::2, 0] = -math.inf
            k[::2, 0], v[::2, 0] = math.nan, math.nan
        options["extra"] = (k, v, bias)
    return options


def random_queries(case: dict[str, Any], D: int, gen: torch.Generator) -> Tensor:
    dtype = getattr(torch, case["dtype"])
    B, Tq, Hq = len(case["lens"]), case["Tq"], case["Hq"]
    shape = (B, Hq, D) if Tq == 1 else (B, Tq, Hq, D)
    if case.get("strided"):  # as a slice of a fused qkv projection
        return _reference.randn((*shape[:-1], 3 * D), gen, dtype)[..., :D]
    return _reference.randn(shape, gen, dtype)
