"""score_pages: how much queries want each page."""

import math
from typing import Any

import torch
from torch import Tensor

from kvkernels.formats import formats
from kvkernels.ops import _args, _attention, _reference, _scores, page_summaries
from kvkernels.ops._refusal import refused
from kvkernels.paged_kv import PagedKV
from kvkernels.summaries import KINDS, PageSummaries, decode

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = tuple(f.name for f in formats())

_op = torch.ops.kvkernels.score_pages.default


def score_pages(
    q: Tensor,
    source: PageSummaries | PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    reduce: str = "max",
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One number per page and KV head: how much the last tokens' queries may want it.

    The score of a query row for a page is scale times an upper bound of q.k over its tokens (minmax), q.mean(k) (mean),
    or, from a cache, q.k of the best token (exact). Rows of a KV head (its query heads, of all Tq tokens) are reduced
    to one score.

    q           [B, Hq, D], or [B, Tq, Hq, D] with Tq 1 to 16; float32, float16 or bfloat16, contiguous in the last dim.
                Any Hq that is a multiple of Hkv: also a probe query [B, Hkv, D]
    source      PageSummaries of kind minmax or mean, of pages or of segments; or a PagedKV
    page_table  int32 [B, max_pages]; not read past seq_lens, nor for segments
    seq_lens    int32 [B], tokens
    reduce      "max" or "sum" of the rows' scores; "softmax_max" or "softmax_sum" of their softmax over all pages of
                the sequence
    scale       None: 1 / sqrt(D)
    out         where to write; float32 [B, Hkv, n] contiguous

    Returns float32 [B, Hkv, n], n = max_pages or num_segments; -inf behind the last page, and for segments that are
    empty or end past seq_lens. A NaN in q or in a record gives NaN scores, and with softmax NaN to all pages of that
    row. There is no mask: what a query may see is the business of attention. ValueError: dtypes, shapes or devices that
    do not fit; summaries of channels; seq_lens or page ids that are wrong (seen on CPU); q that requires grad.

    Source: Tang et al. 2024, arXiv:2406.10774 (Quest: minmax); Yuan et al. 2025, arXiv:2502.11089 (NSA: scores summed
    over the heads of a group); Yang et al. 2024, arXiv:2410.05076 (TidalDecode: exact scores in selection layers).
    """
    try:
        if isinstance(source, PagedKV):
            return _scores.of_tokens("score_pages", q, source, page_table, seq_lens, reduce, scale, out)
        records, segments = list(source.records), source.segments
        n = page_table.shape[-1] if segments is None else max(segments.shape[-1] - 1, 0)
        heads = records[0].shape[1] if records else 1
        scale, number, out = _scores.prepare("score_pages", q, reduce, scale, heads, n, out)
        _op(q, records, KINDS.index(source.kind), source.bits, page_table, seq_lens, source.page_size, segments, scale,
            number, out)  # fmt: skip
        _args.written(out)
        return out
    except Exception as e:
        raise refused(score_pages, e, locals()) from None


@torch.library.register_fake("kvkernels::score_pages")
def _(q: Tensor, records: list[Tensor], kind: int, bits: int, page_table: Tensor, seq_lens: Tensor, page_size: int,
      segments: Tensor | None, scale: float, reduce: int, out: Tensor) -> None:  # fmt: skip
    numbered = {f"records[{i}]": r for i, r in enumerate(records)}
    _args.same_device("score_pages", q=q, **numbered, page_table=page_table, seq_lens=seq_lens, segments=segments,
                      out=out)  # fmt: skip


def reference(
    q: Tensor,
    source: PageSummaries | PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    reduce: str = "max",
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    D = q.shape[-1]
    if isinstance(source, PagedKV):
        kv, size = source, source.page_size

        def best(b: int, queries: Tensor) -> Tensor:
            length = int(seq_lens[b])
            keys = _reference.keys_of(kv, page_table, b, 0, length, dtype, D)
            of_tokens = (queries @ keys.transpose(1, 2)).split(size, 2)
            return torch.stack([page.amax(2) for page in of_tokens], 2) if length else queries[:, :, :0]

        return _scores.reference(q, best, kv.num_kv_heads, page_table.shape[1], reduce, scale, dtype)

    summaries, segments = source, source.segments

    def rows(b: int, queries: Tensor) -> Tensor:
        length, scores = int(seq_lens[b]), []
        if segments is None:
            entries = page_table[b, : -(-length // summaries.page_size)].tolist()
            records = [summaries.records[entry >> 28][entry & 0x0FFFFFFF] for entry in entries]
            alive = [True] * len(records)
        else:
            count = segments.shape[1] - 1
            records = [summaries.records[0][b * count + s] for s in range(count)]
            alive = [bool(segments[b, s] < segments[b, s + 1] <= length) for s in range(count)]
        for record, has_tokens in zip(records, alive):
            if not has_tokens:
                scores.append(torch.full(queries.shape[:2], -math.inf, dtype=dtype))
                continue
            vectors = decode(summaries, record, dtype)
            parts = (queries.clamp(min=0), queries.clamp(max=0)) if summaries.kind == "minmax" else (queries,)
            scores.append(torch.stack([(x * v[:, None]).sum(2) for x, v in zip(parts, vectors)]).sum(0))
        return torch.stack(scores, 2) if scores else queries[:, :, :0]

    n = page_table.shape[1] if segments is None else segments.shape[1] - 1
    return _scores.reference(q, rows, summaries.records[0].shape[1], n, reduce, scale, dtype)


def cases() -> list[dict[str, Any]]:
    """Without a kind: exact scores from the cache."""
    base = {"kind": "minmax", "bits": 16, "Tq": 1, "Hq": 4, "Hkv": 2, "D": 128, "page_size": 16,
            "lens": (70, 1, 0, 129), "formats": ("bf16",), "reduce": "max", "dtype": "float32"}  # fmt: skip
    kinds = [{"kind": kind, "bits": bits} for kind in ("minmax", "mean") for bits in (16, 8)]
    exact = {k: v for k, v in base.items() if k not in ("kind", "bits")}
    segments = {"segments": page_summaries.SEGMENTS, "lens": (70, 1, 0, 129)}
    return [
        *({**base, **kind, **reduction} for kind in kinds for reduction in ({}, *_scores.REDUCTIONS)),
        *({**base, **kinds[i], "D": d} for i, d in ((0, 64), (1, 80), (2, 192), (3, 256), (0, 96), (3, 112))),
        *({**base, **kind, "Hq": 14, "dtype": "bfloat16", "Tq": 2} for kind in kinds),
        {**base, "dtype": "float16", "strided": True},
        {**base, "Hq": 2, "scale": 0.7},
        {**base, "formats": ("bf16", "u2", "u4"), "page_size": 32},
        {**base, "kind": "mean", "page_size": 1, "reduce": "softmax_sum"},
        *({**base, **kind, **segments, "reduce": reduce} for kind, reduce in zip(kinds, _scores.REDUCES)),
        {**base, "lens": (3000, 40), "Hq": 8, "reduce": "softmax_max"},
        {**base, "lens": ()},
        *(
            {**exact, "formats": (f,), "reduce": reduce}
            for f, reduce in zip(("bf16", "u2", "u4", "f16"), _scores.REDUCES)
        ),
        {**exact, "formats": ("bf16", "u2", "kivi2"), "page_size": 32, "transform": True, "Tq": 3},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    gen = torch.Generator().manual_seed(seed)
    source, table, lens = _scores.make_summaries(case, gen) if "kind" in case else _scores.make_cache(case, gen)
    q = _attention.random_queries(case, case["D"], gen)
    return (q, source, table, lens), {k: case[k] for k in ("reduce", "scale") if k in case}


def cost(case: dict[str, Any]) -> tuple[int, int]:
    return _scores.cost(case, tokens=False)
