"""A model of transformers whose attention runs on a cache under test: our pages, their caches, or 16-bit rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import kvkernels as kk
from bench.recipes import Rope
from kvkernels.paged_kv import PAGE_MASK

QUERIES = 16  # the most that quant_attention takes of a sequence


class Cache(Protocol):
    """Of one layer and one sequence."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k, v [T, Hkv, D]; causal attention of q [T, Hq, D], whose last row is the last token."""


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention of q [T, Hq, D] to k, v [L, Hkv, D], aligned at the end."""
    tokens, length = len(q), len(k)
    seen = None if tokens == length else torch.ones(tokens, length, dtype=torch.bool).tril(length - tokens)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=True)
    return out[0].transpose(0, 1)


class Rows:
    """All keys and values in 16 bits. The queries are kept too, for calibration."""

    def __init__(self) -> None:
        self.q = self.k = self.v = torch.empty(0)

    def copy(self) -> Rows:
        other = Rows()
        other.q, other.k, other.v = self.q, self.k, self.v
        return other

    def turned_back(self, rope: Rope) -> Rows:
        """Queries and keys as they were before RoPE; the first token stands at position 0."""
        other = self.copy()
        other.q, other.k = (rope(x.float(), 0, True) for x in (self.q, self.k))
        return other

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.q, self.k, self.v = (
            torch.cat([old, new]) if len(old) else new for old, new in ((self.q, q), (self.k, k), (self.v, v))
        )
        return causal(q, self.k, self.v)


class Pages:
    """Packed pages: tokens enter through pack_pages, queries read them through quant_attention.

    The first `sinks` tokens and the last `recent` ones stay in 16 bits. Sinks have pages of their own, so that so few
    tokens need no whole page; merge_states joins the two results.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        fmt: str,
        page_size: int,
        sinks: int,
        recent: int,
        max_tokens: int,
        transform: kk.KVTransform | None = None,
    ) -> None:
        heads, head_dim = k.shape[1:]
        self.sinks = kk.KVCache(
            1, heads, head_dim, "bf16", page_size=sinks, sink_tokens=0, recent_tokens=0, max_tokens=sinks
        )
        self.rest = kk.KVCache(
            1,
            heads,
            head_dim,
            fmt,
            page_size=page_size,
            sink_tokens=0,
            recent_tokens=recent,
            max_tokens=max_tokens,
            dtype=torch.float16 if fmt == "f16" else torch.bfloat16,
            transform=transform,
        )
        self.sinks.append(k[None, :sinks], v[None, :sinks])
        self.rest.append(k[None, sinks:], v[None, sinks:])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.rest.append(k[None], v[None])
        return self._attend(q)

    def _attend(self, q: Tensor) -> Tensor:
        rows = q.float()  # so that the partial results are not rounded before they are merged
        return kk.merge_states(*zip(self._attend_sinks(rows), self._attend_rest(rows), strict=True))[0].to(q.dtype)

    @staticmethod
    def slots(cache: kk.KVCache, positions: Tensor) -> Tensor:
        """Of tokens of the first sequence, in the pools that hold them."""
        entries = cache.page_table[0, positions // cache.page_size].long()
        return (entries & PAGE_MASK) * cache.page_size + positions % cache.page_size

    def _attend_sinks(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Every query sees all of them, so that each is a sequence of its own."""
        table = self.sinks.page_table.expand(len(q), -1).contiguous()
        return kk.quant_attention(q, self.sinks.kv, table, self.sinks.seq_lens.repeat(len(q)), return_lse=True)

    def _attend_rest(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Runs of queries are sequences over the same pages that end at their last query."""
        run = max(n for n in range(1, QUERIES + 1) if len(q) % n == 0)
        runs = q.unflatten(0, (-1, run))
        lens = self.rest.seq_lens - torch.arange(len(runs) - 1, -1, -1, dtype=torch.int32) * run
        table = self.rest.page_table.expand(len(runs), -1).contiguous()
        out, lse = kk.quant_attention(runs, self.rest.kv, table, lens, return_lse=True)
        return out.flatten(0, 1), lse.flatten(0, 1)


class PagesRead(Pages):
    """The same pages, decoded by read_kv for torch's attention in 16 bits: a second way to the same numbers.

    With `rope`, pages hold the keys as they are before it, and it is applied to what was read.
    """

    def __init__(self, k: Tensor, v: Tensor, *args: Any, rope: Rope | None = None) -> None:
        self.rope = rope
        super().__init__(k if rope is None else rope(k.float(), 0, True), v, *args)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.rope:
            k = self.rope(k.float(), int(self.sinks.seq_lens + self.rest.seq_lens), True)
        self.rest.append(k[None], v[None])
        k, v = (torch.cat(side, 1)[0] for side in zip(self.sinks.read(), self.rest.read(), strict=True))
        return causal(q, (self.rope(k, 0, False) if self.rope else k).to(q.dtype), v.to(q.dtype))


Recode = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Recoded(Pages):
    """A format without kernels: 16-bit pages of numbers that `recode` has coded and decoded.

    recode takes k, v float32 [T, Hkv, D] of whole pages and the position of the first, and returns what a reader of the
    format would see. Windows are as in Pages.
    """

    def __init__(
        self, k: Tensor, v: Tensor, recode: Recode, page_size: int, sinks: int, recent: int, max_tokens: int
    ) -> None:
        super().__init__(k, v, "bf16", page_size, sinks, recent, max_tokens)
        self.recode, self.recent = recode, recent
        self.done, self.raw = 0, (k[sinks:], v[sinks:])  # tokens recoded, and those that are still to be
        self._leave_window()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.raw = torch.cat([self.raw[0], k]), torch.cat([self.raw[1], v])
        self.rest.append(k[None], v[None])
        self._leave_window()
        return self._attend(q)

    def _leave_window(self) -> None:
        size = self.rest.page_size
        count = (len(self.raw[0]) - self.recent) // size * size
        if count <= 0:
            return
        position = self.done + int(self.sinks.seq_lens)
        k, v = self.recode(self.raw[0][:count].float(), self.raw[1][:count].float(), position)
        kk.write_kv(k, v, self.rest.kv, 0, self.slots(self.rest, torch.arange(self.done, self.done + count)))
        self.done, self.raw = self.done + count, (self.raw[0][count:], self.raw[1][count:])


# of transformers' caches: their layer's name and the package it needs
BACKENDS = {"quanto": ("Quanto", "optimum.quanto"), "hqq": ("HQQ", "hqq")}


class Transformers:
    """A quantised cache of transformers: backend "quanto" or "hqq", its own 16-bit window.

    The first `sinks` tokens are kept out of it in 16 bits, as in Pages, which is more than transformers does.
    """

    def __init__(self, k: Tensor, v: Tensor, backend: str, bits: int, axis: int, sinks: int, recent: int) -> None:
        name, needs = BACKENDS[backend]
        importlib.import_module(needs)
        from transformers import cache_utils

        self.layer = getattr(cache_utils, f"{name}QuantizedLayer")(
            nbits=bits, axis_key=axis, axis_value=axis, q_group_size=64, residual_length=recent
        )
        self.sinks = k[:sinks], v[:sinks]
        self._update(k[sinks:], v[sinks:])
        stored = self.layer._quantized_keys, self.layer._quantized_values
        self.bits = 8 * nbytes(stored) / (2 * k[sinks:].numel())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = zip(self.sinks, self._update(k, v), strict=True)
        return causal(q, *(torch.cat(side) for side in rows))

    def _update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.layer.update(*(x.transpose(0, 1)[None] for x in (k, v)))
        return k[0].transpose(0, 1), v[0].transpose(0, 1)


def nbytes(stored: Any) -> int:
    """Of all tensors in nested lists and dicts, and inside tensor subclasses."""
    if isinstance(stored, Tensor) and hasattr(stored, "__tensor_flatten__"):
        return sum(nbytes(getattr(stored, name)) for name in stored.__tensor_flatten__()[0])
    if isinstance(stored, Tensor):
        return stored.nbytes
    if isinstance(stored, dict):
        stored = list(stored.values())
    return sum(map(nbytes, stored)) if isinstance(stored, (list, tuple)) else 0


class Model:
    """Runs tokens through the model; layer i attends through caches[i]."""

    NAME = "kvkernels_bench"

    def __init__(self, model: Any) -> None:
        from transformers import AttentionInterface

        config = model.config
        self.model, self.caches = model, list[Cache]()
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        AttentionInterface.register(self.NAME, self._attention)
        model.set_attn_implementation(self.NAME)

    def _attention(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, None]:
        tokens_first = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        return self.caches[module.layer_idx].attend(*tokens_first)[None], None

    def rope(self, x: Tensor, start: int, inverse: bool) -> Tensor:
        """x [T, H, D] of tokens from position `start` on, rotated by their positions, or back."""
        cos, sin = self.model.model.rotary_emb(x, torch.arange(start, start + len(x))[None])
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * cos[0, :, None] + turned * sin[0, :, None] * (-1 if inverse else 1)

    @contextmanager
    def using(self, caches: Sequence[Cache]) -> Iterator[None]:
        self.caches = list(caches)
        try:
            yield
        finally:
            self.caches = []

    def forward(self, ids: Tensor, start: int) -> Tensor:
        """Logits [T, vocabulary] of the tokens ids [T], which stand at positions start, start + 1, ..."""
        positions = torch.arange(start, start + len(ids))[None]
        hidden = self.model.model(ids[None], position_ids=positions, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden[0])

    def prefill(self, ids: Tensor) -> tuple[list[Rows], Tensor]:
        """16-bit caches that hold the tokens, and the logits of the last of them."""
        rows = [Rows() for _ in range(self.layers)]
        positions = torch.arange(len(ids))[None]
        with self.using(rows):
            hidden = self.model.model(ids[None], position_ids=positions, use_cache=False).last_hidden_state
        return rows, self.model.lm_head(hidden[0, -1])
