"""A growing cache of one layer: attention sinks and the recent window in 16 bits, everything between them packed."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvkernels.formats import Format
from kvkernels.formats import format as parse_format
from kvkernels.ops.pack_pages import pack_pages
from kvkernels.ops.quant_attention import quant_attention
from kvkernels.ops.read_kv import read_kv
from kvkernels.ops.write_kv import write_kv
from kvkernels.paged_kv import FORMAT_OF_DTYPE, KVTransform, PagedKV, check_transform, zero_pool
from kvkernels.paging import PACKED, WINDOW, Append, Pages, Paging, lasting


class LayerPages:
    """Keys and values of one layer, in the pages that a `Paging` hands out.

    dtype of the 16-bit pages; keys and values are rounded to it before anything else
    """

    @lasting()
    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        format: Format,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
        transform: KVTransform | None = None,
    ):
        window = parse_format(FORMAT_OF_DTYPE[dtype])
        formats = (window,) if format == window else (window, format)
        for fmt in formats:
            fmt.check(page_size, head_dim)
        check_transform(transform, num_kv_heads, head_dim, device)
        self.dtype = dtype
        pools = tuple(zero_pool((0, num_kv_heads, fmt.page_bytes(page_size, head_dim)), device) for fmt in formats)
        self.kv = PagedKV(pools, formats, page_size, transform)
        self._num_pages = (0,) * len(pools)

    @property
    def packs(self) -> bool:
        """Whether there is a packed pool beside the window."""
        return len(self.kv.formats) == 2

    def nbytes(self, pools: Sequence[Pages]) -> int:
        """Bytes of the pages in use."""
        return sum(p.used * data.shape[1] * data.shape[2] for p, data in zip(pools, self._data))

    def append(self, k: Tensor, v: Tensor, step: Append) -> None:
        """What `step` asks for; k, v [B, T, Hkv, D] are the new tokens."""
        # What may run out of memory comes before the first write: a step that fails has changed no page in use.
        self.reserve(step.num_pages)
        if k.dtype != self.dtype or v.dtype != self.dtype:
            k, v = k.to(self.dtype), v.to(self.dtype)
        if k.stride(-1) != 1 or v.stride(-1) != 1:
            k, v = k.contiguous(), v.contiguous()
        new: Sequence[Tensor] = ()
        if step.slots is not None:
            new = [x.flatten(0, 1) if step.tokens is None else x[step.tokens] for x in (k, v)]
        shared = None if step.copied is None else self._data[WINDOW][step.copied[0]]
        if step.leaving is not None:
            pack_pages(self.kv, WINDOW, PACKED, step.leaving)
        for row, tokens, pairs in step.whole:
            pages = (len(pairs), self.kv.page_size)
            prompt = PagedKV.from_caches(*(x[row, tokens].unflatten(0, pages) for x in (k, v)))
            kv = self.kv._replace(pools=(*prompt.pools, self.kv.pools[PACKED]))
            pack_pages(kv, WINDOW, PACKED, pairs)
        if shared is not None:
            assert step.copied is not None
            self._data[WINDOW][step.copied[1]] = shared
        if step.slots is not None:
            write_kv(new[0], new[1], self.kv, WINDOW, step.slots)
        if step.left is not None:
            pack_pages(self.kv, WINDOW, PACKED, step.left)

    def unpack(self, num_pages: tuple[int, ...], pairs: Tensor | None) -> None:
        """What `Paging.crop` asks for."""
        self.reserve(num_pages)
        if pairs is not None:
            pack_pages(self.kv, PACKED, WINDOW, pairs)

    def read(self, slots: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, Hkv, D] at `Paging.slots`; zero where nothing is."""
        k, v = read_kv(self.kv, WINDOW, slots[WINDOW].flatten(), dtype)
        for pool in range(1, len(self.kv.pools)):
            there = (slots[pool].flatten() >= 0).nonzero().flatten()
            if len(there):
                k[there], v[there] = read_kv(self.kv, pool, slots[pool].flatten()[there], dtype)
        shape = slots[WINDOW].shape
        return k.unflatten(0, shape), v.unflatten(0, shape)

    def reserve(self, num_pages: tuple[int, ...]) -> None:
        """Have so many pages in each pool, at least."""
        if num_pages != self._num_pages:
            self._grow(num_pages)
            self._num_pages = num_pages

    @property
    def _data(self) -> tuple[Tensor, ...]:
        return self.kv.pools  # type: ignore[return-value]  # records, not pairs of caches

    @lasting()
    def _grow(self, num_pages: Sequence[int]) -> None:
        pools = []
        for data, n in zip(self._data, num_pages):
            grown = data
            if n > len(data):
                grown = zero_pool((n, *data.shape[1:]), data.device)
                grown[: len(data)] = data
            pools.append(grown)
        self.kv = self.kv._replace(pools=tuple(pools))


class KVCache:
    """Keys and values of one layer for a batch of sequences, packed as they age.

    A sequence is a list of pages. Its first `sink_tokens` and last `recent_tokens` tokens, rounded up to whole pages,
    stay in 16 bits. A page is re-encoded in `format` when it is full and all its tokens have left the recent window;
    its 16-bit page is then used again. Any format serves, those that code a page at once too.

    batch, num_kv_heads, head_dim: of the keys and values
    format:        of the middle: a name, a pair like "u3/u2", or a Format; "bf16" with dtype bfloat16 packs nothing.
                   With a transform `preset(bits)`, without one "u4": keys in fewer bits want their basis
    page_size:     tokens per page
    sink_tokens, recent_tokens: at least 0. Centred keys need their sinks in 16 bits, see `calibrate_keys`
    max_tokens:    longest sequence. If given, all memory for `batch` of them is taken now; if None, it grows on demand
    dtype:         of the 16-bit pages, bfloat16 or float16. Keys and values are rounded to it before anything else, so
                   the stored bytes do not depend on how a text was cut into calls of append
    transform:     from `calibrate_keys`; None for centre 0, balance 1

    Pages are handed out on the host. Raises ValueError for sizes the format cannot have, as PagedKV.empty does.
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        format: str | Format,
        *,
        page_size: int = 64,
        sink_tokens: int = 64,
        recent_tokens: int = 256,
        max_tokens: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        transform: KVTransform | None = None,
    ):
        if dtype not in FORMAT_OF_DTYPE:
            raise TypeError(f"KVCache: dtype must be bfloat16 or float16; got {dtype}")
        longest = 0 if max_tokens is None else max_tokens
        for name, value, least in (
            ("batch", batch, 1),
            ("num_kv_heads", num_kv_heads, 1),
            ("sink_tokens", sink_tokens, 0),
            ("recent_tokens", recent_tokens, 0),
            ("max_tokens", longest, 0 if max_tokens is None else 1),
        ):
            if value < least:
                raise ValueError(f"KVCache: {name} must be at least {least}; got {value}")
        self.format = parse_format(format)
        self.num_kv_heads, self.head_dim, self.page_size = num_kv_heads, head_dim, page_size
        self.sink_tokens, self.recent_tokens, self.max_tokens = sink_tokens, recent_tokens, max_tokens
        self.dtype, self.transform = dtype, transform
        self._memory = LayerPages(num_kv_heads, head_dim, self.format, page_size, dtype, device, transform)
        self._paging = Paging(
            batch, page_size, sink_tokens, recent_tokens, packs=self._memory.packs, max_tokens=longest, device=device
        )
        self._memory.reserve(self._paging.num_pages)

    @property
    def kv(self) -> PagedKV:
        """The pools: 16-bit pages, then packed ones. Where they grow on demand, good until the next append."""
        return self._memory.kv

    @property
    def page_table(self) -> Tensor:
        """int32 [B, max_pages]; what stands past the end of a sequence means nothing."""
        return self._paging.page_table

    @property
    def seq_lens(self) -> Tensor:
        """int32 [B], in tokens."""
        return self._paging.seq_lens

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use, a page that sequences share counted once."""
        return self._memory.nbytes(self._paging.pools)

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of all pages, free ones too."""
        return self._memory.kv.nbytes

    @property
    def bits_per_element(self) -> float:
        """Bits in use per number cached, at the current lengths: windows, scales, padding, unfilled places counted."""
        numbers = 2 * self.num_kv_heads * self.head_dim * sum(self._paging.lens)
        return self.nbytes * 8 / numbers if numbers else float("nan")

    def attend(self, q: Tensor, **options: Any) -> Any:
        """`quant_attention` over all that was appended; q [B, Hq, D] or [B, Tq, Hq, D], options as there."""
        return quant_attention(q, self.kv, self.page_table, self.seq_lens, **options)

    def append(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Add tokens to the end of every sequence.

        k, v:    [B, T, Hkv, D], or [B, Hkv, D] for one token each; any float dtype; keys after RoPE
        lengths: [B] ints: sequence b takes only the first lengths[b] of its T tokens. None takes all

        T = 0 adds nothing. If it fails, for want of memory too, the cache is as it was. TypeError, ValueError: tensors
        that do not fit, a sequence that would be longer than max_tokens.
        """
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, Tensor):
                raise TypeError(f"KVCache.append: {name} must be a tensor; got {type(x).__name__}")
        if k.dim() == 3 and v.dim() == 3:
            k, v = k.unsqueeze(1), v.unsqueeze(1)
        counts = self._check_append(k, v, lengths)
        step = self._paging.append(counts, k.shape[1])
        try:
            self._memory.append(k, v, step)
        except BaseException:
            self._paging.undo()
            raise

    def read(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values as attention sees them, [B, T, Hkv, D] with T the longest length; zero past each end."""
        return self._memory.read(self._paging.slots(max(self._paging.lens)), dtype)

    def crop(self, lengths: int | Sequence[int] | Tensor) -> None:
        """Keep the first lengths[b] tokens of each sequence b, say of a draft those that were accepted.

        lengths: an int for all, or [B] of them. ValueError: below 0, or past the end of a sequence

        Tokens in pages of 16 bits are forgotten without a trace, so a draft no longer than recent_tokens leaves only
        this: pages that left the recent window because of it stay packed. Where the new end lies within a packed page,
        that page is decoded into one of 16 bits. Its tokens keep the error of the format, and are rounded and later
        packed once more, which costs less than 0.05 bits of accuracy (log2 of the error; SmolLM2's keys and values) in
        all formats but kivi2, whose keys lose up to 0.5: they get the scale of other neighbours.

        If it fails, for want of memory, the cache is as it was.
        """
        lens = self._paging.lens
        given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        ends = [operator.index(n) for n in (given if isinstance(given, Sequence) else [given] * len(lens))]
        if len(ends) != len(lens) or not all(0 <= n <= old for n, old in zip(ends, lens)):
            raise ValueError(
                f"KVCache.crop: lengths must be {len(lens)} numbers from 0 to the sequences' own, {lens}; got {ends}"
            )
        num_pages, pairs = self._paging.crop([old - n for n, old in zip(ends, lens)])
        try:
            self._memory.unpack(num_pages, pairs)
        except BaseException:
            self._paging.undo()
            raise

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empty these sequences (None: all; an empty list: none) and free their pages."""
        self._paging.reset(self._check_rows("reset: rows", range(self._batch) if rows is None else rows))

    def fork(self, src_rows: Sequence[int] | Tensor) -> None:
        """Make sequence i a copy of what sequence src_rows[i] is now, for beam search. The batch becomes len(src_rows).

        No page is copied here: sequences share them. Only a last page that is not full is copied, once one of its
        sequences appends to it. ValueError: no rows, or one that is not there.
        """
        src = self._check_rows("fork: src_rows", src_rows)
        if not src:
            raise ValueError("KVCache.fork: src_rows must name at least one row")
        self._paging.fork(src)

    def __repr__(self) -> str:
        return (
            f'KVCache("{self.format.name}", lengths {self._paging.lens}, {self.bits_per_element:.2f} bits per element, '
            f"{self.nbytes / 1e6:.2f} MB)"
        )

    @property
    def _batch(self) -> int:
        return len(self._paging.rows)

    def _check_append(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
        batch = self._batch
        for name, x in (("k", k), ("v", v)):
            if x.dim() != 4 or (x.shape[0], *x.shape[2:]) != (batch, self.num_kv_heads, self.head_dim):
                raise ValueError(
                    f"KVCache.append: {name} must be [B, T, Hkv, D] or [B, Hkv, D] with B = {batch}, "
                    f"Hkv = {self.num_kv_heads}, D = {self.head_dim} from the cache; got {list(x.shape)}"
                )
            if torch.is_grad_enabled() and x.requires_grad:
                raise ValueError(
                    f"KVCache.append: {name} requires grad, but a cache has no backward; use torch.no_grad()"
                )
            if not x.is_floating_point():
                raise TypeError(f"KVCache.append: {name} must be floating point; got {x.dtype}")
            if x.device != self.page_table.device:
                raise ValueError(
                    f"KVCache.append: {name} must be on {self.page_table.device}, the cache's; got {x.device}"
                )
        if k.shape != v.shape:
            raise ValueError(f"KVCache.append: v must have k's shape {list(k.shape)}; got {list(v.shape)}")
        tokens = k.shape[1]
        given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        counts = [tokens] * batch if given is None else [operator.index(n) for n in given]
        if len(counts) != batch or not all(0 <= n <= tokens for n in counts):
            raise ValueError(f"KVCache.append: lengths must be {batch} numbers from 0 to T = {tokens}; got {counts}")
        for row, n in enumerate(counts):
            if self.max_tokens is not None and self._paging.lens[row] + n > self.max_tokens:
                raise ValueError(
                    f"KVCache.append: sequence {row} would have {self._paging.lens[row] + n} tokens; max_tokens is "
                    f"{self.max_tokens}"
                )
        return counts

    def _check_rows(self, what: str, rows: Sequence[int] | Tensor) -> list[int]:
        given = [operator.index(i) for i in (rows.tolist() if isinstance(rows, Tensor) else rows)]
        if not all(0 <= i < self._batch for i in given):
            raise ValueError(f"KVCache.{what} must be 0 to {self._batch - 1}; got {given}")
        return given
