# ruff: noqa: E501  a row of a table is a line
"""Every argument of every op, wrong in every way: one clear error that names the argument, the rule and the value."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import CPU, DEVICE, GPU, Q_DTYPE
from torch import Tensor

import kvkernels as kk
from kvkernels.formats import CODECS, HEAD_DIMS, PACKED_HEAD_DIMS
from kvkernels.ops import OPS

Args = dict[str, Any]


def attention(**change: Any) -> Args:
    """Arguments of a good call: B 4, Hq 6, Hkv 2, D 128, a u2 pool, a bf16 pool and a pair of caches."""
    args: Args = {
        "q": torch.zeros(4, 6, 128, dtype=Q_DTYPE),
        "kv": cache(),
        "page_table": torch.zeros(4, 3, dtype=torch.int32),
        "seq_lens": torch.tensor([1, 2, 3, 96], dtype=torch.int32),
        **change,
    }
    return args


def cache(**change: Any) -> kk.PagedKV:
    transform = kk.KVTransform(torch.zeros(2, 128), torch.ones(2, 128))
    kv = kk.PagedKV.empty(["u2", "bf16"], [5, 4], 2, 128, 32, transform=transform)
    caches = (torch.zeros(3, 2, 32, 128, dtype=torch.bfloat16), torch.zeros(3, 2, 32, 128, dtype=torch.float16))
    return kv._replace(
        **{"pools": (*kv.pools, caches), "formats": (*kv.formats, kk.format("bf16", "f16")), **change}
    )  # fmt: skip


def pools(**change: Any) -> kk.PagedKV:
    """cache() with one pool changed: pools(u2=...), pools(bf16=...), pools(k=...), pools(v=...)."""
    u2, bf16, (k, v) = cache().pools
    return cache(pools=(change.get("u2", u2), change.get("bf16", bf16), (change.get("k", k), change.get("v", v))))


def gaps(t: Tensor) -> Tensor:
    """The same with every second element of a row unused."""
    return torch.stack((t, t), -1).flatten(-2)[..., ::2]


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


U2, BF16, (K, V) = cache().pools
Q, TABLE, LENS = (attention()[name] for name in ("q", "page_table", "seq_lens"))
MU, T, _ = cache().transform
ORDER = torch.arange(128, dtype=torch.int32).repeat(2, 1)


def ordered(order: Tensor) -> Args:
    return {"kv": cache(transform=kk.KVTransform(MU, T, order))}


Q_NAME = str(Q_DTYPE).removeprefix("torch.")

TREE = torch.ones(4, 1, dtype=torch.int32)
EXTRA = (torch.zeros(4, 2, 128, dtype=Q_DTYPE), torch.zeros(4, 2, 128, dtype=Q_DTYPE), torch.zeros(4, 2))
WINDOWS = torch.tensor([[4, 8], [0, -1]], dtype=torch.int32)
PLAN = kk.plan_decode(LENS)
FOUR = Q[:, None].expand(4, 4, 6, 128)  # queries of a sequence


def extra(**change: Any) -> tuple[Tensor, ...]:
    return tuple(change.get(name, x) for name, x in zip(("k", "v", "bias"), EXTRA))


def plan(**change: Any) -> kk.Plan:
    return PLAN._replace(**change)


def node(i: int, *numbers: int) -> kk.Plan:
    """PLAN with one node changed."""
    nodes = PLAN.nodes.clone()
    nodes[i] = torch.tensor(numbers)
    return plan(nodes=nodes)


# Of quant_attention and flash_decode alike.
OPTIONS: list[tuple[Args, str]] = [
    ({"tree_mask": TREE.long()}, "tree_mask must be int32, got int64"),
    ({"tree_mask": TREE[0]}, "tree_mask must be [B, Tq], got [1]"),
    ({"tree_mask": TREE.repeat(1, 2)}, "tree_mask must be [B, Tq], got [4, 2]; Tq = 1 from q being [B, Hq, D]"),
    ({"tree_mask": TREE[:3]}, "tree_mask must be [B, Tq], got [3, 1]; B = 4 from q.size(0)"),
    ({"tree_mask": TREE + 2}, "tree_mask[0, 0] = 3 has bits beyond those of the Tq = 1 tokens"),
    ({"tree_mask": TREE - 1}, "tree_mask[0, 0] = 0 lacks bit 0: a token sees itself"),
    ({"tree_mask": TREE.repeat(1, 2) * 3, "q": FOUR[:, :2]}, "tree_mask[1, 0] = 3 has bits above 0: a token's ancestors stand before it"),
    ({"tree_mask": meta(TREE)}, "tree_mask is on meta, but q is on cpu"),
    ({"head_windows": WINDOWS.long()}, "head_windows must be int32, got int64"),
    ({"head_windows": WINDOWS[:1]}, "head_windows must be [Hkv, 2], got [1, 2]; Hkv = 2 from"),
    ({"head_windows": WINDOWS[:, :1]}, "head_windows must be [Hkv, 2], got [2, 1]"),
    ({"head_windows": WINDOWS.repeat(1, 2)[:, :2]}, "head_windows must be contiguous, got strides [4, 1]"),
    ({"head_windows": WINDOWS, "window": (5, 0)}, "head_windows cannot go together with window"),
    ({"head_windows": WINDOWS - 9}, "head_windows[0, 0] = -5 is a negative number of sink tokens"),
    ({"head_windows": meta(WINDOWS)}, "head_windows is on meta, but q is on cpu"),
    ({"extra": EXTRA[:2]}, "extra must be (k, v, bias), got 2 tensors"),
    ({"extra": extra(k=EXTRA[0].half())}, f"extra k must be {Q_NAME} like q"),
    ({"extra": extra(k=EXTRA[0][:3])}, "extra k must be [B, Hkv, D], got [3, 2, 128]; B = 4 from q.size(0)"),
    ({"extra": extra(k=EXTRA[0][:, :1])}, "extra k must be [B, Hkv, D], got [4, 1, 128]; Hkv = 2 from"),
    ({"extra": extra(v=EXTRA[1][:1, :, :64])}, "extra v must be [1, Hkv, Dv], got [1, 2, 64]; Dv = 128 from D"),
    ({"extra": extra(v=gaps(EXTRA[1]))}, "extra v must be contiguous in its last dim"),
    ({"extra": extra(bias=EXTRA[2].double())}, "extra bias must be float32, got float64"),
    ({"extra": extra(bias=EXTRA[2][0])}, "extra bias must be [B, Hkv], got [2]"),
    ({"extra": extra(bias=meta(EXTRA[2]))}, "extra bias is on meta, but q is on cpu"),
    ({"extra": extra(bias=EXTRA[2].clone().requires_grad_())}, "extra bias requires grad"),
    ({"head_map": (0,) * 5}, "head_map must have Hq entries, got 5; Hq = 6 from q.size(1)"),
    ({"head_map": (0, 1, 0, 2, 0, 1)}, "head_map holds 2, but there are 2 KV heads, 0 to 1"),
    ({"head_map": (0, 1, 0, -1, 0, 1)}, "head_map holds -1, but there are 2 KV heads, 0 to 1"),
    ({"head_map": (0,) * 300, "q": Q[:, :1].expand(4, 300, 128)}, "head_map takes at most 256 query heads, got Hq = 300"),
    ({"plan": PLAN[:2]}, "plan must be (nodes, order, leaf), got 2 tensors"),
    ({"plan": PLAN, "window": (5, 0)}, "plan cannot go together with window"),
    ({"plan": PLAN, "head_windows": WINDOWS}, "plan cannot go together with head_windows"),
    ({"plan": PLAN, "split_tokens": 64}, "plan cannot go together with split_tokens"),
    ({"plan": plan(nodes=PLAN.nodes.long())}, "plan.nodes must be int32, got int64"),
    ({"plan": plan(nodes=PLAN.nodes[:6])}, "plan.nodes must be [2 B, 5], got [6, 5]; B = 4 from q.size(0)"),
    ({"plan": plan(order=PLAN.order[:3])}, "plan.order must be [B], got [3]; B = 4 from q.size(0)"),
    ({"plan": plan(leaf=meta(PLAN.leaf))}, "plan.leaf is on meta, but q is on cpu"),
    ({"plan": plan(order=PLAN.order * 0)}, "plan.order[1] = 0, but order holds every number below B = 4 once"),
    ({"plan": node(3, 3, 5, 0, 96, -1)}, "plan.nodes[3] = (3, 5, 0, 96, -1) is no range of sequences"),
    ({"plan": node(3, 3, 4, 5, 96, -1)}, "plan.nodes[3] = (3, 4, 5, 96, -1) is no range of tokens that begins with a page"),
    ({"plan": node(3, 3, 4, 0, 96, 4)}, "plan.nodes[3] = (3, 4, 0, 96, 4) stands before its parent"),
    ({"plan": node(3, 3, 4, 32, 96, 2)}, "plan.nodes[3] = (3, 4, 32, 96, 2) does not continue its parent"),
    ({"plan": node(2, 2, 4, 0, 3, -1)}, "plan.nodes[2] = (2, 4, 0, 3, -1) is shared, but does not end with a page"),
    ({"plan": node(2, 2, 4, 0, 32, -1)}, "plan.nodes[2] holds tokens up to 32, but seq_lens[2] = 3, and the queries' own tokens are not shared; was the plan made from these lengths, with num_queries = 1?"),
    ({"plan": kk.plan_decode(LENS + 1)}, "plan.nodes[0] holds tokens up to 2, but seq_lens[0] = 1; was the plan made from these lengths"),
    ({"plan": plan(leaf=PLAN.leaf.flip(0))}, "plan.leaf[0] = 3 is not the node with the end of the sequence; seq_lens[0] = 1"),
]  # fmt: skip

ATTENTION: list[tuple[Args, str]] = [
    # q
    ({"q": Q.int()}, "q must be float32 or bfloat16 or float16, got int32"),
    ({"q": Q.double()}, "q must be float32 or bfloat16 or float16, got float64"),
    ({"q": Q[0]}, "q must be [B, Hq, D] or [B, Tq, Hq, D], got [6, 128]"),
    ({"q": gaps(Q)}, "q must be contiguous in its last dim, got strides [1536, 256, 2]"),
    ({"q": Q[..., :96]}, "head_dim must be one of 64, 128, 256, because pool 0 is u2/u2; got 96 from q.size(2)"),
    ({"q": Q[:, None].expand(4, 17, 6, 128)}, "q must have 1 to 16 tokens per sequence, got Tq = 17 from q.size(1)"),
    ({"q": Q[:, None][:, :0]}, "q must have 1 to 16 tokens per sequence, got Tq = 0"),
    ({"q": Q[:, :5]}, "Hq must be a multiple of Hkv; Hq = 5 from q.size(1), Hkv = 2 from pool 0"),
    ({"q": meta(Q)}, "is on cpu, but q is on meta"),
    ({"q": torch.zeros(4, 6, 128, requires_grad=True)}, "q requires grad, but the op has no backward"),
    # kv: pools
    ({"kv": pools(u2=U2.view(torch.int8))}, "pool 0 must be uint8, got int8"),
    ({"kv": pools(u2=U2[0])}, "pool 0 must be [num_pages, Hkv, page_bytes], got [2, 2176]"),
    ({"kv": pools(u2=U2[..., :2112])}, "pool 0: pages of 2112 bytes, but u2/u2 with page_size 32 and head_dim 128 needs 2176"),
    ({"kv": pools(u2=gaps(U2))}, "pool 0 must be contiguous in its last dim"),
    ({"kv": pools(u2=meta(U2))}, "is on meta, but q is on cpu"),
    ({"kv": pools(bf16=BF16[:, :1])}, "pool 1 must be [num_pages, Hkv, page_bytes], got [4, 1, 16384]; Hkv = 2 from pool 0.size(1)"),
    ({"kv": pools(k=K.half())}, "k_cache of pool 2 must be bfloat16, got float16"),
    ({"kv": pools(v=V.bfloat16())}, "v_cache of pool 2 must be float16, got bfloat16"),
    ({"kv": pools(k=K[0])}, "k_cache of pool 2 must be [num_pages, Hkv, page_size, D], got [2, 32, 128]"),
    ({"kv": pools(v=V[..., :64])}, "v_cache of pool 2 must be [num_pages, Hkv, page_size, D], got [3, 2, 32, 64]; D = 128 from q.size(2)"),
    ({"kv": pools(k=K[:, :, :16])}, "k_cache of pool 2 must be [num_pages, Hkv, page_size, D], got [3, 2, 16, 128]; page_size = 32"),
    ({"kv": pools(v=V[:2])}, "v_cache of pool 2 has 2 pages, but k_cache of pool 2 has 3"),
    ({"kv": pools(k=gaps(K))}, "k_cache of pool 2 must be contiguous in its last dim"),
    ({"kv": pools(v=meta(V))}, "is on meta, but q is on cpu"),
    # kv: the rest
    ({"kv": cache(formats=(kk.format("u4"), *cache().formats[1:]))}, "pool 0: pages of 2176 bytes, but u4/u4 with page_size 32 and head_dim 128 needs 4224"),
    ({"kv": cache(formats=(*cache().formats[:2], kk.format("u2")))}, "pool 2: two separate caches hold 16-bit formats, not u2/u2"),
    ({"kv": cache(formats=(kk.Format("m42", "m42"), *cache().formats[1:]))}, "pool 0: m42 is a format for keys; its values need another one, such as u2"),
    ({"kv": cache(formats=cache().formats[:2])}, "kv has 3 pools, but 2 formats"),
    ({"kv": kk.PagedKV((), (), 32)}, "kv needs at least one pool"),
    ({"kv": kk.PagedKV((U2,) * 9, cache().formats[:1] * 9, 32)}, "kv has 9 pools, but a page table tells at most 8 apart"),
    ({"kv": cache(page_size=24)}, "page_size must be a multiple of 16, because pool 0 is u2/u2; got 24"),
    ({"kv": cache(page_size=0)}, "page_size must be a multiple of 16, because pool 0 is u2/u2; got 0"),
    ({"kv": kk.PagedKV((BF16,), cache().formats[1:2], 0)}, "page_size must be at least 1, got 0"),
    ({"kv": kk.PagedKV((K[..., :72],), (kk.format("bf16"),), 32), "q": Q[..., :72]}, "head_dim must be one of 64, 80, 96, 112, 128, 192, 256; got 72 from q.size(2)"),
    # transform
    ({"kv": cache(transform=kk.KVTransform(MU.double(), T))}, "centre must be float32, got float64"),
    ({"kv": cache(transform=kk.KVTransform(MU, T[:1]))}, "balance must be [Hkv, D], got [1, 128]; Hkv = 2 from pool 0.size(1)"),
    ({"kv": cache(transform=kk.KVTransform(MU[:, :64], T))}, "centre must be [Hkv, D], got [2, 64]; D = 128 from q.size(2)"),
    ({"kv": cache(transform=kk.KVTransform(MU, gaps(T)))}, "balance must be contiguous in its last dim"),
    ({"kv": cache(transform=kk.KVTransform(MU, T.repeat(1, 2)[:, :128]))}, "balance must be contiguous, got strides [256, 1]"),
    ({"kv": cache(transform=kk.KVTransform(meta(MU), T))}, "centre is on meta, but q is on cpu"),
    (ordered(ORDER.long()), "order must be int32, got int64"),
    (ordered(ORDER[:1]), "order must be [Hkv, D], got [1, 128]; Hkv = 2 from pool 0.size(1)"),
    (ordered(ORDER.repeat(1, 2)[:, :128]), "order must be contiguous, got strides [256, 1]"),
    (ordered(meta(ORDER)), "order is on meta, but q is on cpu"),
    (ordered(ORDER - 3), "order[0, 0] = -3 is no channel of D = 128"),
    (ordered(ORDER + 1), "order[0, 127] = 128 is no channel of D = 128"),
    *([(ordered(ORDER // 2), "order[0] is no permutation of the channels: it names 0 twice")] if kk.info()["asserts"] else []),
    # page_table
    ({"page_table": TABLE.long()}, "page_table must be int32, got int64"),
    ({"page_table": TABLE[0]}, "page_table must be [B, max_pages], got [3]"),
    ({"page_table": TABLE[:3]}, "page_table must be [B, max_pages], got [3, 3]; B = 4 from q.size(0)"),
    ({"page_table": gaps(TABLE)}, "page_table must be contiguous in its last dim"),
    ({"page_table": meta(TABLE)}, "page_table is on meta, but q is on cpu"),
    ({"page_table": TABLE[:, :2]}, "page_table is too narrow: seq_lens[3] = 96 needs 3 pages of 32 tokens, but page_table.size(1) = 2"),
    ({"page_table": TABLE + 5}, "page_table[0, 0] means page 5 of pool 0, which has 5 pages"),
    ({"page_table": TABLE + (3 << 28)}, f"page_table[0, 0] = {3 << 28} means pool 3, but there are 3"),
    ({"page_table": TABLE - 1}, "page_table[0, 0] = -1 means pool -1, but there are 3"),
    ({"page_table": TABLE + (2 << 28 | 3)}, "page_table[0, 0] means page 3 of pool 2, which has 3 pages"),
    # seq_lens
    ({"seq_lens": LENS.long()}, "seq_lens must be int32, got int64"),
    ({"seq_lens": LENS[:3]}, "seq_lens must be [B], got [3]; B = 4 from q.size(0)"),
    ({"seq_lens": LENS[None]}, "seq_lens must be [B], got [1, 4]"),
    ({"seq_lens": gaps(LENS)}, "seq_lens must be contiguous in its last dim"),
    ({"seq_lens": meta(LENS)}, "seq_lens is on meta, but q is on cpu"),
    ({"seq_lens": LENS - 2}, "seq_lens[0] = -1 is negative"),
    ({"seq_lens": LENS + 1}, "page_table is too narrow: seq_lens[3] = 97 needs 4 pages"),
    # options
    ({"scale": float("nan")}, "scale is NaN"),
    ({"window": (8, 4)}, "window = (8, 4): attention is causal, so right must be -1 or 0"),
    ({"window": (3, -7)}, "window = (3, -7): attention is causal, so right must be -1 or 0"),
    ({"window": (-5, 0)}, "window = (-5, 0): left must be at least 0, or -1 for all"),
    ({"split_tokens": 0}, "split_tokens must be a positive multiple of 16 (or None), got 0"),
    ({"softcap": -1.0}, "softcap must be positive and finite, or 0 for none; got -1"),
    ({"softcap": float("inf")}, "softcap must be positive and finite, or 0 for none; got inf"),
    ({"softcap": float("nan")}, "softcap must be positive and finite, or 0 for none; got nan"),
    ({"split_tokens": 24}, "split_tokens must be a positive multiple of 16 (or None), got 24"),
    ({"split_tokens": -16}, "split_tokens must be a positive multiple of 16 (or None), got -16"),
    ({"sinks": torch.zeros(6).half()}, "sinks must be float32, got float16"),
    ({"sinks": torch.zeros(2)}, "sinks must be [Hq], got [2]; Hq = 6 from q.size(1)"),
    ({"sinks": torch.zeros(1, 6)}, "sinks must be [Hq], got [1, 6]"),
    ({"sinks": gaps(torch.zeros(6))}, "sinks must be contiguous in its last dim"),
    ({"sinks": meta(torch.zeros(6))}, "sinks is on meta, but q is on cpu"),
    ({"sinks": torch.zeros(6, requires_grad=True)}, "sinks requires grad, but the op has no backward"),
    ({"alibi_slopes": torch.zeros(6).double()}, "alibi_slopes must be float32, got float64"),
    ({"alibi_slopes": torch.zeros(4)}, "alibi_slopes must be [Hq], got [4]; Hq = 6 from q.size(1)"),
    ({"alibi_slopes": torch.zeros(3, 6)}, "alibi_slopes must be [B, Hq], got [3, 6]; B = 4 from q.size(0)"),
    ({"alibi_slopes": torch.zeros(1, 4, 6)}, "alibi_slopes must be [B, Hq], got [1, 4, 6]"),
    ({"alibi_slopes": gaps(torch.zeros(6))}, "alibi_slopes must be contiguous in its last dim"),
    ({"alibi_slopes": meta(torch.zeros(6))}, "alibi_slopes is on meta, but q is on cpu"),
    *OPTIONS,
    ({"out": Q.half()}, f"out must be {Q_NAME} like q, got float16"),
    ({"out": Q.int()}, "out must be float32 or bfloat16 or float16, got int32"),
    ({"out": Q[:3]}, "out must be [B, Hq, D], got [3, 6, 128]; B = 4 from q.size(0)"),
    ({"out": gaps(Q)}, "out must be contiguous in its last dim"),
    ({"out": Q[:1].expand(4, 6, 128)}, "out is written, so its elements must not share memory, got strides [0, 128, 1]"),
    ({"out": meta(Q)}, "out is on meta, but q is on cpu"),
]  # fmt: skip


def decode(**change: Any) -> Args:
    """Arguments of a good call: B 4, Hq 6, Hk = Hv 2, D 128."""
    args: Args = {
        "q": torch.zeros(4, 6, 128, dtype=Q_DTYPE),
        "k_cache": torch.zeros(5, 32, 2, 128, dtype=torch.bfloat16),
        "v_cache": torch.zeros(5, 32, 2, 128, dtype=torch.bfloat16),
        "block_table": torch.zeros(4, 3, dtype=torch.int32),
        "seq_lens": torch.tensor([1, 2, 3, 96], dtype=torch.int32),
        **change,
    }
    return args


CACHE = decode()["k_cache"]
WIDE_Q = torch.zeros(4, 6, 576, dtype=Q_DTYPE)
WIDE_CACHE = torch.zeros(5, 32, 2, 576, dtype=torch.bfloat16)
DECODE: list[tuple[Args, str]] = [
    ({"q": Q.int()}, "q must be float32 or bfloat16 or float16, got int32"),
    ({"q": Q[0]}, "q must be [B, Hq, D] or [B, Tq, Hq, D], got [6, 128]"),
    ({"q": Q[..., :96]}, "k_cache must be [num_blocks, page_size, Hk, D], got [5, 32, 2, 128]; D = 96 from q.size(2)"),
    ({"q": Q[..., :72], "k_cache": CACHE[..., :72]}, "head_dim must be one of 64, 80, 96, 112, 128, 192, 256 (or 576, with values of 512); got 72 from q.size(2)"),
    ({"q": Q[:, :5]}, "Hq must be a multiple of Hk; Hq = 5 from q.size(1), Hk = 2 from k_cache.size(2)"),
    ({"k_cache": CACHE.float()}, "k_cache must be bfloat16 or float16, got float32"),
    ({"k_cache": CACHE[0]}, "k_cache must be [num_blocks, page_size, Hk, D], got [32, 2, 128]"),
    ({"k_cache": CACHE[:, :0]}, "k_cache must have pages of at least 1 token, got [5, 0, 2, 128]"),
    ({"k_cache": gaps(CACHE)}, "k_cache must be contiguous in its last dim"),
    ({"k_cache": meta(CACHE)}, "k_cache is on meta, but q is on cpu"),
    ({"k_cache": CACHE.clone().requires_grad_()}, "k_cache requires grad"),
    ({"v_cache": CACHE.int()}, "v_cache must be bfloat16 or float16, got int32"),
    ({"v_cache": CACHE[:4]}, "v_cache must be [num_blocks, page_size, Hv, Dv], got [4, 32, 2, 128]; num_blocks = 5 from k_cache.size(0)"),
    ({"v_cache": CACHE[:, :16]}, "v_cache must be [num_blocks, page_size, Hv, Dv], got [5, 16, 2, 128]; page_size = 32 from k_cache.size(1)"),
    ({"v_cache": CACHE[..., :64]}, "v_cache must be [num_blocks, page_size, Hv, Dv], got [5, 32, 2, 64]; Dv = 128 from D"),
    ({"v_cache": CACHE.repeat(1, 1, 2, 1)}, "Hq must be a multiple of Hv; Hq = 6 from q.size(1), Hv = 4 from v_cache.size(2)"),
    ({"v_cache": CACHE[:, :, :1], "head_map": (0,) * 6}, "head_map needs as many heads of K as of V; there are 2 and 1"),
    ({"v_cache": CACHE[:, :, :1], "extra": EXTRA}, "extra needs as many heads of K as of V; there are 2 and 1"),
    ({"v_cache": CACHE[:, :, :1], "head_windows": WINDOWS}, "head_windows needs as many heads of K as of V; there are 2 and 1"),
    ({"v_cache": WIDE_CACHE, "k_cache": WIDE_CACHE, "q": WIDE_Q}, "v_cache must be [num_blocks, page_size, Hv, Dv], got [5, 32, 2, 576]; Dv = 512 from D = 576"),
    ({"v_cache": WIDE_CACHE[..., :512], "k_cache": WIDE_CACHE, "q": WIDE_Q, "out": WIDE_Q}, "out must be [B, Hq, Dv], got [4, 6, 576]; Dv = 512 from D = 576"),
    ({"block_table": TABLE.long()}, "block_table must be int32, got int64"),
    ({"block_table": TABLE[:3]}, "block_table must be [B, max_pages], got [3, 3]; B = 4 from q.size(0)"),
    ({"block_table": TABLE[:, :2]}, "block_table is too narrow: seq_lens[3] = 96 needs 3 pages of 32 tokens, but block_table.size(1) = 2"),
    ({"block_table": TABLE + 5}, "block_table[0, 0] = 5, but k_cache has 5 blocks"),
    ({"block_table": TABLE - 1}, "block_table[0, 0] = -1, but k_cache has 5 blocks"),
    ({"block_table": TABLE + (1 << 28)}, f"block_table[0, 0] = {1 << 28}, but k_cache has 5 blocks"),
    ({"seq_lens": LENS.long()}, "seq_lens must be int32, got int64"),
    ({"seq_lens": LENS - 2}, "seq_lens[0] = -1 is negative"),
    ({"window": (8, 4)}, "window = (8, 4): attention is causal, so right must be -1 or 0"),
    ({"window": (3, -7)}, "window = (3, -7): attention is causal, so right must be -1 or 0"),
    ({"window": (-5, 0)}, "window = (-5, 0): left must be at least 0, or -1 for all"),
    ({"split_tokens": 0}, "split_tokens must be a positive multiple of 16 (or None), got 0"),
    ({"sinks": torch.zeros(2)}, "sinks must be [Hq], got [2]; Hq = 6 from q.size(1)"),
    ({"out": Q.half()}, f"out must be {Q_NAME} like q, got float16"),
    *OPTIONS,
]  # fmt: skip

PLAN_PREFIX: list[tuple[Args, str]] = [
    ({"page_table": TABLE.long()}, "page_table must be int32, got int64"),
    ({"page_table": TABLE[0]}, "page_table must be [B, max_pages], got [3]"),
    ({"page_table": TABLE[:3]}, "page_table must be [B, max_pages], got [3, 3]; B = 4 from seq_lens.size(0)"),
    ({"page_table": gaps(TABLE)}, "page_table must be contiguous in its last dim"),
    ({"page_table": meta(TABLE)}, "page_table is on meta, but seq_lens is on cpu"),
    ({"page_table": TABLE[:, :2]}, "page_table is too narrow: seq_lens[3] = 96 needs 3 pages of 32 tokens"),
    ({"seq_lens": LENS.long()}, "seq_lens must be int32, got int64"),
    ({"seq_lens": LENS[None]}, "seq_lens must be [B], got [1, 4]"),
    ({"seq_lens": LENS - 2}, "seq_lens[0] = -1 is negative"),
    ({"page_size": 0}, "page_size must be at least 1, got 0"),
    ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
    ({"min_tokens": -1}, "min_tokens must not be negative, got -1"),
]  # fmt: skip
PLAN_DECODE: list[tuple[Args, str]] = [
    ({"seq_lens": LENS.long()}, "seq_lens must be int32, got int64"),
    ({"seq_lens": LENS - 2}, "seq_lens[0] = -1 is negative"),
]


def write(**change: Any) -> Args:
    return {
        "k": torch.zeros(7, 2, 128),
        "v": torch.zeros(7, 2, 128),
        "kv": cache(),
        "pool": 0,
        "slots": torch.arange(7),
        **change,
    }


KEYS, SLOTS = write()["k"], write()["slots"]
KIVI = kk.PagedKV.empty(["kivi2", "u2"], 5, 2, 128, 32)

WRITE: list[tuple[Args, str]] = [
    ({"k": KEYS.int()}, "k must be float32 or bfloat16 or float16, got int32"),
    ({"k": KEYS[0]}, "k must be [T, Hkv, D], got [2, 128]"),
    ({"k": gaps(KEYS)}, "k must be contiguous in its last dim, got strides [512, 256, 2]"),
    ({"k": meta(KEYS)}, "is on cpu, but k is on meta"),
    ({"k": KEYS[:, :, :96], "v": KEYS[:, :, :96]}, "head_dim must be one of 64, 128, 256, because pool is u2/u2; got 96 from k.size(2)"),
    ({"k": KEYS[:, :1], "v": KEYS[:, :1]}, "pool must be [num_pages, Hkv, page_bytes], got [5, 2, 2176]; Hkv = 1 from k.size(1)"),
    ({"k": torch.zeros(7, 2, 128, requires_grad=True)}, "k requires grad, but the op has no backward"),
    ({"v": KEYS.half()}, "v must be float32 like k, got float16"),
    ({"v": KEYS[:5]}, "v must be [T, Hkv, D], got [5, 2, 128]; T = 7 from k.size(0)"),
    ({"v": KEYS[:, :1]}, "v must be [T, Hkv, D], got [7, 1, 128]; Hkv = 2 from k.size(1)"),
    ({"v": gaps(KEYS)}, "v must be contiguous in its last dim"),
    ({"v": meta(KEYS)}, "v is on meta, but k is on cpu"),
    ({"v": torch.zeros(7, 2, 128, requires_grad=True)}, "v requires grad, but the op has no backward"),
    ({"kv": pools(u2=U2.int())}, "pool must be uint8, got int32"),
    ({"kv": pools(u2=gaps(U2))}, "pool must be contiguous in its last dim"),
    ({"kv": pools(u2=U2[:1].expand(5, 2, 2176))}, "pool is written, so its elements must not share memory"),
    ({"kv": cache(page_size=8)}, "page_size must be a multiple of 16, because pool is u2/u2; got 8"),
    ({"kv": cache(transform=kk.KVTransform(MU, T.half()))}, "balance must be float32, got float16"),
    (ordered(ORDER[:, :64]), "order must be [Hkv, D], got [2, 64]; D = 128 from k.size(2)"),
    ({"kv": cache(formats=(kk.Format("u2", "m31"), *cache().formats[1:]))}, "pool: m31 is a format for keys; its values need another one, such as u2"),
    ({"kv": KIVI}, "kivi2 codes the keys of a whole page at once, so they cannot be written token by token; write the tokens to a 16-bit pool and re-encode its full pages with pack_pages"),
    ({"pool": 2, "kv": pools(k=K.half())}, "k_cache of pool must be bfloat16, got float16"),
    ({"pool": 2, "kv": pools(v=V[:1].expand(3, 2, 32, 128))}, "v_cache of pool is written, so its elements must not share memory"),
    ({"pool": 3}, "pool must be in [0, 3), the pools of kv; got 3"),
    ({"pool": -1}, "pool must be in [0, 3), the pools of kv; got -1"),
    ({"slots": SLOTS.int()}, "slots must be int64, got int32"),
    ({"slots": SLOTS[:6]}, "slots must be [T], got [6]; T = 7 from k.size(0)"),
    ({"slots": SLOTS[None]}, "slots must be [T], got [1, 7]"),
    ({"slots": gaps(SLOTS)}, "slots must be contiguous in its last dim"),
    ({"slots": meta(SLOTS)}, "slots is on meta, but k is on cpu"),
    ({"slots": SLOTS + 155}, "slots[5] = 160, but pool has 5 pages of 32 tokens"),
]  # fmt: skip


def read(**change: Any) -> Args:
    return {"kv": cache(), "pool": 0, "slots": torch.arange(7), **change}


READ: list[tuple[Args, str]] = [
    ({"kv": pools(u2=U2.int())}, "pool must be uint8, got int32"),
    ({"kv": pools(u2=U2[..., :100])}, "pages of 100 bytes fit no head_dim"),
    ({"kv": pools(u2=gaps(U2))}, "pool must be contiguous in its last dim"),
    ({"kv": cache(page_size=64)}, "pages of 2176 bytes"),
    ({"kv": cache(transform=kk.KVTransform(MU[0], T))}, "centre must be [Hkv, D], got [128]"),
    ({"pool": 1, "kv": pools(bf16=BF16[..., :8192])}, "pool: pages of 8192 bytes, but bf16/bf16 with page_size 32 and head_dim 128 needs 16384"),
    ({"pool": 2, "kv": pools(k=K.half())}, "k_cache of pool must be bfloat16, got float16"),
    ({"pool": 2, "kv": pools(k=K.clone().requires_grad_())}, "k_cache requires grad"),
    ({"pool": 7}, "pool must be in [0, 3), the pools of kv; got 7"),
    ({"slots": SLOTS.int()}, "slots must be int64, got int32"),
    ({"slots": SLOTS[None]}, "slots must be [T], got [1, 7]"),
    ({"slots": gaps(SLOTS)}, "slots must be contiguous in its last dim"),
    ({"slots": meta(SLOTS)}, "slots is on meta, but pool is on cpu"),
    ({"slots": SLOTS + 155}, "slots[5] = 160, but pool has 5 pages of 32 tokens"),
    ({"dtype": torch.float64}, "k must be float32 or bfloat16 or float16, got float64"),
]  # fmt: skip


def pack(**change: Any) -> Args:
    return {"kv": cache(), "src": 1, "dst": 0, "pairs": torch.tensor([[0, 4], [3, 0]], dtype=torch.int32), **change}


PAIRS = pack()["pairs"]
PACK: list[tuple[Args, str]] = [
    ({"kv": pools(bf16=BF16.view(torch.int8))}, "src must be uint8, got int8"),
    ({"kv": pools(bf16=BF16[..., :64])}, "src: pages of 64 bytes, but bf16/bf16 with page_size 32 and head_dim 128 needs 16384"),
    ({"kv": pools(bf16=BF16[:, :1])}, "dst must be [num_pages, Hkv, page_bytes], got [5, 2, 2176]; Hkv = 1 from src.size(1)"),
    ({"kv": pools(u2=gaps(U2))}, "dst must be contiguous in its last dim"),
    ({"kv": pools(u2=U2[:1].expand(5, 2, 2176))}, "dst is written, so its elements must not share memory"),
    ({"kv": cache(transform=kk.KVTransform(MU.half(), T))}, "centre must be float32, got float16"),
    ({"src": 2, "kv": pools(v=V.bfloat16())}, "v_cache of src must be float16, got bfloat16"),
    ({"dst": 2, "kv": pools(k=K.half())}, "k_cache of dst must be bfloat16, got float16"),
    ({"dst": 2, "kv": pools(k=K.clone().requires_grad_())}, "dst_k requires grad"),
    ({"src": 3}, "src must be in [0, 3), the pools of kv; got 3"),
    ({"dst": -1}, "dst must be in [0, 3), the pools of kv; got -1"),
    ({"pairs": PAIRS.long()}, "pairs must be int32, got int64"),
    ({"pairs": PAIRS[0]}, "pairs must be [N, 2], got [2]"),
    ({"pairs": torch.zeros(2, 3, dtype=torch.int32)}, "pairs must be [N, 2], got [2, 3]"),
    ({"pairs": gaps(PAIRS)}, "pairs must be contiguous in its last dim"),
    ({"pairs": torch.zeros(4, 4, dtype=torch.int32)[:, :2]}, "pairs must be contiguous, got strides [4, 1]"),
    ({"pairs": meta(PAIRS)}, "pairs is on meta, but src is on cpu"),
    ({"pairs": PAIRS + 1}, "pairs[0, 1] = 5, but dst has 5 pages"),
    ({"pairs": PAIRS.flip(1)}, "pairs[0, 0] = 4, but src has 4 pages"),
    ({"pairs": PAIRS * 0}, "pairs[0, 1] and pairs[1, 1] are both page 0 of dst, but a page that is written belongs to one pair, and is not read"),
]  # fmt: skip


def merge(**change: Any) -> Args:
    return {"outs": torch.zeros(3, 4, 6, 64), "lses": torch.zeros(3, 4, 6), **change}


OUTS, LSES = merge()["outs"], merge()["lses"]
MERGE: list[tuple[Args, str]] = [
    ({"outs": OUTS.double()}, "outs must be float32 or bfloat16 or float16, got float64"),
    ({"outs": OUTS[0, 0, 0]}, "outs must be [S, ..., D], got [64]"),
    ({"outs": gaps(OUTS)}, "outs must be contiguous in its last dim"),
    ({"outs": meta(OUTS)}, "is on cpu, but outs[0] is on meta"),
    ({"outs": torch.zeros(3, 4, 6, 64, requires_grad=True)}, "outs requires grad"),
    ({"outs": [], "lses": []}, "outs must be a tensor or a sequence of at least one, got none"),
    ({"outs": [*OUTS[:1]] * 16 + [OUTS[0].half()], "lses": [*LSES[:1]] * 17}, "outs[16] must be float32 [4, 6, 64] like outs[0], got float16 [4, 6, 64]"),
    ({"lses": [*LSES[:2], LSES[2, 0]]}, "lses[2] must be float32 [4, 6] like lses[0], got float32 [6]"),
    ({"outs": [*OUTS], "lses": [*LSES[:2]]}, "outs has 3 tensors and lses 2"),
    ({"outs": [*OUTS[:2], OUTS[2, :3]], "lses": [*LSES]}, "outs[2] must be outs[0].shape = [4, 6, 64], got [3, 6, 64]"),
    ({"outs": [*OUTS[:2], OUTS[2].half()], "lses": [*LSES]}, "outs[2] must be float32 like outs[0], got float16"),
    ({"outs": [*OUTS], "lses": [*LSES[:2], LSES[2].half()]}, "lses[2] must be float32, got float16"),
    ({"lses": LSES.half()}, "lses must be float32, got float16"),
    ({"lses": LSES[:2]}, "lses must be outs.shape[:-1] = [3, 4, 6], got [2, 4, 6]"),
    ({"lses": LSES[..., None]}, "lses must be outs.shape[:-1] = [3, 4, 6], got [3, 4, 6, 1]"),
    ({"lses": gaps(LSES)}, "lses must be contiguous in its last dim"),
    ({"lses": meta(LSES)}, "lses[0] is on meta, but outs[0] is on cpu"),
    ({"lses": torch.zeros(3, 4, 6, requires_grad=True)}, "lses requires grad"),
    ({"scale": torch.ones(3).double()}, "scale must be float32, got float64"),
    ({"scale": torch.ones(2)}, "scale must be [S], got [2]; S = 3 from outs.size(0)"),
    ({"outs": [*OUTS], "lses": [*LSES], "scale": torch.ones(2)}, "scale must be [S], got [2]; S = 3 from the length of outs"),
    ({"scale": torch.ones(3, requires_grad=True)}, "scale requires grad"),
    ({"temperature": torch.ones(3, 4)}, "temperature must be [S], got [3, 4]"),
    ({"temperature": gaps(torch.ones(3))}, "temperature must be contiguous in its last dim"),
    ({"temperature": meta(torch.ones(3))}, "temperature is on meta, but outs[0] is on cpu"),
]  # fmt: skip


def sparse(**change: Any) -> Args:
    pages = torch.tensor([[[0, -1]], [[0, -1]], [[0, -1]], [[0, 2]]], dtype=torch.int32).repeat(1, 2, 1)
    return attention(**{"pages": pages, **change})


PAGES = sparse()["pages"]
TOKENS = PAGES * 16
AFTER = torch.cat((PAGES[..., :1] + 1, PAGES[..., :1]), 2)  # 1, 0
LISTS: list[tuple[Args, str]] = [
    ({"pages": PAGES.long()}, "pages must be int32, got int64"),
    ({"pages": PAGES[0]}, "pages must be [B, Hkv, K], got [2, 2]"),
    ({"pages": PAGES[:3]}, "pages must be [B, Hkv, K], got [3, 2, 2]; B = 4 from"),
    ({"pages": PAGES.repeat(1, 2, 1)}, "pages must be [B, Hkv, K], got [4, 4, 2]; Hkv = 2 from"),
    ({"pages": gaps(PAGES)}, "pages must be contiguous in its last dim"),
    ({"pages": meta(PAGES)}, "pages is on meta, but"),
]  # fmt: skip
SPARSE: list[tuple[Args, str]] = [
    *((change, message) for change, message in (*ATTENTION, *OPTIONS) if not {"plan", "window"} & set(change)),
    *LISTS,
    ({"window": (8, 1)}, "window = (8, 1): attention is causal, so right must be -1 or 0"),
    ({"window": (-2, 0)}, "window = (-2, 0): left must be at least 0, or -1 for all"),
    ({"pages": None}, "one of pages and tokens must be given, got none"),
    ({"tokens": TOKENS}, "one of pages and tokens must be given, got both"),
    ({"pages": None, "tokens": TOKENS, "entries": PAGES}, "entries are those of pages, and cannot go together with tokens"),
    ({"entries": PAGES[..., :1]}, "entries must be [B, Hkv, K], got [4, 2, 1]; K = 2 from pages.size(2)"),
    ({"entries": PAGES + 4}, "entries[3, 0, 1] means page 6 of pool 0, which has 5 pages"),
    ({"entries": PAGES + (3 << 28)}, "entries[0, 0, 0] = 805306368 means pool 3, but there are 3"),
    ({"entries": meta(PAGES)}, "entries is on meta, but q is on cpu"),
    ({"pages": PAGES[3:]}, "pages[0, 0, 1] = 2, but seq_lens[0] = 1 has 1 pages"),
    ({"pages": AFTER[3:], "seq_lens": LENS * 0 + 96}, "pages[0, 0, 1] = 0 comes after 1, but a list must be ascending, each once"),
    ({"pages": PAGES[3:] * 0, "seq_lens": LENS * 0 + 96}, "pages[0, 0, 1] = 0 comes after 0, but a list must be ascending, each once"),
    ({"pages": None, "tokens": TOKENS + 1}, "tokens[0, 0, 0] = 1, but seq_lens[0] = 1 has 1 tokens"),
    ({"page_table": torch.tensor([[0, 99, 0]] * 3 + [[0, 99, 6]], dtype=torch.int32)}, "page_table[3, 2] means page 6 of pool 0, which has 5 pages"),
]  # fmt: skip


OWN_PAGES = torch.tensor([[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 4, 1 << 28]], dtype=torch.int32)


def summarise(**change: Any) -> Args:
    return {"kv": cache(), "page_table": OWN_PAGES, "seq_lens": LENS, "kind": "minmax", **change}


SUMMARIES = OPS["page_summaries"].reference(**summarise())
CHANNELS = torch.tensor([[0, 1, 2], [3, 4, 127]], dtype=torch.int32)
SEGMENTS = torch.tensor([[0, 1, 1]] * 4, dtype=torch.int32)
U2_RECORDS, BF16_RECORDS, CACHE_RECORDS = SUMMARIES.records


def records(**change: Any) -> kk.PageSummaries:
    given = tuple(change.pop(name, r) for name, r in zip(("u2", "bf16", "caches"), SUMMARIES.records))
    return SUMMARIES._replace(**{"records": given, **change})


TABLE_AND_LENS: list[tuple[Args, str]] = [
    ({"page_table": TABLE.long()}, "page_table must be int32, got int64"),
    ({"page_table": TABLE[0]}, "page_table must be [B, max_pages], got [3]"),
    ({"page_table": TABLE[:, :2]}, "page_table is too narrow: seq_lens[3] = 96 needs 3 pages of 32 tokens, but page_table.size(1) = 2"),
    ({"page_table": TABLE + (4 << 28)}, "page_table[0, 0] = 1073741824 means pool 4, but there are 3"),
    ({"page_table": TABLE + 9}, "page_table[0, 0] means page 9 of pool 0, which has 5 pages"),
    ({"page_table": meta(TABLE)}, "page_table is on meta, but"),
    ({"seq_lens": LENS.long()}, "seq_lens must be int32, got int64"),
    ({"seq_lens": LENS[:3]}, "seq_lens must be [B], got [3]; B = 4 from"),
    ({"seq_lens": LENS - 2}, "seq_lens[0] = -1 is negative"),
    ({"seq_lens": meta(LENS)}, "seq_lens is on meta, but"),
]  # fmt: skip
SUMMARISE: list[tuple[Args, str]] = [
    *TABLE_AND_LENS,
    ({"kv": pools(u2=U2.view(torch.int8))}, "pool 0 must be uint8, got int8"),
    ({"kv": pools(bf16=BF16[:, :1])}, "pool 1 must be [num_pages, Hkv, page_bytes], got [4, 1, 16384]; Hkv = 2 from pool 0.size(1)"),
    ({"kv": cache(page_size=64)}, "a pool of u2 pages must be uint8"),
    ({"kv": cache(transform=kk.KVTransform(MU.double(), T))}, "centre must be float32, got float64"),
    ({"kv": pools(k=K.clone().requires_grad_())}, "pool tensor 2 requires grad"),
    ({"kind": "median"}, "kind must be one of minmax, mean, channels; got 'median'"),
    ({"bits": 12}, "bits must be 16 or 8 of summaries of kind minmax, got 12"),
    ({"bits": 4}, "bits must be 16 or 8 of summaries of kind minmax, got 4"),
    ({"kind": "channels"}, "kind channels needs channels"),
    ({"channels": CHANNELS}, "channels are of kind channels alone"),
    ({"kind": "channels", "channels": CHANNELS, "bits": 2}, "bits must be 16, 8 or 4 of summaries of kind channels, got 2"),
    ({"kind": "channels", "channels": CHANNELS.long()}, "channels must be int32, got int64"),
    ({"kind": "channels", "channels": CHANNELS[:1]}, "channels must be [Hkv, r], got [1, 3]; Hkv = 2 from pool 0.size(1)"),
    ({"kind": "channels", "channels": CHANNELS[:, :0]}, "channels must be [Hkv, r] with r at least 1, got [2, 0]"),
    ({"kind": "channels", "channels": CHANNELS + 1}, "channels[1, 2] = 128, but head_dim is 128"),
    ({"kind": "channels", "channels": CHANNELS, "bits": 8, "kv": kk.PagedKV.empty("bf16", 4, 2, 128, 5), "seq_lens": LENS.clamp(max=9)}, "page_size must be a multiple of 16, because the channels have 8 bits; got 5"),
    ({"kind": "channels", "channels": CHANNELS, "segments": SEGMENTS}, "segments cannot go together with kind channels"),
    ({"segments": SEGMENTS.long()}, "segments must be int32, got int64"),
    ({"segments": SEGMENTS[:3]}, "segments must be [B, num_segments], got [3, 3]; B = 4 from"),
    ({"segments": SEGMENTS[:, :0]}, "segments must be [B, num_segments + 1], got [4, 0]"),
    ({"segments": SEGMENTS.flip(1)}, "segments[0, 2] = 0 comes after 1, but the offsets of segments must not be negative or descend"),
    ({"segments": SEGMENTS - 1}, "segments[0, 0] = -1 comes after 0"),
    ({"start": LENS.long()}, "start must be int32, got int64"),
    ({"start": LENS[:3]}, "start must be [B], got [3]; B = 4 from"),
    ({"start": LENS - 2}, "start[0] = -1 is negative"),
    ({"start": meta(LENS)}, "start is on meta, but"),
    ({"kind": None, "out": records(records=SUMMARIES.records[:2])}, "records must be 3 tensors, one for each pool, got 2"),
    ({"kind": None, "out": records(u2=U2_RECORDS[:4])}, "records[0] has 4 records of a head, but there are 5 pages in the pool"),
    ({"kind": None, "out": records(bf16=BF16_RECORDS[..., :64])}, "records[1]: records of 64 bytes, but minmax at 16 bits with head_dim 128 needs 512"),
    ({"kind": None, "out": records(bf16=BF16_RECORDS[:, :1])}, "records[1] must be [num_pages, Hkv, record_bytes], got [4, 1, 512]; Hkv = 2 from"),
    ({"kind": None, "out": records(caches=torch.zeros(3, 2, 1024, dtype=torch.uint8)[..., :512])}, "records[2] must be contiguous, got strides"),
    ({"kind": "mean", "out": SUMMARIES}, "kind must be that of out, 'minmax'; got 'mean'"),
    ({"kind": None, "bits": 8, "out": SUMMARIES}, "bits must be that of out, 16; got 8"),
]  # fmt: skip


def scoring(**change: Any) -> Args:
    return {"q": Q, "source": SUMMARIES, "page_table": TABLE, "seq_lens": LENS, "reduce": "max", **change}


LABELS = OPS["page_summaries"].reference(**summarise(kind="channels", channels=CHANNELS))
SEGMENTED = OPS["page_summaries"].reference(**summarise(segments=SEGMENTS))
SCORE: list[tuple[Args, str]] = [
    *TABLE_AND_LENS,
    ({"q": Q.double()}, "q must be float32 or bfloat16 or float16, got float64"),
    ({"q": Q[0]}, "q must be [B, Hq, D] or [B, Tq, Hq, D], got [6, 128]"),
    ({"q": Q[:, :5]}, "Hq must be a multiple of Hkv; Hq = 5 from q.size(1), Hkv = 2 from"),
    ({"q": Q[:, None].expand(4, 17, 6, 128)}, "q must have 1 to 16 tokens per sequence, got Tq = 17"),
    ({"q": gaps(Q)}, "q must be contiguous in its last dim"),
    ({"q": meta(Q)}, "but q is on meta"),
    ({"q": Q.clone().requires_grad_()}, "q requires grad, but the op has no backward"),
    ({"reduce": "min"}, "reduce must be one of max, sum, softmax_max, softmax_sum; got 'min'"),
    ({"scale": float("nan")}, "scale is NaN"),
    ({"source": cache(transform=kk.KVTransform(MU, T[:1]))}, "balance must be [Hkv, D], got [1, 128]"),
    ({"source": cache(formats=cache().formats[:2])}, "kv has 3 pools, but 2 formats"),
]  # fmt: skip
SCORE_PAGES: list[tuple[Args, str]] = [
    *SCORE,
    ({"q": Q[..., :96]}, "records[0]: records of 512 bytes, but minmax at 16 bits with head_dim 96 needs 384"),
    ({"q": Q[..., :72]}, "head_dim must be one of 64, 80, 96, 112, 128, 192, 256; got 72 from q.size(2)"),
    ({"source": LABELS}, "summaries of kind channels have no score for a page; score_tokens takes them"),
    ({"source": records(u2=U2_RECORDS.view(torch.int8))}, "records[0] must be uint8, got int8"),
    ({"source": records(records=())}, "summaries have 1 to 8 tensors of records, got 0"),
    ({"source": records(bits=8)}, "records[0]: records of 512 bytes, but minmax at 8 bits with head_dim 128 needs 272"),
    ({"source": records(segments=SEGMENTS)}, "records must be one tensor with B * num_segments = 8 records of a head, got 3 with 5"),
    ({"out": torch.zeros(4, 2, 4)}, "out must be [B, Hkv, n], got [4, 2, 4]; n = 3 from the width of page_table"),
    ({"out": torch.zeros(4, 2, 3).double()}, "out must be float32, got float64"),
    ({"out": torch.zeros(4, 2, 6)[..., :3]}, "out must be contiguous, got strides"),
]  # fmt: skip
SCORE_TOKENS: list[tuple[Args, str]] = [
    *SCORE,
    ({"source": SUMMARIES}, "source must be a PagedKV, PageSummaries of kind channels or of segments; got kind minmax"),
    ({"source": LABELS._replace(channels=CHANNELS + 1)}, "channels[1, 2] = 128, but head_dim is 128"),
    ({"source": LABELS._replace(channels=None)}, "source must be a PagedKV, PageSummaries of kind channels or of segments; got kind channels without its channels"),
    ({"source": LABELS._replace(bits=4)}, "records[0]: records of 192 bytes, but channels at 4 bits with head_dim 128 needs 112"),
    ({"source": SEGMENTED, "out": torch.zeros(4, 2, 3)}, "out must be float32 [4, 2, 96], [B, Hkv, max_pages * page_size]; got torch.float32 [4, 2, 3]"),
    ({"out": torch.zeros(4, 2, 3)}, "out must be [B, Hkv, n], got [4, 2, 3]; n = 96 from the width of page_table, in tokens"),
]  # fmt: skip


def select(**change: Any) -> Args:
    return {"scores": torch.zeros(4, 2, 3), "seq_lens": LENS, "k": 3, "page_size": 32, **change}


SCORES, ROW_K = select()["scores"], torch.ones(4, 2, dtype=torch.int32)
SELECT: list[tuple[Args, str]] = [
    ({"scores": SCORES.double()}, "scores must be float32, got float64"),
    ({"scores": SCORES[0]}, "scores must be [B, Hkv, n], got [2, 3]"),
    ({"scores": gaps(SCORES)}, "scores must be contiguous in its last dim"),
    ({"scores": meta(SCORES)}, "but scores is on meta"),
    ({"scores": SCORES.clone().requires_grad_()}, "scores requires grad"),
    ({"scores": SCORES[..., :2]}, "scores is too narrow: seq_lens[3] = 96 has 3 pages, but scores.size(2) = 2"),
    ({"seq_lens": LENS.long()}, "seq_lens must be int32, got int64"),
    ({"seq_lens": LENS[:3]}, "seq_lens must be [B], got [3]; B = 4 from scores.size(0)"),
    ({"seq_lens": LENS - 2}, "seq_lens[0] = -1 is negative"),
    ({"k": 2}, "k must be at least sink_pages + recent_pages = 1 + 2, got 2"),
    ({"k": 0, "sink_pages": 0, "recent_pages": 0}, "k must be at least 1, got 0"),
    ({"sink_pages": -1}, "sink_pages must not be negative, got -1"),
    ({"recent_pages": -1}, "recent_pages must not be negative, got -1"),
    ({"page_size": 0}, "page_size must be at least 1, got 0"),
    ({"row_k": ROW_K.long()}, "row_k must be int32, got int64"),
    ({"row_k": ROW_K[:, :1]}, "row_k must be [B, Hkv], got [4, 1]; Hkv = 2 from scores.size(1)"),
    ({"row_k": meta(ROW_K)}, "row_k is on meta, but"),
    ({"out": torch.zeros(4, 2, 4, dtype=torch.int32)}, "out must be [B, Hkv, k], got [4, 2, 4]; k = 3 from k"),
    ({"out": torch.zeros(4, 2, 3)}, "out must be int32, got float32"),
    ({"out": ROW_K[..., None].expand(4, 2, 3)}, "out must be contiguous in its last dim"),
]  # fmt: skip


def select_tokens(**change: Any) -> Args:
    return {"scores": SCORES, "seq_lens": LENS.clamp(max=3), "k": 69, "sink_tokens": 5, **change}


SELECT_TOKENS: list[tuple[Args, str]] = [
    ({"scores": SCORES.clone().requires_grad_()}, "scores requires grad"),
    ({"scores": SCORES[..., :2]}, "scores is too narrow: seq_lens[2] = 3 has 3 tokens, but scores.size(2) = 2"),
    ({"seq_lens": LENS - 2}, "seq_lens[0] = -1 is negative"),
    ({"k": 68}, "k must be at least sink_tokens + recent_tokens = 5 + 64, got 68"),
    ({"sink_tokens": -1}, "sink_tokens must not be negative, got -1"),
]  # fmt: skip


def gather(**change: Any) -> Args:
    state: Args = {"host": U2, "cache": U2.new_zeros(8, 2, 2176), "pool": 0,
                   "slot_of": torch.full((4, 2, 3), -1, dtype=torch.int32),
                   "page_of": torch.full((4, 2, 2), -1, dtype=torch.int32),
                   "hand": torch.zeros(4, 2, dtype=torch.int32)}  # fmt: skip
    others = {name: change.pop(name) for name in tuple(change) if name not in state}
    return {"offloaded": kk.Offloaded(**{**state, **change}), "page_table": TABLE, "pages": PAGES, **others}


STATE = gather()["offloaded"]
GATHER: list[tuple[Args, str]] = [
    *LISTS,
    ({"page_table": TABLE.long()}, "page_table must be int32, got int64"),
    ({"page_table": TABLE[:, :2]}, "slot_of must be [B, Hkv, max_pages], got [4, 2, 3]; max_pages = 2 from page_table.size(1)"),
    ({"page_table": TABLE + 5}, "page_table[0, 0] means page 5 of pool 0, of which host has 5"),
    ({"page_table": TABLE - 1}, "page_table[0, 0] = -1 is negative"),
    ({"page_table": meta(TABLE)}, "page_table is on meta, but cache is on cpu"),
    ({"pages": AFTER}, "pages[0, 0, 1] = 0 comes after 1, but a list must be ascending, each once"),
    ({"pages": PAGES + 3}, "pages[0, 0, 0] = 3, but page_table.size(1) = 3"),
    ({"pages": PAGES.repeat(1, 1, 2)}, "pages lists 4 pages of a head, but the cache holds 2 slots for them"),
    ({"host": U2.int()}, "host must be uint8, got int32"),
    ({"host": U2[..., :64]}, "host must be [num_pages, Hkv, page_bytes], got [5, 2, 64]; cache is [8, 2, 2176]"),
    ({"host": gaps(U2)}, "host must be contiguous in its last dim"),
    ({"host": torch.zeros(5 * 2 * 2176 + 8, dtype=torch.uint8)[8:].view(5, 2, 2176)}, "host: every record must begin at a multiple of 16 bytes"),
    ({"cache": STATE.cache[:7]}, "cache must have B * slots = 4 * 2 pages, got 7"),
    ({"cache": STATE.cache[:1].expand(8, 2, 2176)}, "cache is written, so its elements must not share memory"),
    ({"offloaded": STATE._replace(pool=8)}, "pool must be 0 to 7, got 8"),
    ({"slot_of": STATE.slot_of.long()}, "slot_of must be int32, got int64"),
    ({"slot_of": STATE.slot_of + 1}, "slot_of[0, 0, 0] = 0, but page_of says otherwise, or there is no such slot"),
    ({"page_of": STATE.page_of[:3]}, "page_of must be [B, Hkv, slots], got [3, 2, 2]; B = 4 from"),
    ({"page_of": STATE.page_of + 2}, "page_of[0, 0, 0] = 1, but slot_of says otherwise, or there is no such page"),
    ({"hand": STATE.hand + 2}, "hand[0, 0] = 2, but there are 2 slots"),
    ({"hand": STATE.hand[:, :1]}, "hand must be [B, Hkv], got [4, 1]; Hkv = 2 from cache.size(1)"),
]  # fmt: skip


def delta(**change: Any) -> Args:
    """B 1, T 20 of two sequences, H 2, HV 4, K 32, V 48."""
    return {
        "q": torch.zeros(1, 20, 2, 32), "k": torch.zeros(1, 20, 2, 32), "v": torch.zeros(1, 20, 4, 48),
        "beta": torch.zeros(1, 20, 4), "g": torch.zeros(1, 20, 4, 32).half(), "erase": torch.zeros(1, 20, 4, 32),
        "write": torch.zeros(1, 20, 4, 48).bfloat16(), "initial_state": torch.zeros(2, 4, 32, 48),
        "cu_seqlens": torch.tensor([0, 5, 20]), "chunk_size": 16, "checkpoint_every": 16, **change,
    }  # fmt: skip


def of_step(tensors: Args) -> list[tuple[Args, str]]:
    """Rows that delta_rule and delta_rule_step share, over tensors of one's good call."""
    q, k, v, beta, g, erase, write = (tensors[n] for n in ("q", "k", "v", "beta", "g", "erase", "write"))
    t = "T, " if q.dim() == 4 and q.shape[1] == 20 else ""
    return [
        ({"q": q.double()}, "q must be float32 or bfloat16 or float16, got float64"),
        ({"q": meta(q)}, "k is on cpu, but q is on meta"),
        ({"q": q[..., :16]}, f"k must be [B, {t}H, K], got "),
        ({"q": gaps(q)}, "q must be contiguous in its last dim"),
        ({"k": k.half()}, "k must be float32 like q, got float16"),
        ({"k": k[..., :1, :]}, f"k must be [B, {t}H, K], got "),
        ({"v": v.half()}, "v must be float32 like q, got float16"),
        ({"v": v[..., :3, :]}, "the 3 heads of v must be a multiple of the 2 heads of k"),
        ({"v": v[..., :0]}, "V must be 1 to 256, got 0 from v.size("),
        ({"v": v.repeat_interleave(6, -1)}, "V must be 1 to 256, got 288 from v.size("),
        ({"q": q.repeat_interleave(9, -1), "k": k.repeat_interleave(9, -1)}, "K must be 1 to 256, got 288 from k.size("),
        ({"beta": beta.int()}, "beta must be float32 or bfloat16 or float16, got int32"),
        ({"beta": beta[..., :2]}, f"beta must be [B, {t}HV], got "),
        ({"g": g[..., :2, :]}, f"g must be [B, {t}HV, K], got "),
        ({"g": g[..., 0][..., :3]}, f"g must be [B, {t}HV], got "),
        ({"g": g[..., 0, 0]}, "g must have a gate per head, "),
        ({"g": meta(g)}, "g is on meta, but q is on cpu"),
        ({"erase": write}, f"erase must be [B, {t}HV, K], got "),
        ({"erase": gaps(erase)}, "erase must be contiguous in its last dim"),
        ({"write": erase}, f"write must be [B, {t}HV, V], got "),
        ({"scale": float("nan")}, "scale is NaN"),
        ({"beta_rule": "cubic"}, "beta_rule must be one of raw, sigmoid, sigmoid2, kaczmarz; got 'cubic'"),
    ]  # fmt: skip


CU = delta()["cu_seqlens"]
DELTA: list[tuple[Args, str]] = [
    *of_step(delta()),
    ({"q": delta()["q"][0]}, "q must be [B, T, H, K], got [20, 2, 32]"),
    ({"k": delta()["k"][:, :19]}, "k must be [B, T, H, K], got [1, 19, 2, 32]; T = 20 from q.size(1)"),
    ({"v": delta()["v"].repeat(2, 1, 1, 1)}, "v must be [B, T, HV, V], got [2, 20, 4, 48]; B = 1 from q.size(0)"),
    ({"initial_state": torch.zeros(2, 4, 32, 48).half()}, "initial_state must be float32, got float16"),
    ({"initial_state": torch.zeros(3, 4, 32, 48)}, "initial_state must be [N, HV, K, V], got [3, 4, 32, 48]; N = 2 from cu_seqlens.size(0) - 1"),
    ({"initial_state": torch.zeros(2, 4, 32, 48), "cu_seqlens": None}, "initial_state must be [N, HV, K, V], got [2, 4, 32, 48]; N = 1 from k.size(0)"),
    ({"initial_state": torch.zeros(2, 4, 48, 32).mT}, "initial_state must be contiguous in its last dim"),
    ({"initial_state": torch.zeros(2, 5, 32, 48)[:, :4]}, "initial_state must be contiguous, got strides"),
    ({"cu_seqlens": CU.float()}, "cu_seqlens must be int32 or int64, got float32"),
    ({"cu_seqlens": CU[None]}, "cu_seqlens must be [N+1], got [1, 3]"),
    ({"cu_seqlens": CU[:1]}, "cu_seqlens must be [N + 1] with N at least 1, got [1]"),
    ({"cu_seqlens": CU + 1}, "cu_seqlens[0] = 1, but the first sequence begins at 0"),
    ({"cu_seqlens": CU * torch.tensor([1, 5, 1])}, "cu_seqlens[2] = 20 is less than cu_seqlens[1] = 25"),
    ({"cu_seqlens": CU * 2}, "cu_seqlens[2] = 40, but there are T = 20 tokens, from k.size(1)"),
    ({"cu_seqlens": CU + torch.tensor([0, 1 << 32, 1 << 32])}, "cu_seqlens[2] = 2147483647, but there are T = 20 tokens"),
    ({n: x.expand(2, *x.shape[1:]) for n, x in delta().items() if isinstance(x, Tensor) and len(x) == 1}, "cu_seqlens divides the tokens of one row, so B must be 1, got 2 from k.size(0)"),
    ({"chunk_size": 17}, "chunk_size must be 16, 32 or 64, got 17"),
    ({"chunk_size": 0}, "chunk_size must be 16, 32 or 64, got 0"),
    ({"checkpoint_every": 24}, "checkpoint_every must be a multiple of 16, a chunk; got 24"),
    ({"checkpoint_every": 16, "chunk_size": 32}, "checkpoint_every must be a multiple of 32, a chunk; got 16"),
    ({"checkpoint_every": 8, "chunk_size": None}, "checkpoint_every must be a multiple of 16, a chunk; got 8"),
    ({"checkpoint_every": -16}, "checkpoint_every must not be negative, got -16"),
    ({"mode": "fast"}, "mode must be one of chunk, recurrent; got 'fast'"),
]  # fmt: skip


def delta_step(**change: Any) -> Args:
    """B 3, T 2, six slots: each sequence with one to read and two to write, of which one is the one it reads."""
    return {
        "q": torch.zeros(3, 2, 2, 32), "k": torch.zeros(3, 2, 2, 32), "v": torch.zeros(3, 2, 4, 48),
        "beta": torch.zeros(3, 2, 4), "g": torch.zeros(3, 2, 4, 32), "erase": torch.zeros(3, 2, 4, 32),
        "write": torch.zeros(3, 2, 4, 48), "state": torch.zeros(6, 4, 32, 48),
        "slots": torch.tensor([0, 1, 2], dtype=torch.int32),
        "out_slots": torch.tensor([[3, 0], [4, 1], [5, 2]], dtype=torch.int32),
        "parents": torch.tensor([[-1, 0], [-1, -1], [-1, 0]], dtype=torch.int32),
        "gate": delta_gate(), "out": torch.zeros(3, 2, 4, 48), **change,
    }  # fmt: skip


def delta_gate(**change: Any) -> tuple[Any, ...]:
    good = {"A_log": torch.zeros(4), "dt_bias": torch.zeros(4, 32), "lower_bound": -5.0}
    return tuple({**good, **change}.values())


def numbers(*x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.int32)


DELTA_STEP: list[tuple[Args, str]] = [
    *((change, message.replace("[B, H", "[B, T, H")) for change, message in of_step(delta_step())),
    ({"q": torch.zeros(2, 32)}, "q must be [B, H, K] or [B, T, H, K], got [2, 32]"),
    ({"k": torch.zeros(3, 2, 32)}, "k must be [B, T, H, K], got [3, 2, 32]"),
    ({"state": torch.zeros(6, 4, 32, 48).half()}, "state must be float32 or bfloat16, got float16"),
    ({"state": torch.zeros(6, 4, 48, 32)}, "state must be [num_slots, HV, K, V], got [6, 4, 48, 32]; K = 32 from"),
    ({"state": torch.zeros(6, 4, 33, 48)[:, :, 1:]}, "state must be contiguous within a slot, got strides"),
    ({"state": torch.zeros(1, 4, 32, 48).expand(6, 4, 32, 48)}, "state is written, so its elements must not share memory"),
    ({"state": torch.zeros(6, 4, 32, 48).requires_grad_()}, "state requires grad, but the op has no backward"),
    ({"k": torch.zeros(3, 2, 2, 32).requires_grad_()}, "k requires grad, but the op has no backward"),
    ({"slots": numbers(0, 1, 2).long()}, "slots must be int32, got int64"),
    ({"slots": numbers(0, 1)}, "slots must be [B], got [2]; B = 3 from q.size(0)"),
    ({"slots": numbers(0, 1, 6)}, "slots[2] = 6, but slots are 0 to 5, or -1"),
    ({"slots": numbers(0, -2, 2)}, "slots[1] = -2, but slots are 0 to 5, or -1"),
    ({"slots": numbers(0, 1, 4)}, "out_slots[1, 0] and slots[2] are both slot 4, but a slot that is written belongs to one sequence"),
    ({"slots": numbers(3, 3, 0), "out_slots": numbers(3, 4, 5), "parents": None}, "out_slots[0] and slots[1] are both slot 3, but a slot that is written belongs to one sequence"),
    ({"slots": numbers(0, 2, 2), "out_slots": None, "parents": None}, "slots[1] and slots[2] are both slot 2, but a slot that is written belongs to one sequence"),
    ({"out_slots": numbers([3, 0], [4, 1], [5, 2]).long()}, "out_slots must be int32, got int64"),
    ({"out_slots": numbers([3, 0], [4, 1])}, "out_slots must be [B, T], got [2, 2]; B = 3 from q.size(0)"),
    ({"out_slots": numbers(3, 4), "parents": None}, "out_slots must be [B], got [2]"),
    ({"out_slots": numbers([3, 0], [4, 1], [6, 2])}, "out_slots[2, 0] = 6, but slots are 0 to 5, or -1"),
    ({"out_slots": numbers([3, 0], [4, 1], [4, 2])}, "out_slots[1, 0] and out_slots[2, 0] are both slot 4"),
    ({"parents": numbers(-1, -1, -1)}, "parents must be [B, T], got [3]"),
    ({"out_slots": numbers(3, 4, 5)}, "parents needs out_slots [B, T], where the state after each token goes"),
    ({"parents": numbers([-1, 0], [-1, 1], [-1, 0])}, "parents[1, 1] = 1, but it must be -1 to 0"),
    ({"parents": numbers([-2, 0], [-1, 0], [-1, 0])}, "parents[0, 0] = -2, but it must be -1 to -1"),
    ({"out_slots": numbers([3, 0], [1, 4], [5, 2])}, "parents[1, 1] = -1, but out_slots[1, 0] has replaced that state"),
    ({"gate": delta_gate()[:2]}, "gate must be (A_log, dt_bias or None, lower_bound or 0.0)"),
    ({"gate": delta_gate(A_log=torch.zeros(4).half())}, "gate A_log must be float32, got float16"),
    ({"gate": delta_gate(A_log=torch.zeros(3))}, "gate A_log must be [HV], got [3]; HV = 4 from v.size(2)"),
    ({"gate": delta_gate(dt_bias=torch.zeros(4))}, "gate dt_bias must be [HV, K], got [4]"),
    ({"gate": delta_gate(lower_bound=1.0)}, "gate lower_bound must be negative, or 0 for none; got 1"),
    ({"g": None}, "gate was given, but g, which it makes a gate of, was not"),
    ({"out": torch.zeros(3, 2, 4, 48).half()}, "out must be float32 like q, got float16"),
    ({"out": torch.zeros(3, 4, 48)}, "out must be [B, T, HV, V], got [3, 4, 48]"),
    ({"out": torch.zeros(3, 3, 4, 48)[:, 1:]}, "out must be contiguous, got strides"),
]  # fmt: skip
TRIL: list[tuple[Args, str]] = [
    ({"A": torch.zeros(2, 16, 16).double()}, "A must be float32 or bfloat16 or float16, got float64"),
    ({"A": torch.zeros(16)}, "A must be [..., n, n], got [16]"),
    ({"A": torch.zeros(2, 16, 17)}, "A must be [..., n, n], got [2, 16, 17]"),
    ({"A": torch.zeros(2, 129, 129)}, "n must be 1 to 128, got 129 from A.size(2)"),
    ({"A": torch.zeros(2, 0, 0)}, "n must be 1 to 128, got 0 from A.size(2)"),
    ({"method": "neumann"}, "method must be one of substitution, blocked, blocked_tf32, blocked_bf16x3; got 'neumann'"),
]  # fmt: skip

X = torch.zeros(3, 64)
FWHT: list[tuple[Args, str]] = [
    ({"x": X.int()}, "x must be float32 or bfloat16 or float16 or float64, got int32"),
    ({"x": torch.tensor(1.0)}, "x must have at least one dim, got a scalar"),
    ({"x": X[:, :36]}, "the last dim of x must be m * 2^k with m one of 1, 12, 20, 28; got [3, 36]"),
    ({"x": X[:, :6]}, "the last dim of x must be m * 2^k with m one of 1, 12, 20, 28; got [3, 6]"),
    ({"x": X[:, :0]}, "the last dim of x must be m * 2^k with m one of 1, 12, 20, 28; got [3, 0]"),
    ({"x": gaps(X)}, "x must be contiguous in its last dim, got strides [128, 2]"),
]

# What only the CUDA kernels refuse.
WIDE_K, WIDE_V = (torch.zeros(3, 2, 32, 132, dtype=x.dtype)[..., :128] for x in (K, V))  # rows 264 bytes apart
CACHE_132 = torch.zeros(5, 32, 2, 132, dtype=torch.bfloat16)[..., :128]
ODD = torch.zeros(5 * 2 * 2176 + 8, dtype=torch.uint8)[8:].view(5, 2, 2176)  # begins at 16 n + 8
ON_CUDA: list[tuple[str, Callable[..., Args], Args, str]] = [
    ("quant_attention", attention, {"q": Q.float()}, "q must be float16 or bfloat16 on CUDA, got float32"),
    ("quant_attention", attention, {"q": Q.half()}, "q is float16, but pool 1 holds bf16, whose numbers may not fit float16; on CUDA use bfloat16 queries"),
    ("quant_attention", attention, {"kv": pools(k=WIDE_K)}, "pool 2, keys: on CUDA the address and all strides must be multiples of 16 bytes"),
    ("quant_attention", attention, {"kv": pools(u2=ODD)}, "pool 0, keys: on CUDA the address and all strides must be multiples of 16 bytes; got an address of 16 n + 8"),
    ("flash_decode", decode, {"q": Q.float()}, "q must be float16 or bfloat16 on CUDA, got float32"),
    ("flash_decode", decode, {"q": Q.half()}, "q is float16, but a cache holds bf16, whose numbers may not fit float16; on CUDA use bfloat16 queries"),
    ("flash_decode", decode, {"v_cache": CACHE_132}, "v_cache: on CUDA the address and all strides must be multiples of 16 bytes"),
    ("write_kv", write, {"pool": 2, "kv": pools(v=WIDE_V)}, "pool, values: on CUDA the address and all strides must be multiples of 16 bytes"),
    ("read_kv", read, {"kv": pools(u2=ODD)}, "pool, keys: on CUDA the address and all strides must be multiples of 16 bytes; got an address of 16 n + 8"),
    ("pack_pages", pack, {"kv": pools(u2=ODD)}, "dst, keys: on CUDA the address and all strides must be multiples of 16 bytes; got an address of 16 n + 8"),
    ("fwht", lambda **x: x, {"x": torch.zeros(1, 1 << 17)}, "on CUDA a row must fit in shared memory: n = 131072 takes 524288 bytes"),
]  # fmt: skip

TABLES: list[tuple[str, Callable[..., Args], list[tuple[Args, str]]]] = [
    ("quant_attention", attention, ATTENTION),
    ("flash_decode", decode, DECODE),
    ("plan_prefix", lambda **x: {"page_table": TABLE, "seq_lens": LENS, "page_size": 32, **x}, PLAN_PREFIX),
    ("plan_decode", lambda **x: {"seq_lens": LENS, **x}, PLAN_DECODE),
    ("write_kv", write, WRITE),
    ("read_kv", read, READ),
    ("pack_pages", pack, PACK),
    ("merge_states", merge, MERGE),
    ("fwht", lambda **change: {"x": X, **change}, FWHT),
    ("sparse_attention", sparse, SPARSE),
    ("page_summaries", summarise, SUMMARISE),
    ("score_pages", scoring, SCORE_PAGES),
    ("score_tokens", lambda **x: scoring(**{"source": LABELS, **x}), SCORE_TOKENS),
    ("select_pages", select, SELECT),
    ("select_tokens", select_tokens, SELECT_TOKENS),
    ("gather_pages", gather, GATHER),
    ("delta_rule", delta, DELTA),
    ("delta_rule_step", delta_step, DELTA_STEP),
    ("tril_inverse", lambda **x: {"A": torch.zeros(2, 16, 16), "method": "blocked", **x}, TRIL),
]
# What stands in GPU memory is not looked at on the host.
SEEN_ON_THE_HOST = re.compile(
    r"(page_table|block_table|seq_lens|slots|pairs|tree_mask|head_windows|plan\.\w+|pages|tokens|entries|channels|segments|order|"
    r"start|slot_of|page_of|hand|cu_seqlens|out_slots|parents)\[.+\] |(page_table|block_table|scores) is too narrow"
)
ROWS = [
    (op, good, change, message.replace("on cpu", f"on {DEVICE}"))
    for op, good, rows in TABLES
    for change, message in rows
    if not (GPU and SEEN_ON_THE_HOST.match(message))
]


@pytest.mark.parametrize(("op", "good", "rows"), TABLES, ids=[t[0] for t in TABLES])
def test_the_good_call_is_good(op: str, good: Callable[..., Args], rows: list[tuple[Args, str]]) -> None:
    getattr(kk, op)(**good())
    named = {name for change, _ in rows for name in change}
    assert set(good()) <= named, "an argument without a wrong value"


@pytest.mark.parametrize(
    ("op", "good", "change", "message"), ROWS, ids=[f"{r[0]}-{'+'.join(r[2])}-{r[3][:40]}" for r in ROWS]
)
def test_refused(op: str, good: Callable[..., Args], change: Args, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        getattr(kk, op)(**good(**change))
    # A PagedKV refuses on its own behalf what no op can make sense of.
    assert str(caught.value).startswith((f"{op}: ", "a pool of"))


@pytest.mark.skipif(CPU, reason="about the CUDA kernels")
@pytest.mark.parametrize(
    ("op", "good", "change", "message"), ON_CUDA, ids=[f"{r[0]}-{'+'.join(r[2])}-{r[3][:40]}" for r in ON_CUDA]
)
def test_refused_on_cuda(op: str, good: Callable[..., Args], change: Args, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{op}: {message}")):
        getattr(kk, op)(**good(**change))


@pytest.mark.skipif(CPU, reason="about the CUDA kernels")
def test_small_pages_of_two_formats_are_refused_on_cuda() -> None:
    kv = kk.PagedKV.empty(["bf16", "f16"], 40, 2, 128, 5)
    args = attention(kv=kv, page_table=torch.zeros(4, 20, dtype=torch.int32))
    with pytest.raises(ValueError, match="quant_attention: page_size 5 is not a multiple of 16, so on CUDA all pools"):
        kk.quant_attention(**args)
    kk.quant_attention(**{**args, "kv": kv._replace(pools=kv.pools[:1], formats=kv.formats[:1])})


def test_unknown_formats_list_the_known() -> None:
    for make in (
        lambda: kk.format("int9"),
        lambda: kk.format("u2", "int9"),
        lambda: kk.PagedKV.empty("int9", 1, 1, 64, 16),
    ):
        with pytest.raises(ValueError, match=r'unknown format "int9"; known formats: bf16, f16, u8, u4, u3, u2, kivi2'):
            make()
    listed = "there are: " + " ".join(f"{name}={codec.NUMBER}" for name, codec in CODECS.items())
    with pytest.raises(BELOW, match=f"unknown KV format number 99; {re.escape(listed)}"):
        torch.ops.kvkernels.page_bytes(99, 0, 16, 64)
    with pytest.raises(BELOW, match=r"format code 262144 is not k \| v << 8 \| two_caches << 16 \| offloaded << 17"):
        read_op(format=1 << 18)


def test_head_dims_are_those_of_python() -> None:
    for name, dims in (("bf16", HEAD_DIMS), ("u2", PACKED_HEAD_DIMS)):
        number = CODECS[name].NUMBER
        listed = ", ".join(map(str, dims))
        with pytest.raises(BELOW, match=f"head_dim must be one of {listed}[,;]"):
            torch.ops.kvkernels.page_bytes(number, number, 16, 72)


@pytest.mark.skipif(not CPU, reason="other backends are given copies")
def test_a_page_that_is_read_and_written_is_refused() -> None:
    message = "pairs[0, 0] and pairs[1, 1] are both page 0 of dst, but a page that is written belongs to one pair"
    with pytest.raises(ValueError, match=re.escape(message)):
        kk.pack_pages(**pack(src=0))


@pytest.mark.skipif(not CPU, reason="other backends are given copies")
def test_tokens_of_a_page_that_is_written_are_refused() -> None:
    """Moving tokens within a cache: from other pages it works."""
    k, v = torch.randn(2, 3, 32, 2, 128).bfloat16()
    kv = kk.PagedKV.from_caches(k, v)
    with pytest.raises(ValueError, match=re.escape("write_kv: v shares memory with page 1 of v_cache of pool, which "
                                                   "slots[1] = 40 writes; pass v.clone()")):  # fmt: skip
        kk.write_kv(k[0, :2], v[1, :2], kv, 0, torch.tensor([-1, 40]))
    with pytest.raises(ValueError, match=re.escape("write_kv: k shares memory with page 1 of k_cache of pool")):
        kk.write_kv(k[0:2].flatten(0, 1)[31:33], v[0, :2], kv, 0, torch.tensor([70, 32]))
    want = k[0, :2].clone(), v[2, 5:7].clone()
    kk.write_kv(k[0, :2], v[2, 5:7], kv, 0, torch.tensor([40, 41]))
    assert torch.equal(k[1, 8:10], want[0])
    assert torch.equal(v[1, 8:10], want[1])


# What an op without its wrapper raises: torch 2.15 makes a RuntimeError of std::invalid_argument.
BELOW = (ValueError, RuntimeError)


def read_op(**change: Any) -> None:
    """The op below the wrapper, which other callers may use."""
    args: Args = {
        "pool": U2, "pool_v": None, "format": kk.format("u2").code, "page_size": 32, "head_dim": 128, "slots": SLOTS,
        "centre": None, "balance": None, "order": None, "k": torch.zeros(7, 2, 128), "v": torch.zeros(7, 2, 128), **change,
    }  # fmt: skip
    torch.ops.kvkernels.read_kv.default(*args.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_v": U2}, "pool is one uint8 tensor of records, but a second cache was given"),
        ({"pool": K, "format": 1 << 16}, "pool is two 16-bit caches, but v_cache of pool was not given"),
        ({"k": torch.zeros(7, 2, 64)}, "k must be [T, Hkv, D], got [7, 2, 64]; D = 128 from head_dim"),
        ({"v": torch.zeros(7, 2, 128).half()}, "v must be float32 like k, got float16"),
        ({"k": torch.zeros(7, 4, 128)[:, :2]}, "k must be contiguous, got strides [512, 128, 1]"),
        ({"slots": None}, "slots must be a tensor, got None"),
        ({"pool": None}, "pool must be a tensor, got None"),
        ({"head_dim": 96}, "head_dim must be one of 64, 128, 256, because pool is u2/u2; got 96 from head_dim"),
    ],
)
def test_op_without_wrapper(change: Args, message: str) -> None:
    read_op()
    with pytest.raises(BELOW, match="read_kv: " + re.escape(message)):
        read_op(**change)


def test_grad_is_refused_in_grad_mode_only() -> None:
    q = torch.zeros(4, 6, 128, dtype=Q_DTYPE, requires_grad=True)
    with torch.no_grad():
        assert not kk.quant_attention(**attention(q=q)).requires_grad
    with torch.inference_mode():
        kk.quant_attention(**attention(q=q))


def test_pages_before_a_window_may_be_gone() -> None:
    """A page table of a sliding window has holes; only what a query may see is looked at."""
    table = TABLE.clone()
    table[3, 0] = -1
    kk.quant_attention(**attention(page_table=table, window=(40, 0)))
    if GPU:
        return
    with pytest.raises(ValueError, match=re.escape("page_table[3, 0] = -1")):
        kk.quant_attention(**attention(page_table=table, window=(64, 0)))


def test_a_missing_library_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvkernels import _library

    monkeypatch.setenv("KVKERNELS_LIBRARY", "nowhere.so")
    with pytest.raises(ImportError, match=r"KVKERNELS_LIBRARY=nowhere\.so: no such file"):
        _library._load()
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(ImportError, match=r"kvkernels needs torch >= 2\.10 \(its stable ABI\); found 2\.9\.1\+cu128"):
        _library._load()
