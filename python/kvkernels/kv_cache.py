"""A growing cache of one layer: attention sinks and the recent window in 16 bits, everything between them packed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvkernels.formats import Format
from kvkernels.formats import format as parse_format
from kvkernels.ops.pack_pages import pack_pages
from kvkernels.ops.quant_attention import quant_attention
from kvkernels.ops.write_kv import write_kv
from kvkernels.paged_kv import FORMAT_OF_DTYPE, PAGE_BITS, PAGE_MASK, KVTransform, PagedKV, zero_pool

WINDOW, PACKED = (
    0,
    1,
)  # pools; an entry of the page table is pool << 28 | page, so in the window it is the page's number
NO_PAGE = -1


@contextmanager
def _lasting() -> Iterator[None]:
    """Tensors made in here outlive the call: those of inference mode could not be written to outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Pages:
    """The pages of one pool: their memory, how many sequences use each, which are free."""

    def __init__(self, shape: tuple[int, int], num_pages: int, device: torch.device | str | None):
        self.data = zero_pool((num_pages, *shape), device)
        self.users = [0] * num_pages
        self.free = list(range(num_pages))[::-1]

    @property
    def used(self) -> int:
        return len(self.users) - len(self.free)

    def reserve(self, count: int, enough: int) -> None:
        """Room for `count` more pages. Grows by half at least, but not past `enough` unless it must."""
        old, need = len(self.users), self.used + count
        if need <= old:
            return
        new = max(need, min(old + old // 2, enough))
        grown = zero_pool((new, *self.data.shape[1:]), self.data.device)
        grown[:old] = self.data
        self.data = grown
        self.users += [0] * (new - old)
        self.free = list(range(old, new))[::-1] + self.free

    def release(self, page: int) -> None:
        self.users[page] -= 1
        if self.users[page] == 0:
            self.free.append(page)


class KVCache:
    """Keys and values of one layer for a batch of sequences, packed as they age.

    A sequence is a list of pages. Its first `sink_tokens` and last `recent_tokens` tokens, rounded up to whole pages,
    stay in 16 bits. A page is re-encoded in `format` when it is full and all its tokens have left the recent window;
    its 16-bit page is then used again. Any format serves, those that code a page at once too.

    batch, num_kv_heads, head_dim: of the keys and values
    format:        of the middle: a name, a pair like "u3/u2", or a Format; "bf16" with dtype bfloat16 packs nothing
    page_size:     tokens per page
    sink_tokens, recent_tokens: at least 0. Centred keys need their sinks in 16 bits, see `calibrate_keys`
    max_tokens:    longest sequence. If given, all memory for `batch` of them is taken now; if None, it grows on demand
    dtype:         of the 16-bit pages, bfloat16 or float16. Keys and values are rounded to it before anything else, so
                   the stored bytes do not depend on how a text was cut into calls of append
    transform:     from `calibrate_keys`; None for centre 0, balance 1

    Pages are handed out on the host. Raises ValueError for sizes the format cannot have, as PagedKV.empty does.
    """

    @_lasting()
    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_dim: int,
        format: str | Format = "u2",
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
        self.format, window = parse_format(format), parse_format(FORMAT_OF_DTYPE[dtype])
        self.num_kv_heads, self.head_dim, self.page_size = num_kv_heads, head_dim, page_size
        self.sink_tokens, self.recent_tokens, self.max_tokens = sink_tokens, recent_tokens, max_tokens
        self.dtype, self.transform = dtype, transform
        self._formats = (window,) if self.format == window else (window, self.format)
        for fmt in self._formats:
            fmt.check(page_size, head_dim)
        self._sink_pages = -(-sink_tokens // page_size)

        self._rows: list[list[int]] = [[] for _ in range(batch)]  # page-table entries
        self._lens = [0] * batch
        max_pages = -(-longest // page_size)
        counts = (min(self._window_pages, max_pages), max(self._packed_end(longest) - self._sink_pages, 0))
        if len(self._formats) == 1:
            counts = (max_pages, 0)
        self._pools = [
            _Pages((num_kv_heads, fmt.page_bytes(page_size, head_dim)), batch * n, device)
            for fmt, n in zip(self._formats, counts)
        ]
        self._table = torch.zeros(batch, max(max_pages, 1), dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)

    @property
    def kv(self) -> PagedKV:
        """The pools: 16-bit pages, then packed ones. Where they grow on demand, good until the next append."""
        return PagedKV(tuple(p.data for p in self._pools), self._formats, self.page_size, self.transform)

    @property
    def page_table(self) -> Tensor:
        """int32 [B, max_pages]; what stands past the end of a sequence means nothing."""
        return self._table

    @property
    def seq_lens(self) -> Tensor:
        """int32 [B], in tokens."""
        return self._seq_lens

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use, a page that sequences share counted once."""
        return sum(p.used * p.data.shape[1] * p.data.shape[2] for p in self._pools)

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of all pages, free ones too."""
        return sum(p.data.nbytes for p in self._pools)

    @property
    def bits_per_element(self) -> float:
        """Bits in use per number cached, at the current lengths: windows, scales, padding, unfilled places counted."""
        numbers = 2 * self.num_kv_heads * self.head_dim * sum(self._lens)
        return self.nbytes * 8 / numbers if numbers else float("nan")

    def attend(self, q: Tensor, **options: Any) -> Any:
        """`quant_attention` over all that was appended; q [B, Hq, D] or [B, Tq, Hq, D], options as there."""
        return quant_attention(q, self.kv, self.page_table, self.seq_lens, **options)

    def append(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Add tokens to the end of every sequence.

        k, v:    [B, T, Hkv, D], or [B, Hkv, D] for one token each; any float dtype; keys after RoPE
        lengths: [B] ints: sequence b takes only the first lengths[b] of its T tokens. None takes all
        """
        if k.dim() == 3 and v.dim() == 3:
            k, v = k.unsqueeze(1), v.unsqueeze(1)
        self._append(k, v, self._check_append(k, v, lengths))

    @_lasting()
    def _append(self, k: Tensor, v: Tensor, counts: list[int]) -> None:
        k, v = (x.to(self.dtype) for x in (k, v))
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        starts, size = self._lens, self.page_size
        ends = [start + n for start, n in zip(starts, counts)]
        packed = [self._packed_end(end) for end in ends]

        for row, end in zip(self._rows, ends):
            row += [NO_PAGE] * (-(-end // size) - len(row))
        # Full pages leave the window before new ones enter it, so that it never holds both.
        self._pack(starts, [min(end, start // size) for end, start in zip(packed, starts)])
        self._append_packed(k, v, starts, packed)
        self._append_window(k, v, starts, ends)
        self._pack(starts, packed)
        self._lens = ends
        self._seq_lens.copy_(torch.tensor(ends, dtype=torch.int32))

    @_lasting()
    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Empty these sequences (None: all) and free their pages."""
        for row in self._check_rows("reset", range(len(self._rows)) if rows is None else rows):
            for entry in self._rows[row]:
                self._drop(entry)
            self._rows[row], self._lens[row] = [], 0
        self._seq_lens.copy_(torch.tensor(self._lens, dtype=torch.int32))

    @_lasting()
    def fork(self, src_rows: Sequence[int] | Tensor) -> None:
        """Make sequence i a copy of what sequence src_rows[i] is now, for beam search. The batch becomes len(src_rows).

        No page is copied here: sequences share them. Only a last page that is not full is copied, once one of its
        sequences appends to it.
        """
        src = self._check_rows("fork", src_rows)
        if not src:
            raise ValueError("KVCache.fork: src_rows must name at least one row")
        rows, lens = [list(self._rows[i]) for i in src], [self._lens[i] for i in src]
        for entry in (entry for row in rows for entry in row):
            self._pools[entry >> PAGE_BITS].users[entry & PAGE_MASK] += 1
        self.reset()
        self._rows, self._lens = rows, lens
        index = torch.tensor(src, device=self._table.device)
        self._table = self._table[index]
        self._seq_lens = torch.tensor(lens, dtype=torch.int32, device=self._table.device)

    @property
    def _window_pages(self) -> int:
        """16-bit pages that a sequence can need: sinks, recent tokens, a page just begun and one about to be packed."""
        return self._sink_pages + -(-self.recent_tokens // self.page_size) + 2

    def _packed_end(self, tokens: int) -> int:
        """A sequence of so many tokens keeps its pages from this one on in 16 bits."""
        if len(self._formats) == 1:
            return 0
        return max(tokens - self.recent_tokens, 0) // self.page_size

    def _check_append(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None) -> list[int]:
        batch = len(self._rows)
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
            if x.device != self._table.device:
                raise ValueError(f"KVCache.append: {name} must be on {self._table.device}, the cache's; got {x.device}")
        if k.shape != v.shape:
            raise ValueError(f"KVCache.append: v must have k's shape {list(k.shape)}; got {list(v.shape)}")
        tokens = k.shape[1]
        given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
        counts = [tokens] * batch if given is None else [int(n) for n in given]
        if len(counts) != batch or not all(0 <= n <= tokens for n in counts):
            raise ValueError(f"KVCache.append: lengths must be {batch} numbers from 0 to T = {tokens}; got {counts}")
        for row, n in enumerate(counts):
            if self.max_tokens is not None and self._lens[row] + n > self.max_tokens:
                raise ValueError(
                    f"KVCache.append: sequence {row} would have {self._lens[row] + n} tokens; max_tokens is "
                    f"{self.max_tokens}"
                )
        return counts

    def _check_rows(self, what: str, rows: Sequence[int] | Tensor) -> list[int]:
        given = [int(i) for i in (rows.tolist() if isinstance(rows, Tensor) else rows)]
        if not all(0 <= i < len(self._rows) for i in given):
            raise ValueError(f"KVCache.{what}: rows must be 0 to {len(self._rows) - 1}; got {given}")
        return given

    def _drop(self, entry: int) -> None:
        self._pools[entry >> PAGE_BITS].release(entry & PAGE_MASK)

    def _take(self, pool: int, count: int) -> list[int]:
        """Entries of free pages; _assign makes them used."""
        pages = self._pools[pool]
        bounded = pool == WINDOW and len(self._formats) == 2
        pages.reserve(count, len(self._rows) * self._window_pages if bounded else PAGE_MASK)
        return [pool << PAGE_BITS | pages.free.pop() for _ in range(count)]

    def _assign(self, changes: list[tuple[int, int, int]]) -> None:
        """Put (row, place, entry) into the page table; what stood there loses a user."""
        for row, place, entry in changes:
            self._pools[entry >> PAGE_BITS].users[entry & PAGE_MASK] += 1
            if self._rows[row][place] != NO_PAGE:
                self._drop(self._rows[row][place])
            self._rows[row][place] = entry
        width, need = self._table.shape[1], max((place + 1 for _, place, _ in changes), default=0)
        if need > width:
            self._table = torch.nn.functional.pad(self._table, (0, max(need, 2 * width) - width))
        if changes:
            rows, places, entries = torch.tensor(changes, device=self._table.device).unbind(1)
            self._table[rows, places] = entries.int()

    def _pack(self, starts: list[int], ends: list[int]) -> None:
        """Re-encode the 16-bit pages before place ends[row], sinks apart; done already for lengths `starts`."""
        moves = [
            (row, place, self._rows[row][place])
            for row, (start, end) in enumerate(zip(starts, ends))
            for place in range(max(self._packed_end(start), self._sink_pages), end)
            if self._rows[row][place] >> PAGE_BITS == WINDOW
        ]
        if not moves:
            return
        old = list(dict.fromkeys(entry for _, _, entry in moves))  # sequences that share a page share the packed one
        new = dict(zip(old, self._take(PACKED, len(old))))
        pairs = [(a & PAGE_MASK, b & PAGE_MASK) for a, b in new.items()]
        pack_pages(self.kv, WINDOW, PACKED, self._int32(pairs))
        self._assign([(row, place, new[entry]) for row, place, entry in moves])

    def _append_packed(self, k: Tensor, v: Tensor, starts: list[int], ends: list[int]) -> None:
        """Code the pages that lie wholly within the new tokens and outside both windows: no 16-bit page is needed."""
        size = self.page_size
        for row, (start, end) in enumerate(zip(starts, ends)):
            first = max(-(-start // size), self._sink_pages)
            if first >= end:
                continue
            tokens = slice(first * size - start, end * size - start)
            prompt = PagedKV.from_caches(*(x[row, tokens].unflatten(0, (end - first, size)) for x in (k, v)))
            entries = self._take(PACKED, end - first)
            kv = PagedKV((*prompt.pools, self._pools[PACKED].data), self._formats, size, self.transform)
            pack_pages(kv, WINDOW, PACKED, self._int32([(i, entry & PAGE_MASK) for i, entry in enumerate(entries)]))
            self._assign([(row, first + i, entry) for i, entry in enumerate(entries)])

    def _append_window(self, k: Tensor, v: Tensor, starts: list[int], ends: list[int]) -> None:
        """Write the new tokens of all other pages, after giving every sequence a page of its own to write to."""
        size = self.page_size
        wanted, copied = [], []  # places that need a page; those among them whose shared page is copied
        users: dict[int, int] = {}
        for row, (start, end) in enumerate(zip(starts, ends)):
            for place in range(start // size, -(-end // size) if end > start else 0):
                entry = self._rows[row][place]
                if entry == NO_PAGE:
                    wanted.append((row, place))
                elif entry >> PAGE_BITS == WINDOW:
                    left = users.setdefault(entry, self._pools[WINDOW].users[entry])
                    if left > 1:  # the last of those that share it keeps it
                        users[entry] = left - 1
                        wanted.append((row, place))
                        copied.append((entry, len(wanted) - 1))
        entries = self._take(WINDOW, len(wanted))
        if copied:
            old, new = zip(*((entry, entries[i]) for entry, i in copied))
            data = self._pools[WINDOW].data
            data[list(new)] = data[list(old)]
        self._assign([(row, place, entry) for (row, place), entry in zip(wanted, entries)])

        writes = []  # sequence, its new token, slot
        for row, (start, end) in enumerate(zip(starts, ends)):
            for position in range(start, end):
                entry = self._rows[row][position // size]
                if entry >> PAGE_BITS == WINDOW:
                    writes.append((row, position - start, entry * size + position % size))
        if writes:
            rows, tokens, slots = torch.tensor(writes, device=self._table.device).unbind(1)
            write_kv(k[rows, tokens], v[rows, tokens], self.kv, WINDOW, slots.contiguous())

    def _int32(self, numbers: list[tuple[int, int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self._table.device)
