"""What score_pages and score_tokens share."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvkernels.formats import format
from kvkernels.ops import _args, _reference, page_summaries
from kvkernels.paged_kv import PAGE_BITS, PagedKV
from kvkernels.summaries import PageSummaries, record_bytes

REDUCES = ("max", "sum", "softmax_max", "softmax_sum")  # Reduce

_score_tokens = torch.ops.kvkernels.score_tokens.default


def prepare(op: str, q: Tensor, reduce: str, scale: float | None, heads: int, n: int, out: Tensor | None,
            ) -> tuple[float, int, Tensor]:  # fmt: skip
    """Scale and number of the reduction as the ops take them, and where to write n scores of each sequence and head."""
    if reduce not in REDUCES:
        raise ValueError(f"{op}: reduce must be one of {', '.join(REDUCES)}; got {reduce!r}")
    if torch.is_grad_enabled():
        _args.refuse_grad(op, q=q, out=out)
    if out is None:
        out = torch.empty((q.shape[0], heads, n), dtype=torch.float32, device=q.device)
    return q.shape[-1] ** -0.5 if scale is None else scale, REDUCES.index(reduce), out


def of_tokens(op: str, q: Tensor, source: PageSummaries | PagedKV, page_table: Tensor, seq_lens: Tensor, reduce: str,
              scale: float | None, out: Tensor | None) -> Tensor:  # fmt: skip
    """The score of every token, or for score_pages of the best in each page."""
    best = op == "score_pages"
    page_size = source.page_size
    if isinstance(source, PageSummaries):
        if source.channels is None:
            got = f"kind {source.kind}{' without its channels' if source.kind == 'channels' else ''}"
            raise ValueError(
                f"{op}: source must be a PagedKV, PageSummaries of kind channels or of segments; got {got}"
            )
        codes: list[int] = []
        tensors, bits, channels = list(source.records), source.bits, source.channels
        centre, balance, order = _args.NO_TRANSFORM
    else:
        tensors, codes = _args.all_pools(op, source)
        bits, channels = 16, None
        centre, balance, order = _args.NO_TRANSFORM if source.transform is None else source.transform
    width = page_table.shape[-1] * (1 if best else page_size)
    heads = tensors[0].shape[1] if tensors else 1
    scale, number, out = prepare(op, q, reduce, scale, heads, width, out)
    _score_tokens(q, tensors, codes, page_size, centre, balance, order, channels, bits, page_table, seq_lens, scale,
                  number, best, out)  # fmt: skip
    _args.written(out)
    return out


def reference(q: Tensor, rows: Callable[[int, Tensor], Tensor], heads: int, n: int, reduce: str, scale: float | None,
              dtype: torch.dtype) -> Tensor:  # fmt: skip
    """rows(b, queries [Hkv, rows, D]) -> scores [Hkv, rows, items] of sequence b before the scale; -inf: has none."""
    queries = (q if q.dim() == 4 else q.unsqueeze(1)).to(dtype)
    B, _, Hq, D = queries.shape
    scale = D**-0.5 if scale is None else scale
    out = torch.full((B, heads, n), -math.inf, dtype=dtype)
    for b in range(B):
        grouped = queries[b].unflatten(1, (heads, Hq // heads)).permute(1, 0, 2, 3).flatten(1, 2)
        scores = scale * rows(b, grouped)
        if reduce.startswith("softmax"):
            scores = torch.softmax(scores, 2).where(scores > -math.inf, scores)
        out[b, :, : scores.shape[2]] = scores.amax(1) if reduce.endswith("max") else scores.sum(1)
    return out


# ---- cases

REDUCTIONS: list[dict[str, Any]] = [{"reduce": reduce, "Tq": Tq} for Tq, reduce in enumerate(REDUCES[1:], 1)]


def make_cache(case: dict[str, Any], gen: torch.Generator) -> tuple[PagedKV, Tensor, Tensor]:
    kv, table = _reference.random_cache(case, gen, lambda length: range(-(-length // case["page_size"])))
    return kv, table, torch.tensor(case["lens"], dtype=torch.int32)


def make_summaries(case: dict[str, Any], gen: torch.Generator) -> tuple[PageSummaries, Tensor, Tensor]:
    """Of random keys. Records that no sequence has are poisoned."""
    kv, table, lens = make_cache(case, gen)
    channels = page_summaries.random_channels(case["Hkv"], case["D"], case["r"], gen) if "r" in case else None
    segments = torch.tensor(case["segments"], dtype=torch.int32) if "segments" in case else None
    summaries = page_summaries.reference(
        kv, table, lens, case["kind"], bits=case["bits"], channels=channels, segments=segments
    )
    used = {int(entry) for b, length in enumerate(case["lens"]) for entry in table[b, : -(-length // kv.page_size)]}
    for pool, records in enumerate(summaries.records):
        for row in range(len(records)):
            if segments is None and pool << PAGE_BITS | row not in used:
                records[row] = _reference.POISON
    return summaries, table, lens


def cost(case: dict[str, Any], tokens: bool) -> tuple[int, int]:
    """Bytes of what is scored, of q and of the scores; flops of the dot products."""
    D, page_size, names, kind = case["D"], case["page_size"], case["formats"], case.get("kind")
    rows = case["Tq"] * case["Hq"]
    moved = flops = 0
    for b, length in enumerate(case["lens"]):
        pages = -(-length // page_size)
        runs = len(case["segments"][b]) - 1 if "segments" in case else pages
        items = length if tokens or kind is None else runs
        if kind is None:
            codes = [format(name.partition(" ")[0]).v_offset(page_size, D) for name in names]
            moved += sum(codes[(b + i) % len(names)] for i in range(pages)) * case["Hkv"]
            flops += 2 * D * rows * length
        else:
            moved += runs * record_bytes(kind, case["bits"], page_size, D, case.get("r", 0)) * case["Hkv"]
            numbers = {"minmax": 2 * D, "mean": D, "channels": case.get("r", 0) * page_size}[kind]
            flops += 2 * numbers * rows * runs
        moved += 4 * items * case["Hkv"]
    return moved + len(case["lens"]) * rows * D * getattr(torch, case["dtype"]).itemsize, flops
