"""quant_attention: decode attention over pages of any mix of formats."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kvkernels.formats import format, formats
from kvkernels.ops import _args, _attention, _reference
from kvkernels.ops._refusal import refused
from kvkernels.paged_kv import KVTransform, PagedKV
from kvkernels.plan import Plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA_DTYPES = (torch.float16, torch.bfloat16)  # tensor cores multiply 16-bit numbers
FORMATS = tuple(f.name for f in formats())

_op = torch.ops.kvkernels.quant_attention.default
_plain_op = torch.ops.kvkernels.quant_attention.plain  # without options


@overload
def quant_attention(
    q: Tensor,
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    head_windows: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor] | None = None,
    head_map: Sequence[int] | None = None,
    split_tokens: int | None = None,
    plan: Plan | None = None,
    return_lse: Literal[False] = False,
    out: Tensor | None = None,
) -> Tensor: ...


@overload
def quant_attention(
    q: Tensor,
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    head_windows: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor] | None = None,
    head_map: Sequence[int] | None = None,
    split_tokens: int | None = None,
    plan: Plan | None = None,
    return_lse: Literal[True],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def quant_attention(
    q: Tensor,
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    head_windows: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor] | None = None,
    head_map: Sequence[int] | None = None,
    split_tokens: int | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v for the last tokens of B sequences, directly on their packed pages.

    q             [B, Hq, D], or [B, Tq, Hq, D] with Tq 1 to 16: the last Tq tokens of each sequence, causal (query i
                  sees keys j <= L - Tq + i). float32 (CPU only), float16 or bfloat16; after RoPE. Query head h reads KV
                  head h // (Hq / Hkv), unless head_map says otherwise.
                  On CUDA bfloat16 pages need bfloat16 q: their numbers need not fit into float16
    kv            up to 8 pools; D 64, 128, 256 if one is packed, else 64, 80, 96, 112, 128, 192, 256
    page_table    int32 [B, max_pages], entries kv.entry(pool, page) = pool << 28 | page; not read past seq_lens
    seq_lens      int32 [B], tokens in the cache, the queries' own included
    scale         None: 1 / sqrt(D)
    window        (left, right): query at position p sees keys p - left ... p. left -1: all; right must be -1 or 0
    softcap       c > 0: scores become c * tanh(score / c)
    sinks         float32 [Hq]: one more logit per head that joins the softmax denominator and lse, but has no value
    alibi_slopes  float32 [Hq] or [B, Hq]: adds -slope * (distance in tokens) to the scores, after the softcap
    tree_mask     int32 [B, Tq]: the queries are a tree of drafts, not a chain. Bit j of entry i says whether query i
                  sees token L - Tq + j: its ancestors, all before it, and itself (bit i must be set). Its position, for
                  windows and ALiBi, is L - Tq + its depth; all tokens before L - Tq are seen
    head_windows  int32 [Hkv, 2] (sink, window): queries of the KV head at position p see tokens 0 ... sink - 1 and
                  p - window ... p; window -1: all. Not together with window
    extra         (k, v, bias): one more token per sequence and KV head, which stands for tokens that were dropped: its
                  score is scale * q.k, after the softcap, plus bias (ln of their number). k, v [B or 1, Hkv, D] in q's
                  dtype, bias float32 [B or 1, Hkv]; bias -inf: no such token, whatever k and v hold
    head_map      the KV head of each query head, Hq numbers (at most 256): groups of any sizes, also empty
    split_tokens  None: chosen for speed. A multiple of 16: partial results cover intervals of so many tokens, and the
                  result is bit-identical for any number of threads and any company in the batch
    plan          None: every sequence by itself. Of `plan_prefix`, with num_queries = Tq: tokens that sequences share
                  are read once for all of them. Not together with window, head_windows or split_tokens
    return_lse    also return lse float32 [B, Hq] or [B, Tq, Hq]: natural log of the softmax denominator
    out           where to write; q's shape and dtype, contiguous in the last dim

    Returns out, or (out, lse). A query without visible keys (seq_lens 0) gives out 0, lse -inf, unless it has a sink or
    an extra token. ValueError: dtypes, shapes, devices, formats or page sizes that do not fit; seq_lens, page ids, bits
    of tree_mask or a plan that are wrong (seen on CPU, checked there on every call); inputs that require grad (there is
    no backward). Values in unread pages and in tokens past seq_lens do not matter, NaN included.

    Source: Dao 2023, Flash-Decoding (split over tokens); Sanovar et al. 2024, arXiv:2405.10480 (LeanAttention: equal
    shares of all tokens); Kwon et al. 2023, arXiv:2309.06180 (pages); rotated keys and values as in RotateKV,
    arXiv:2501.16383; sinks as in gpt-oss; softcap as in Gemma 2, arXiv:2408.00118; head_windows as in StreamingLLM,
    arXiv:2309.17453, and DuoAttention, arXiv:2410.10819; extra as the compensation token of RazorAttention,
    arXiv:2407.15891.
    """
    try:
        pools, codes = _args.all_pools("quant_attention", kv)
        transform = None if kv.transform is None else _args.basis(kv.transform)
        if torch.is_grad_enabled() and (
            q.requires_grad
            or sinks is not None
            or alibi_slopes is not None
            or extra is not None
            or (out is not None and out.requires_grad)
        ):
            _args.refuse_grad("quant_attention", q=q, sinks=sinks, alibi_slopes=alibi_slopes,
                              **_args.parts(extra, None), out=out)  # fmt: skip
        given, lse = out, None
        if out is None:
            out = torch.empty_like(q)
        if scale is None:
            scale = q.shape[-1] ** -0.5
        if (
            window == (-1, -1) and softcap == 0.0 and sinks is None and alibi_slopes is None and tree_mask is None
            and head_windows is None and extra is None and head_map is None and split_tokens is None and plan is None
            and not return_lse
        ):  # fmt: skip
            _plain_op(q, pools, codes, kv.page_size, page_table, seq_lens, transform, scale, out)
        else:
            left, right = window
            if left < -1 or right not in (-1, 0):
                _args.bad_window("quant_attention", left, right)
            if return_lse:
                lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
            if split_tokens is None:
                split_tokens = 0
            elif split_tokens == 0:
                _args.no_split("quant_attention")
            _op(q, pools, codes, kv.page_size, page_table, seq_lens, transform, scale, left, softcap, sinks,
                alibi_slopes, split_tokens, tree_mask, head_windows, extra, head_map, plan, out, lse)  # fmt: skip
        if given is not None:
            _args.written(given)
        return out if lse is None else (out, lse)
    except Exception as e:
        raise refused(quant_attention, e, locals()) from None


@torch.library.register_fake("kvkernels::quant_attention")
def _(q: Tensor, pools: list[Tensor], formats: list[int], page_size: int, page_table: Tensor, seq_lens: Tensor,
      transform: list[Tensor] | None, scale: float, window_left: int, softcap: float, sinks: Tensor | None,
      alibi_slopes: Tensor | None, split_tokens: int, tree_mask: Tensor | None, head_windows: Tensor | None,
      extra: list[Tensor] | None, head_map: list[int] | None, plan: list[Tensor] | None, out: Tensor,
      lse: Tensor | None) -> None:  # fmt: skip
    _args.same_device("quant_attention", q=q, **_parts(pools, transform), page_table=page_table, seq_lens=seq_lens,
                      sinks=sinks, alibi_slopes=alibi_slopes, tree_mask=tree_mask, head_windows=head_windows,
                      **_args.parts(extra, plan), out=out, lse=lse)  # fmt: skip


@torch.library.register_fake("kvkernels::quant_attention.plain")
def _(q: Tensor, pools: list[Tensor], formats: list[int], page_size: int, page_table: Tensor, seq_lens: Tensor,
      transform: list[Tensor] | None, scale: float, out: Tensor) -> None:  # fmt: skip
    _args.same_device("quant_attention", q=q, **_parts(pools, transform), page_table=page_table, seq_lens=seq_lens,
                      out=out)  # fmt: skip


def _parts(pools: list[Tensor], transform: list[Tensor] | None) -> dict[str, Tensor]:
    numbered = {f"pool tensor {i}": pool for i, pool in enumerate(pools)}
    return numbered | dict(zip(KVTransform._fields, transform or ()))


def reference(
    q: Tensor,
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """out, or out and lse, in `dtype`. Every length and page id is checked."""
    D = q.shape[-1]

    def read(entry: int, name: str) -> tuple[Tensor, Tensor]:
        return _reference.read_page(kv, *_reference.locate(kv, entry, name), D, dtype)

    heads = kv.num_kv_heads
    rows = _attention.rows_of_pages(page_table, kv.page_size, (heads, D), (heads, D), read)
    return _attention.reference(q, rows, (heads, heads), D, seq_lens, **options, dtype=dtype)


def cases() -> list[dict[str, Any]]:
    """Every format alone, pairs, and formats mixed in one sequence; every option alone, and all together."""
    base = {"Tq": 1, "Hq": 4, "Hkv": 2, "D": 128, "page_size": 32, "lens": (70, 1, 0, 129), "dtype": "float32"}
    packed = [f.name for f in formats() if f.packed]
    mixed = ("bf16", "u4", "m31/t1")
    own: list[dict[str, Any]] = [
        {"Tq": 3, "window": 50, "softcap": 8.0, "sinks": True, "alibi": 1, "split_tokens": 64, "transform": True},
        {"dtype": "float16"},
        {"dtype": "bfloat16", "Tq": 4},
        {"strided": True, "dtype": "bfloat16"},
        {"Hq": 3, "Hkv": 1},
        {"Hq": 7, "Hkv": 7},
        {"Hq": 14, "Hkv": 2, "Tq": 2},
        {"Hq": 32, "Hkv": 1},
        {"lens": ()},
        {**_attention.TOGETHER, "transform": True},
    ]
    return [
        {**base, "formats": mixed, "transform": True, "return_lse": False},
        *(
            {**base, "formats": (name,), "D": d, "transform": d == 128}
            for name in packed
            for d in _reference.head_dims(name)
        ),
        *({**base, "formats": (name,), "D": d} for name in ("bf16", "f16") for d in (64, 80, 96, 112, 128, 192, 256)),
        *(
            {**base, "formats": (name,), "transform": True}
            for name in ("u3/u2", "bf16/u2", "u4/f16", "kivi2/u2", "u2/kivi2", "m31/t1.e5m3", "m42/bf16")
        ),
        *({**base, "formats": (name,), "page_size": 16} for name in ("u2", "kivi2", "f16 NHD", "bf16/f16 HND")),
        *({**base, "formats": (name,), "page_size": ps} for name in ("bf16", "f16 NHD") for ps in (1, 5)),
        *({**base, "formats": ("u2",), "dtype": t, "transform": True} for t in ("float16", "bfloat16")),
        {
            **base,
            "formats": ("bf16 NHD", "u8", "m31/u3", "u2", "kivi2", "t1/u4", "f16", "m42/b1"),
            "transform": True,
            "lens": (517, 300),
        },
        *(
            {**base, "formats": fmts, **option}
            for option in (*_attention.OPTIONS, *own)
            for fmts in (("u2",), ("bf16",), mixed)
        ),
        {**base, "formats": ("u2",), "Hq": 8, "lens": (2100, 900), "page_size": 64, "transform": True},
        {**base, "formats": ("bf16",), "Hq": 8, "lens": (2100, 900), "page_size": 64},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pages outside of windows are no pages at all."""
    gen = torch.Generator().manual_seed(seed)
    heads, D = case["Hkv"], case["D"]
    kv, table = _reference.random_cache(case, gen, lambda length: _attention.seen_pages(case, length))
    q = _attention.random_queries(case, D, gen)
    lens = torch.tensor(case["lens"], dtype=torch.int32)
    return (q, kv, table, lens), _attention.random_options(case, heads, D, D, gen)


def cost(case: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the pages that a query looks at, and of q and out; flops of q k^T and p v."""
    page_size, D, Tq, names = case["page_size"], case["D"], case["Tq"], case["formats"]
    sizes = [format(name.partition(" ")[0]).data_bytes(page_size, D) for name in names]
    moved = flops = 0
    for b, length in enumerate(case["lens"]):
        for i, tokens in _attention.seen_pages(case, length).items():
            moved += sizes[(b + i) % len(names)] * tokens // page_size * case["Hkv"]
            flops += 4 * tokens * Tq * case["Hq"] * D
    vectors = 2 * len(case["lens"]) * Tq * case["Hq"] * D
    return moved + vectors * getattr(torch, case["dtype"]).itemsize, flops
