"""select_tokens: the tokens of the highest scores, with those that always count."""

from typing import Any

import torch
from torch import Tensor

from kvkernels.ops import _args, select_pages
from kvkernels.ops._refusal import refused

DTYPES = (torch.float32,)
FORMATS = ()

_op = torch.ops.kvkernels.select_pages.default


def select_tokens(
    scores: Tensor,
    seq_lens: Tensor,
    k: int,
    *,
    sink_tokens: int = 4,
    recent_tokens: int = 64,
    row_k: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The k tokens of the highest scores, for every sequence and KV head: select_pages with pages of one token.

    scores        float32 [B, Hkv, n] of score_tokens, contiguous in the last dim
    seq_lens      int32 [B], tokens
    k             tokens of a list, at least sink_tokens + recent_tokens
    sink_tokens, recent_tokens   the first and last tokens of a sequence, chosen whatever their scores
    row_k         int32 [B, Hkv]: how many of each row, instead of k; brought into
                  [min(sink_tokens + recent_tokens, k), k]
    out           where to write; int32 [B, Hkv, k] contiguous

    Returns int32 [B, Hkv, k], ascending, -1 behind the last. Ties, NaN and what is refused are as for select_pages.

    Source: Yang et al. 2024, arXiv:2410.05076 (TidalDecode), arXiv:2408.07092 (Double Sparsity); sinks and recent
    tokens, Xiao et al. 2023, arXiv:2309.17453 (StreamingLLM).
    """
    try:
        if torch.is_grad_enabled():
            _args.refuse_grad("select_tokens", scores=scores)
        if out is None:
            out = torch.empty((*scores.shape[:2], max(k, 0)), dtype=torch.int32, device=scores.device)
        _op(scores, seq_lens, k, 1, sink_tokens, recent_tokens, row_k, True, out)
        _args.written(out)
        return out
    except Exception as e:
        raise refused(select_tokens, e, locals()) from None


def reference(
    scores: Tensor,
    seq_lens: Tensor,
    k: int,
    *,
    sink_tokens: int = 4,
    recent_tokens: int = 64,
    row_k: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    return select_pages.reference(scores, seq_lens, k, page_size=1, sink_pages=sink_tokens, recent_pages=recent_tokens,
                                  row_k=row_k)  # fmt: skip


def cases() -> list[dict[str, Any]]:
    base = {"H": 2, "n": 900, "k": 130, "page_size": 1, "lens": (900, 100, 0, 333), "sink": 4, "recent": 64}
    return [base, {**base, "row_k": True, "values": 4}]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, options = select_pages.make(case, seed)
    options["sink_tokens"], options["recent_tokens"] = options.pop("sink_pages"), options.pop("recent_pages")
    del options["page_size"]
    return args, options


cost = select_pages.cost
