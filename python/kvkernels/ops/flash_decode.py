"""flash_decode: decode attention on paged 16-bit caches as other engines hold them."""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kvkernels.ops import _args, _attention, _reference
from kvkernels.ops._refusal import refused
from kvkernels.plan import Plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA_DTYPES = (torch.float16, torch.bfloat16)  # tensor cores multiply 16-bit numbers
FORMATS = ("bf16", "f16")
MLA = (576, 512)  # channels of a key, of which these are the value

_op = torch.ops.kvkernels.flash_decode.default
_plain_op = torch.ops.kvkernels.flash_decode.plain  # without options


@overload
def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
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
def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
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


def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
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
    """softmax(scale * q k^T) v for the last tokens of B sequences, on the caches of vLLM, SGLang or flash-attn.

    q             [B, Hq, D], or [B, Tq, Hq, D] with Tq 1 to 16: the last Tq tokens of each sequence, causal (query i
                  sees keys j <= L - Tq + i). float32 (CPU only), float16 or bfloat16; Hq a multiple of Hk and of Hv;
                  after RoPE. Query head h reads key head h // (Hq / Hk) and value head h // (Hq / Hv), unless head_map
                  says otherwise. On CUDA bfloat16 caches need bfloat16 q: their numbers need not fit into float16
    k_cache       [num_blocks, page_size, Hk, D] bfloat16 or float16, any strides with a contiguous last dim: of caches
                  [num_blocks, Hk, page_size, D] pass cache.transpose(1, 2). Any page_size; D 64, 80, 96, 112, 128, 192,
                  256, or 576 (MLA)
    v_cache       [num_blocks, page_size, Hv, Dv] as k_cache; Dv = D, or 512 where D is 576. May lie in k_cache: for MLA
                  it is k_cache[..., :512], and is then read once
    block_table   int32 [B, max_blocks], numbers of blocks; not read past seq_lens
    seq_lens      int32 [B], tokens in the cache, the queries' own included
    scale         None: 1 / sqrt(D). For MLA give that of the head dim before absorption
    window        (left, right): query at position p sees keys p - left ... p. left -1: all; right must be -1 or 0
    softcap       c > 0: scores become c * tanh(score / c)
    sinks         float32 [Hq]: one more logit per head that joins the softmax denominator and lse, but has no value
    alibi_slopes  float32 [Hq] or [B, Hq]: adds -slope * (distance in tokens) to the scores, after the softcap
    tree_mask     int32 [B, Tq]: the queries are a tree of drafts, not a chain. Bit j of entry i says whether query i
                  sees token L - Tq + j: its ancestors, all before it, and itself (bit i must be set). Its position, for
                  windows and ALiBi, is L - Tq + its depth; all tokens before L - Tq are seen
    head_windows  int32 [Hkv, 2] (sink, window): queries of the KV head at position p see tokens 0 ... sink - 1 and
                  p - window ... p; window -1: all. Needs Hk = Hv. Not together with window
    extra         (k, v, bias): one more token per sequence and KV head, which stands for tokens that were dropped: its
                  score is scale * q.k, after the softcap, plus bias (ln of their number). k [B or 1, Hkv, D] and
                  v [B or 1, Hkv, Dv] in q's dtype, bias float32 [B or 1, Hkv]; bias -inf: no such token, whatever k and
                  v hold. Needs Hk = Hv
    head_map      the KV head of each query head, Hq numbers (at most 256): groups of any sizes, also empty. Needs
                  Hk = Hv
    split_tokens  None: chosen for speed. A multiple of 16: partial results cover intervals of so many tokens, and the
                  result is bit-identical for any number of threads and any company in the batch
    plan          None: every sequence by itself. Of `plan_prefix`, with num_queries = Tq: tokens that sequences share
                  are read once for all of them. Not together with window, head_windows or split_tokens
    return_lse    also return lse float32 [B, Hq] or [B, Tq, Hq]: natural log of the softmax denominator
    out           where to write; q's shape but for the last dim, Dv, and q's dtype; contiguous in the last dim

    Returns out [B, Hq, Dv] or [B, Tq, Hq, Dv], or (out, lse). A query without visible keys (seq_lens 0) gives out 0,
    lse -inf, unless it has a sink or an extra token. ValueError: dtypes, shapes or devices that do not fit; seq_lens,
    block numbers, bits of tree_mask or a plan that are wrong (seen on CPU, checked there on every call); inputs that
    require grad (there is no backward). Values in unread blocks and in tokens past seq_lens do not matter, NaN
    included. NaN in q, in K of a token that is seen or in a sink makes the row NaN, NaN in V the channel (with Tq > 1
    also of queries that do not see the token). A sink of +inf gives out 0, lse +inf.

    Source: Dao 2023, Flash-Decoding (split over tokens); Sanovar et al. 2024, arXiv:2405.10480 (LeanAttention: equal
    shares of all tokens); Kwon et al. 2023, arXiv:2309.06180 (pages); DeepSeek-AI 2024, arXiv:2405.04434 (MLA);
    head_windows as in StreamingLLM, arXiv:2309.17453, and DuoAttention, arXiv:2410.10819; extra as the compensation
    token of RazorAttention, arXiv:2407.15891; sinks as in gpt-oss; softcap as in Gemma 2, arXiv:2408.00118.
    """
    try:
        if torch.is_grad_enabled() and (
            q.requires_grad or k_cache.requires_grad or v_cache.requires_grad
            or sinks is not None or alibi_slopes is not None or extra is not None
            or (out is not None and out.requires_grad)
        ):  # fmt: skip
            _args.refuse_grad("flash_decode", q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks,
                              alibi_slopes=alibi_slopes, **_args.parts(extra, None), out=out)  # fmt: skip
        given, lse = out, None
        if out is None:
            D, Dv = MLA
            wide = q.shape[-1] == D
            out = torch.empty((*q.shape[:-1], Dv), dtype=q.dtype, device=q.device) if wide else torch.empty_like(q)
        if scale is None:
            scale = q.shape[-1] ** -0.5
        if (
            window == (-1, -1) and softcap == 0.0 and sinks is None and alibi_slopes is None and tree_mask is None
            and head_windows is None and extra is None and head_map is None and split_tokens is None and plan is None
            and not return_lse
        ):  # fmt: skip
            _plain_op(q, k_cache, v_cache, block_table, seq_lens, scale, out)
        else:
            left, right = window
            if left < -1 or right not in (-1, 0):
                _args.bad_window("flash_decode", left, right)
            if return_lse:
                lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
            if split_tokens is None:
                split_tokens = 0
            elif split_tokens == 0:
                _args.no_split("flash_decode")
            _op(q, k_cache, v_cache, block_table, seq_lens, scale, left, softcap, sinks, alibi_slopes,
                split_tokens, tree_mask, head_windows, extra, head_map, plan, out, lse)  # fmt: skip
        if given is not None:
            _args.written(given)
        return out if lse is None else (out, lse)
    except Exception as e:
        raise refused(flash_decode, e, locals()) from None


@torch.library.register_fake("kvkernels::flash_decode")
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float,
      window_left: int, softcap: float, sinks: Tensor | None, alibi_slopes: Tensor | None, split_tokens: int,
      tree_mask: Tensor | None, head_windows: Tensor | None,
      extra: list[Tensor] | None, head_map: list[int] | None, plan: list[Tensor] | None, out: Tensor,
      lse: Tensor | None) -> None:  # fmt: skip
    _args.same_device("flash_decode", q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table,
                      seq_lens=seq_lens, sinks=sinks, alibi_slopes=alibi_slopes, tree_mask=tree_mask,
                      head_windows=head_windows, **_args.parts(extra, plan), out=out, lse=lse)  # fmt: skip


@torch.library.register_fake("kvkernels::flash_decode.plain")
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float,
      out: Tensor) -> None:  # fmt: skip
    _args.same_device("flash_decode", q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table,
                      seq_lens=seq_lens, out=out)  # fmt: skip


def reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """out, or out and lse, in `dtype`. Every length and block number is checked."""

    def read(block: int, name: str) -> tuple[Tensor, Tensor]:
        if not 0 <= block < len(k_cache):
            raise ValueError(f"{name} = {block}, but k_cache has {len(k_cache)} blocks")
        return k_cache[block].transpose(0, 1), v_cache[block].transpose(0, 1)

    (page_size, Hk, D), (Hv, Dv) = k_cache.shape[1:], v_cache.shape[2:]
    rows = _attention.rows_of_pages(block_table, page_size, (Hk, D), (Hv, Dv), read, "block_table")
    return _attention.reference(q, rows, (Hk, Hv), Dv, seq_lens, **options, dtype=dtype)


def cases() -> list[dict[str, Any]]:
    """cache: dtypes of K and V, and a layout: NHD, HND, or MLA, where the values lie in the keys."""
    base: dict[str, Any] = {
        "Tq": 1, "Hq": 4, "Hk": 2, "Hv": 2, "D": 128, "page_size": 16, "lens": (70, 1, 0, 129), "dtype": "bfloat16",
        "cache": "bf16 NHD",
    }  # fmt: skip
    mla = {**base, "D": 576, "Hk": 1, "Hv": 1, "Hq": 16, "page_size": 64, "cache": "bf16 MLA"}
    alone: list[dict[str, Any]] = [
        {"cache": "bf16 HND"},
        {"cache": "f16 NHD", "dtype": "float16", "page_size": 5},
        {"cache": "bf16/f16 HND"},
    ]
    return [
        {**base, "return_lse": False},
        base,
        *({**base, "D": d, "cache": cache} for d in (64, 80, 96, 112, 192, 256) for cache in ("bf16 NHD", "f16 HND")),
        *({**base, "page_size": ps, "cache": cache} for ps in (1, 5, 64) for cache in ("bf16 NHD", "bf16 HND")),
        *({**base, **option} for option in alone),
        *({**base, **option} for option in _attention.OPTIONS),
        {**base, **_attention.TOGETHER},
        {**base, **_attention.TOGETHER, "page_size": 1, "cache": "f16 HND", "dtype": "float16"},
        {**base, **_attention.TOGETHER, "page_size": 5, "dtype": "float32", "D": 64},
        {**base, "dtype": "float32", "cache": "bf16/f16 HND"},
        {**base, "strided": True},
        {**base, "Hq": 12, "Hk": 2, "Hv": 3},
        {**base, "Hq": 24, "Hk": 2, "Hv": 3, "Tq": 2, "window": 30, "sinks": True, "alibi": 2, "softcap": 6.0,
         "split_tokens": 32, "cache": "f16 HND", "dtype": "float16"},
        {**base, "Hq": 8, "Hk": 4, "Hv": 2, "Tq": 4, "tree": True},
        {**base, "Hq": 9, "Hk": 3, "Hv": 3, "head_map": (2, 2, 2, 2, 2, 2, 0, 2, 2), "Tq": 3},
        {**base, "Hq": 64, "Hk": 1, "Hv": 1},
        {**base, "Hq": 128, "Hk": 2, "Hv": 2, "Tq": 2, "lens": (33, 0)},
        {**base, "Hq": 7, "Hk": 7, "Hv": 7, "D": 80},
        {**base, "Hq": 8, "lens": (2100, 900), "page_size": 64},
        {**base, "lens": ()},
        mla,
        {**mla, "cache": "f16 NHD", "dtype": "float16", "page_size": 16},
        {**mla, "Hq": 128, "lens": (200, 0), "scale": 0.1},
        {**mla, "Hq": 16, "Tq": 3, "tree": True, "extra": "own", "softcap": 20.0, "sinks": True, "split_tokens": 64,
         "dtype": "float32"},
        {**mla, "Hq": 12, "Hk": 2, "Hv": 2, "page_size": 1, "cache": "bf16 HND", "lens": (40, 3),
         "head_windows": ((2, 9), (0, -1))},
    ]  # fmt: skip


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What must not be read is poisoned: blocks of nobody, tokens past the end, blocks outside of windows; table
    entries that must not be read are no blocks at all."""
    gen = torch.Generator().manual_seed(seed)
    D, page_size, lens = case["D"], case["page_size"], case["lens"]
    Dv = MLA[1] if MLA[0] == D else D
    dtypes, _, layout = case["cache"].partition(" ")
    k_dtype, v_dtype = (_reference.cache_dtype(t) for t in (dtypes.split("/") * 2)[:2])
    blocks = [-(-n // page_size) for n in lens]
    count = sum(blocks) + 2

    def cache(heads: int, width: int, dtype: torch.dtype) -> Tensor:
        if layout == "HND":
            return _reference.randn((count, heads, page_size, width), gen, dtype).transpose(1, 2)
        return _reference.randn((count, page_size, heads, width), gen, dtype)

    k_cache = cache(case["Hk"], D, k_dtype)
    v_cache = k_cache[..., :Dv] if layout == "MLA" else cache(case["Hv"], Dv, v_dtype)
    free = torch.randperm(count, generator=gen).tolist()
    table = torch.full((len(lens), max(blocks, default=0) + 2), _attention.NO_PAGE, dtype=torch.int32)
    for b, length in enumerate(lens):
        for i in _attention.seen_pages(case, length):
            table[b, i] = block = free.pop()
            for part in (k_cache, v_cache):
                part[block, max(0, length - i * page_size) :] = float("nan")
    for part in (k_cache, v_cache):
        part[free] = float("nan")
    q = _attention.random_queries(case, D, gen)
    groups = math.lcm(case["Hk"], case["Hv"])
    options = _attention.random_options(case, groups, D, Dv, gen)
    return (q, k_cache, v_cache, table, torch.tensor(lens, dtype=torch.int32)), options


def cost(case: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the rows that a query looks at, and of q and out; flops of q k^T and p v."""
    D = case["D"]
    Dv = MLA[1] if MLA[0] == D else D
    rows = case["Hk"] * D + (0 if "MLA" in case["cache"] else case["Hv"] * Dv)
    tokens = sum(sum(_attention.seen_pages(case, length).values()) for length in case["lens"])
    queries = len(case["lens"]) * case["Tq"] * case["Hq"]
    moved = 2 * tokens * rows + queries * (D + Dv) * getattr(torch, case["dtype"]).itemsize
    return moved, 2 * tokens * case["Tq"] * case["Hq"] * (D + Dv)
