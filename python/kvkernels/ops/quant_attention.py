"""quant_attention: decode attention over pages of any mix of formats."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kvkernels.formats import format, formats
from kvkernels.ops import _args, _reference
from kvkernels.paged_kv import PAGE_BITS, PagedKV

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA_DTYPES = (torch.float16, torch.bfloat16)  # tensor cores multiply 16-bit numbers
FORMATS = tuple(f.name for f in formats())

_op = torch.ops.kvkernels.quant_attention.default


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
    split_tokens: int | None = None,
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
    split_tokens: int | None = None,
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
    split_tokens: int | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v for the last tokens of B sequences, directly on their packed pages.

    q             [B, Hq, D], or [B, Tq, Hq, D] with Tq 1 to 16: the last Tq tokens of each sequence, causal (query i
                  sees keys j <= L - Tq + i). float32 (CPU only), float16 or bfloat16; Hq a multiple of Hkv; after RoPE.
                  On CUDA bfloat16 pages need bfloat16 q: their numbers need not fit into float16
    kv            up to 8 pools; D 64, 128, 256 if one is packed, else 64, 80, 96, 112, 128, 192, 256
    page_table    int32 [B, max_pages], entries kv.entry(pool, page) = pool << 28 | page; not read past seq_lens
    seq_lens      int32 [B], tokens in the cache, the queries' own included
    scale         None: 1 / sqrt(D)
    window        (left, right): query at position p sees keys p - left ... p. left -1: all; right must be -1 or 0
    softcap       c > 0: scores become c * tanh(score / c)
    sinks         float32 [Hq]: one more logit per head that joins the softmax denominator and lse, but has no value
    alibi_slopes  float32 [Hq] or [B, Hq]: adds -slope * (distance in tokens) to the scores, after the softcap
    split_tokens  None: chosen for speed. A multiple of 16: partial results cover intervals of so many tokens, and the
                  result is bit-identical for any number of threads and any company in the batch
    return_lse    also return lse float32 [B, Hq] or [B, Tq, Hq]: natural log of the softmax denominator
    out           where to write; q's shape and dtype, contiguous in the last dim

    Returns out, or (out, lse). A query without visible keys (seq_lens 0) gives out 0, lse -inf (with sinks: the sink).
    ValueError: dtypes, shapes, devices, formats or page sizes that do not fit, seq_lens or page ids out of range (seen
    on CPU, checked there on every call), inputs that require grad (there is no backward). Values in unread pages and in
    tokens past seq_lens do not matter, NaN included.

    Source: Dao 2023, Flash-Decoding (split over tokens); Kwon et al. 2023, arXiv:2309.06180 (pages); rotated keys and
    values as in RotateKV, arXiv:2501.16383; sinks as in gpt-oss; softcap as in Gemma 2, arXiv:2408.00118.
    """
    if not isinstance(q, Tensor):
        _args.no_tensor("quant_attention", "q", q)
    if not isinstance(kv, PagedKV):
        _args.no_tensor("quant_attention", "kv", kv, "a PagedKV")
    pools, codes = _args.all_pools("quant_attention", kv)
    if torch.is_grad_enabled() and (
        q.requires_grad or sinks is not None or alibi_slopes is not None or out is not None
    ):
        _args.refuse_grad("quant_attention", q=q, sinks=sinks, alibi_slopes=alibi_slopes, out=out)
    left, right = window
    if right > 0:
        raise ValueError(f"quant_attention: window = ({left}, {right}): attention is causal, so right must be -1 or 0")
    if out is None:
        out = torch.empty_like(q)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) if return_lse else None
    centre, balance = (None, None) if kv.transform is None else kv.transform
    if scale is None:
        scale = q.shape[-1] ** -0.5
    try:
        _op(q, pools, codes, kv.page_size, page_table, seq_lens, centre, balance, scale, left, softcap, sinks,
            alibi_slopes, 0 if split_tokens is None else split_tokens, out, lse)  # fmt: skip
    except RuntimeError as e:
        raise _args.refused("quant_attention", e) from None
    return out if lse is None else (out, lse)


@torch.library.register_fake("kvkernels::quant_attention")
def _(q: Tensor, pools: list[Tensor], formats: list[int], page_size: int, page_table: Tensor, seq_lens: Tensor,
      centre: Tensor | None, balance: Tensor | None, scale: float, window_left: int, softcap: float,
      sinks: Tensor | None, alibi_slopes: Tensor | None, split_tokens: int, out: Tensor,
      lse: Tensor | None) -> None:  # fmt: skip
    numbered = {f"pool tensor {i}": pool for i, pool in enumerate(pools)}
    _args.same_device("quant_attention", q=q, **numbered, page_table=page_table, seq_lens=seq_lens, centre=centre,
                      balance=balance, sinks=sinks, alibi_slopes=alibi_slopes, out=out, lse=lse)  # fmt: skip


def reference(
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
    split_tokens: int | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """out, or out and lse, in `dtype`. Every length and page id is checked; split_tokens changes nothing."""
    queries = q.to(dtype) if q.dim() == 4 else q.to(dtype).unsqueeze(1)
    B, Tq, Hq, D = queries.shape
    group = Hq // kv.num_kv_heads
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros(B, Tq, Hq, D, dtype=dtype)
    lse = torch.full((B, Tq, Hq), -math.inf, dtype=dtype)
    for b, length in enumerate(seq_lens.tolist()):
        k, v, first = _visible(kv, page_table, b, length, Tq, window[0], D, dtype)
        for i in range(Tq):
            position = length - Tq + i
            begin = max(0, position - window[0]) if window[0] >= 0 else 0
            end = max(begin, position + 1)  # a query before the first token sees nothing
            for h in range(Hq):
                keys, values = (x[begin - first : end - first, h // group] for x in (k, v))
                scores = scale * (keys @ queries[b, i, h])
                if softcap > 0:
                    scores = softcap * torch.tanh(scores / softcap)
                if alibi_slopes is not None:
                    slope = (alibi_slopes if alibi_slopes.dim() == 1 else alibi_slopes[b])[h].to(dtype)
                    scores = scores - slope * (position - torch.arange(begin, begin + len(scores))).to(dtype)
                if sinks is not None:
                    scores = torch.cat((scores, sinks[h : h + 1].to(dtype)))
                if len(scores) == 0:
                    continue
                lse[b, i, h] = torch.logsumexp(scores, 0)
                out[b, i, h] = torch.softmax(scores, 0)[: len(values)] @ values
    if q.dim() == 3:
        out, lse = out.squeeze(1), lse.squeeze(1)
    return (out, lse) if return_lse else out


def _visible(
    kv: PagedKV, page_table: Tensor, b: int, length: int, Tq: int, left: int, D: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """Keys and values [n, Hkv, D] of the pages that sequence b may look at, and the position of the first."""
    if length < 0:
        raise ValueError(f"seq_lens[{b}] = {length} is negative")
    last = -(-length // kv.page_size)
    if last > page_table.shape[1]:
        raise ValueError(
            f"page_table is too narrow: seq_lens[{b}] = {length} needs {last} pages of {kv.page_size} tokens, "
            f"but page_table.size(1) = {page_table.shape[1]}"
        )
    begin = max(0, length - Tq - left) // kv.page_size if left >= 0 else 0
    pages = [
        _reference.read_page(kv, *_reference.locate(kv, int(page_table[b, i]), f"page_table[{b}, {i}]"), D, dtype)
        for i in range(begin, last)
    ]
    if not pages:
        none = torch.zeros(0, kv.num_kv_heads, D, dtype=dtype)
        return none, none, begin * kv.page_size
    k, v = (torch.cat([page[side] for page in pages], 1).transpose(0, 1) for side in (0, 1))
    return k, v, begin * kv.page_size


def cases() -> list[dict[str, Any]]:
    """Every format alone, pairs, and formats mixed in one sequence; every option alone, and all together."""
    base = {"Tq": 1, "Hq": 4, "Hkv": 2, "D": 128, "page_size": 32, "lens": (70, 1, 0, 129), "dtype": "float32"}
    packed = [f.name for f in formats() if f.packed]
    mixed = ("bf16", "u2", "u4")
    options: list[dict[str, Any]] = [
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
        {"split_tokens": 48, "transform": True, "Tq": 2},
        {"Tq": 3, "window": 50, "softcap": 8.0, "sinks": True, "alibi": 1, "split_tokens": 64, "transform": True},
        {"dtype": "float16"},
        {"dtype": "bfloat16", "Tq": 4},
        {"strided": True, "dtype": "bfloat16"},
        {"Hq": 3, "Hkv": 1},
        {"Hq": 7, "Hkv": 7},
        {"Hq": 14, "Hkv": 2, "Tq": 2},
        {"Hq": 32, "Hkv": 1},
        {"lens": ()},
    ]
    return [
        *({**base, "formats": (name,), "D": d, "transform": d == 128} for name in packed for d in (64, 128, 256)),
        *({**base, "formats": (name,), "D": d} for name in ("bf16", "f16") for d in (64, 80, 96, 112, 128, 192, 256)),
        *(
            {**base, "formats": (name,), "transform": True}
            for name in ("u3/u2", "bf16/u2", "u4/f16", "kivi2/u2", "u2/kivi2")
        ),
        *({**base, "formats": (name,), "page_size": 16} for name in ("u2", "kivi2", "f16 NHD", "bf16/f16 HND")),
        *({**base, "formats": (name,), "page_size": ps} for name in ("bf16", "f16 NHD") for ps in (1, 5)),
        *({**base, "formats": ("u2",), "dtype": t, "transform": True} for t in ("float16", "bfloat16")),
        {
            **base,
            "formats": ("bf16 NHD", "u8", "u3", "u2", "kivi2", "u4/u2", "f16", "u2"),
            "transform": True,
            "lens": (517, 300),
        },
        *({**base, "formats": fmts, **option} for option in options for fmts in (("u2",), ("bf16",), mixed)),
        {**base, "formats": ("u2",), "Hq": 8, "lens": (2100, 900), "page_size": 64, "transform": True},
        {**base, "formats": ("bf16",), "Hq": 8, "lens": (2100, 900), "page_size": 64},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pages of a sequence go round the pools. What must not be read is poisoned: pages of nobody, tokens past the end,
    and, with a window, pages before it; table entries that must not be read are no pages at all."""
    gen = torch.Generator().manual_seed(seed)
    heads, D, page_size, Tq = case["Hkv"], case["D"], case["page_size"], case["Tq"]
    lens, names = case["lens"], case["formats"]
    transform = _reference.random_transform(heads, D, gen) if case.get("transform") else None
    pages = [-(-n // page_size) for n in lens]
    count = sum(-(-n // len(names)) for n in pages) + 2
    pools = tuple(_reference.random_pool(name, count, heads, page_size, D, transform, gen) for name in names)
    kv = PagedKV(pools, tuple(format(name.partition(" ")[0]) for name in names), page_size, transform)

    free = [torch.randperm(count, generator=gen).tolist() for _ in names]
    table = torch.full((len(lens), max(pages, default=0) + 2), 0x7FFFFFFF, dtype=torch.int32)
    left = case.get("window", -1)
    for b, length in enumerate(lens):
        begin = max(0, length - Tq - left) // page_size if left >= 0 else 0
        for i in range(begin, pages[b]):
            pool = (b + i) % len(names)
            page = free[pool].pop()
            table[b, i] = pool << PAGE_BITS | page
            if (i + 1) * page_size > length:
                _reference.poison_tokens(kv, pool, page, length - i * page_size, D)
    for pool, rest in enumerate(free):
        for page in rest:
            _reference.poison_page(kv, pool, page)

    dtype = getattr(torch, case["dtype"])
    shape = (len(lens), case["Hq"], D) if Tq == 1 else (len(lens), Tq, case["Hq"], D)
    if case.get("strided"):  # as a slice of a fused qkv projection
        q = _reference.randn((*shape[:-1], 3 * D), gen, dtype)[..., :D]
    else:
        q = _reference.randn(shape, gen, dtype)
    options: dict[str, Any] = {k: case[k] for k in ("scale", "softcap", "split_tokens") if k in case}
    options["return_lse"] = True
    if left >= 0:
        options["window"] = (left, 0)
    if case.get("sinks"):
        options["sinks"] = 2 * _reference.randn((case["Hq"],), gen)
    if case.get("alibi"):
        slopes = 2.0 ** -torch.arange(1.0, case["Hq"] + 1)
        options["alibi_slopes"] = slopes if case["alibi"] == 1 else slopes + torch.rand(len(lens), 1, generator=gen)
    return (q, kv, table, torch.tensor(lens, dtype=torch.int32)), options


def cost(case: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the pages that a query looks at, and of q and out; flops of q k^T and p v."""
    page_size, D, Tq, names = case["page_size"], case["D"], case["Tq"], case["formats"]
    sizes = [format(name.partition(" ")[0]).data_bytes(page_size, D) for name in names]
    left = case.get("window", -1)
    moved = flops = 0
    for b, length in enumerate(case["lens"]):
        begin = max(0, length - Tq - left) if left >= 0 else 0
        for i in range(begin // page_size, -(-length // page_size)):
            tokens = min((i + 1) * page_size, length) - max(i * page_size, begin)
            moved += sizes[(b + i) % len(names)] * tokens // page_size * case["Hkv"]
        flops += 4 * (length - begin) * Tq * case["Hq"] * D
    vectors = 2 * len(case["lens"]) * Tq * case["Hq"] * D
    return moved + vectors * getattr(torch, case["dtype"]).itemsize, flops
