"""score_tokens: how much queries want each token."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from kvkernels.formats import formats
from kvkernels.ops import _args, _attention, _reference, _scores, page_summaries, score_pages
from kvkernels.ops._refusal import refused
from kvkernels.paged_kv import PagedKV
from kvkernels.summaries import PageSummaries, decode

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = tuple(f.name for f in formats())


def score_tokens(
    q: Tensor,
    source: PageSummaries | PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    reduce: str = "max",
    scale: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One number per token and KV head: how much the last tokens' queries want it.

    The score of a query row for a token is scale times q.k: in full, from the cache, or over some channels, from a
    label cache. Rows of a KV head (its query heads, of all Tq tokens) are reduced to one score.

    q           [B, Hq, D], or [B, Tq, Hq, D] with Tq 1 to 16; float32, float16 or bfloat16, contiguous in the last dim.
                Any Hq that is a multiple of Hkv: also a probe query [B, Hkv, D]
    source      a PagedKV: exact; PageSummaries of kind channels; or of segments: a token has the score of its segment,
                as score_pages gives it, and -inf outside of all
    page_table  int32 [B, max_pages]; not read past seq_lens
    seq_lens    int32 [B], tokens
    reduce      "max" or "sum" of the rows' scores; "softmax_max" or "softmax_sum" of their softmax over all tokens of
                the sequence (of segments: over those)
    scale       None: 1 / sqrt(D)
    out         where to write; float32 [B, Hkv, max_pages * page_size] contiguous

    Returns float32 [B, Hkv, max_pages * page_size]; -inf past seq_lens. A NaN in q or in a key gives that token a score
    of NaN, and with softmax all tokens of that row. There is no mask: what a query may see is the business of
    attention. ValueError: dtypes, shapes or devices that do not fit; summaries of pages; seq_lens or page ids that are
    wrong (seen on CPU); q that requires grad.

    Source: Yang et al. 2024, arXiv:2408.07092 (Double Sparsity: label cache); Yang et al. 2024, arXiv:2410.05076
    (TidalDecode: exact scores); Zhu et al. 2025, arXiv:2504.00970 (SentenceKV: segments).
    """
    try:
        if isinstance(source, PageSummaries) and source.segments is not None:
            scores = score_pages.score_pages(q, source, page_table, seq_lens, reduce=reduce, scale=scale)
            spread = spread_over_tokens(scores, source.segments, page_table.shape[1] * source.page_size)
            if out is None:
                return spread
            if out.shape != spread.shape or out.dtype != spread.dtype:
                raise ValueError(
                    f"score_tokens: out must be float32 {list(spread.shape)}, [B, Hkv, max_pages * page_size]; "
                    f"got {out.dtype} {list(out.shape)}"
                )
            return out.copy_(spread)
        return _scores.of_tokens("score_tokens", q, source, page_table, seq_lens, reduce, scale, out)
    except Exception as e:
        raise refused(score_tokens, e, locals(), "score_pages") from None


def spread_over_tokens(scores: Tensor, segments: Tensor, n: int) -> Tensor:
    """Scores [B, Hkv, num_segments] of segments for n tokens: -inf outside of all."""
    token = torch.arange(n, dtype=segments.dtype, device=segments.device).expand(segments.shape[0], n).contiguous()
    last = segments.shape[1] - 1
    segment = torch.searchsorted(segments, token, right=True) - 1  # of empty ones the last, which is not empty
    segment = torch.where(segment < 0, last, segment)
    padded = torch.nn.functional.pad(scores, (0, 1), value=-math.inf)
    return padded.gather(2, segment[:, None].expand(-1, scores.shape[1], -1))


@torch.library.register_fake("kvkernels::score_tokens")
def _(q: Tensor, tensors: list[Tensor], formats: list[int], page_size: int, centre: Tensor | None,
      balance: Tensor | None, order: Tensor | None, channels: Tensor | None, bits: int, page_table: Tensor,
      seq_lens: Tensor, scale: float, reduce: int, best_of_page: bool, out: Tensor) -> None:  # fmt: skip
    op = "score_pages" if best_of_page else "score_tokens"
    numbered = {f"tensors[{i}]": t for i, t in enumerate(tensors)}
    _args.same_device(op, q=q, **numbered, centre=centre, balance=balance, order=order, channels=channels,
                      page_table=page_table, seq_lens=seq_lens, out=out)  # fmt: skip


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
    n = page_table.shape[1] * source.page_size
    if isinstance(source, PageSummaries) and source.segments is not None:
        scores = score_pages.reference(q, source, page_table, seq_lens, reduce=reduce, scale=scale, dtype=dtype)
        out = torch.full((*scores.shape[:2], n), -math.inf, dtype=dtype)
        for b, offsets in enumerate(source.segments.tolist()):
            for s, (begin, end) in enumerate(itertools.pairwise(offsets)):
                out[b, :, begin:end] = scores[b, :, s : s + 1]
        return out

    def rows(b: int, queries: Tensor) -> Tensor:
        length = int(seq_lens[b])
        if isinstance(source, PagedKV):
            keys = _reference.keys_of(source, page_table, b, 0, length, dtype, q.shape[-1])
            return queries @ keys.transpose(1, 2)
        assert source.channels is not None
        entries = page_table[b, : -(-length // source.page_size)].tolist()
        labels = [decode(source, source.records[e >> 28][e & 0x0FFFFFFF], dtype)[0] for e in entries]
        if not labels:
            return queries[:, :, :0]
        chosen = queries.gather(2, source.channels.long()[:, None].expand(-1, queries.shape[1], -1))
        return chosen @ torch.cat(labels, 1)[:, :length].transpose(1, 2)

    heads = source.num_kv_heads if isinstance(source, PagedKV) else source.records[0].shape[1]
    return _scores.reference(q, rows, heads, n, reduce, scale, dtype)


def cases() -> list[dict[str, Any]]:
    """Without a kind: exact scores from the cache."""
    base = {"Tq": 1, "Hq": 4, "Hkv": 2, "D": 128, "page_size": 16, "lens": (70, 1, 0, 129), "formats": ("bf16",),
            "reduce": "max", "dtype": "float32"}  # fmt: skip
    labels = [{"kind": "channels", "bits": bits, "r": r} for bits, r in ((16, 8), (8, 8), (4, 8))]
    reductions = ({}, *_scores.REDUCTIONS)
    return [
        *({**base, "formats": (f,), **reduction} for f in ("bf16", "u2") for reduction in reductions),
        *({**base, "formats": (f.name,), "transform": True} for f in formats()),
        {**base, "formats": ("bf16 NHD", "u2", "kivi2"), "page_size": 32, "transform": True, "Tq": 3},
        *({**base, "formats": (f,), "D": d} for f, d in (("f16", 80), ("bf16", 192), ("u2", 64), ("u2", 256))),
        {**base, "page_size": 5, "Hq": 14, "dtype": "bfloat16"},
        {**base, "lens": (3000, 40), "page_size": 64, "Hq": 8, "formats": ("u2",), "reduce": "softmax_sum"},
        *({**base, **kind, **reduction} for kind in labels for reduction in reductions),
        *({**base, **kind, "r": r, "page_size": 48, "dtype": "bfloat16"} for kind, r in zip(labels, (1, 5, 16))),
        {**base, **labels[0], "page_size": 5, "formats": ("bf16", "f16"), "Hq": 2, "strided": True},
        {**base, **labels[2], "lens": (3000, 40), "page_size": 64, "Hq": 14, "reduce": "softmax_max"},
        {**base, "kind": "mean", "bits": 8, "segments": page_summaries.SEGMENTS, "reduce": "softmax_sum"},
        {**base, "lens": ()},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    gen = torch.Generator().manual_seed(seed)
    source, table, lens = _scores.make_summaries(case, gen) if "kind" in case else _scores.make_cache(case, gen)
    q = _attention.random_queries(case, case["D"], gen)
    return (q, source, table, lens), {k: case[k] for k in ("reduce", "scale") if k in case}


def cost(case: dict[str, Any]) -> tuple[int, int]:
    return _scores.cost(case, tokens=True)
