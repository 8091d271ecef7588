"""select_pages: the pages of the highest scores, with those that always count."""

import math
from typing import Any

import torch
from torch import Tensor

from kvkernels.ops import _args, _reference
from kvkernels.ops._refusal import refused

DTYPES = (torch.float32,)
FORMATS = ()

_op = torch.ops.kvkernels.select_pages.default


def select_pages(
    scores: Tensor,
    seq_lens: Tensor,
    k: int,
    *,
    page_size: int,
    sink_pages: int = 1,
    recent_pages: int = 2,
    row_k: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The k pages of the highest scores, for every sequence and KV head.

    scores        float32 [B, Hkv, n] of score_pages (or [B, Hkv', n]: any rows), contiguous in the last dim
    seq_lens      int32 [B], tokens; the sequence has its first ceil(seq_lens / page_size) pages to choose from
    k             pages of a list, at least sink_pages + recent_pages
    page_size     tokens of a page
    sink_pages, recent_pages   the first and last pages of a sequence, chosen whatever their scores
    row_k         int32 [B, Hkv]: how many of each row, instead of k; brought into
                  [min(sink_pages + recent_pages, k), k]
    out           where to write; int32 [B, Hkv, k] contiguous

    Returns int32 [B, Hkv, k], ascending, -1 behind the last: what sparse_attention reads, and what later layers and
    steps may read again. Of equal scores the lower page is chosen; NaN is above everything, -0 equals 0: the same on
    every device. ValueError: dtypes, shapes or devices that do not fit, numbers out of range, seq_lens that are
    negative or have more pages than scores (seen on CPU), scores that require grad.

    Source: Tang et al. 2024, arXiv:2406.10774 (Quest); sinks and recent tokens, Xiao et al. 2023, arXiv:2309.17453
    (StreamingLLM).
    """
    try:
        if torch.is_grad_enabled():
            _args.refuse_grad("select_pages", scores=scores)
        if out is None:
            out = torch.empty((*scores.shape[:2], max(k, 0)), dtype=torch.int32, device=scores.device)
        _op(scores, seq_lens, k, page_size, sink_pages, recent_pages, row_k, False, out)
        _args.written(out)
        return out
    except Exception as e:
        raise refused(select_pages, e, locals()) from None


@torch.library.register_fake("kvkernels::select_pages")
def _(scores: Tensor, seq_lens: Tensor, k: int, item_tokens: int, sink: int, recent: int, row_k: Tensor | None,
      tokens: bool, out: Tensor) -> None:  # fmt: skip
    _args.same_device("select_tokens" if tokens else "select_pages", scores=scores, seq_lens=seq_lens, row_k=row_k,
                      out=out)  # fmt: skip


def reference(
    scores: Tensor,
    seq_lens: Tensor,
    k: int,
    *,
    page_size: int,
    sink_pages: int = 1,
    recent_pages: int = 2,
    row_k: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition. dtype is not used: a list is whole numbers."""
    out = torch.full((*scores.shape[:2], k), -1, dtype=torch.int32)
    for b, length in enumerate(seq_lens.tolist()):
        count = -(-length // page_size)
        if length < 0 or count > scores.shape[2]:
            raise ValueError(f"seq_lens[{b}] = {length}, but there are {scores.shape[2]} scores")
        forced = [i for i in range(count) if i < sink_pages or i >= count - recent_pages]
        for h in range(scores.shape[1]):
            row = scores[b, h].tolist()
            rest = [i for i in range(count) if i not in forced]
            rest.sort(key=lambda i: (not math.isnan(row[i]), -row[i] if row[i] == row[i] else 0.0, i))
            most = k if row_k is None else min(max(int(row_k[b, h]), min(sink_pages + recent_pages, k)), k)
            chosen = sorted(forced + rest[: max(0, most - len(forced))])
            out[b, h, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return out


def cases() -> list[dict[str, Any]]:
    """values: how many different scores there are; None: all differ. nan: one in 20 is NaN, infinite or -0."""
    base = {"H": 2, "n": 60, "k": 9, "page_size": 16, "lens": (900, 100, 0, 33), "sink": 1, "recent": 2}
    return [
        base,
        *({**base, "values": values} for values in (1, 2, 7)),
        {**base, "nan": True},
        {**base, "nan": True, "values": 3},
        {**base, "row_k": True},
        {**base, "row_k": True, "k": 3, "values": 2},
        {**base, "sink": 0, "recent": 0, "k": 1},
        {**base, "sink": 4, "recent": 5},
        {**base, "k": 60},
        {**base, "k": 64, "strided": True},
        {**base, "n": 4000, "page_size": 1, "lens": (4000, 3999, 257, 1000), "k": 300},
        {**base, "n": 4000, "page_size": 1, "lens": (4000, 1025), "k": 1000, "values": 50, "row_k": True},
        {**base, "n": 9000, "H": 1, "lens": (9000 * 16,), "k": 512, "close": True},
        {**base, "lens": ()},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Scores past the end are NaN. close: they differ in their last bits."""
    gen = torch.Generator().manual_seed(seed)
    shape = (len(case["lens"]), case["H"], case["n"])
    scores = _reference.randn(shape, gen)
    if "values" in case:
        scores = torch.randint(-(case["values"] // 2), -(-case["values"] // 2), shape, generator=gen) / 4
    if case.get("close"):
        scores = 1 + torch.randint(0, 1000, shape, generator=gen) * 2.0**-23
    if case.get("nan"):
        odd = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, -0.0])
        at = torch.rand(shape, generator=gen) < 0.05
        scores = torch.where(at, odd[torch.randint(0, len(odd), shape, generator=gen)], scores)
    for b, length in enumerate(case["lens"]):
        scores[b, :, -(-length // case["page_size"]) :] = math.nan
    if case.get("strided"):
        scores = torch.stack((scores, scores * 0), 2)[:, :, 0]
    options: dict[str, Any] = {"page_size": case["page_size"], "sink_pages": case["sink"]}
    options["recent_pages"] = case["recent"]
    if case.get("row_k"):
        options["row_k"] = torch.randint(-1, case["k"] + 3, shape[:2], generator=gen).int()
    return (scores, torch.tensor(case["lens"], dtype=torch.int32), case["k"]), options


def cost(case: dict[str, Any]) -> tuple[int, int]:
    items = sum(-(-n // case["page_size"]) for n in case["lens"])
    return 4 * case["H"] * (items + len(case["lens"]) * case["k"]), 0
