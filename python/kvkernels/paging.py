"""Which page holds which tokens of which sequence: the bookkeeping of a cache, made once for all layers alike."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from kvkernels.paged_kv import PAGE_BITS, PAGE_MASK

WINDOW, PACKED = (
    0,
    1,
)  # pools; an entry of the page table is pool << 28 | page, so in the window it is the page's number
NO_PAGE = -1


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made in here outlive the call: those of inference mode could not be written to outside it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Pages:
    """The pages of one pool: how many sequences use each, which are free."""

    def __init__(self, num_pages: int):
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
        self.users += [0] * (new - old)
        self.free = list(range(old, new))[::-1] + self.free

    def recount(self, num_pages: int, used: Iterable[int]) -> None:
        """Start over with so many pages; `used` names a page once for each sequence that uses it."""
        self.users = [0] * num_pages
        for page in used:
            self.users[page] += 1
        self.free = [page for page, n in enumerate(self.users) if n == 0][::-1]

    def release(self, page: int) -> None:
        self.users[page] -= 1
        if self.users[page] == 0:
            self.free.append(page)


class Append(NamedTuple):
    """What an append asks of the memory of each layer, in this order; None or empty: nothing."""

    num_pages: tuple[int, ...]  # that the pools must have
    leaving: Tensor | None  # int32 [N, 2]: pages of the window, and the packed pages to re-encode them into
    whole: list[tuple[int, slice, Tensor]]  # a sequence, its new tokens, int32 [n, 2]: 0 ... n - 1, packed pages
    copied: tuple[list[int], list[int]] | None  # pages of the window to copy, and to where
    slots: Tensor | None  # int64: where in the window new tokens are written,
    tokens: tuple[Tensor, Tensor] | None  # sequence and new token of each slot; None: all, sequence after sequence
    left: Tensor | None  # as leaving, after the writes

    @property
    def packs(self) -> bool:
        """Whether pages are encoded."""
        return self.leaving is not None or bool(self.whole) or self.left is not None


class Before(NamedTuple):
    """What a step found, for `Paging.undo`."""

    lens: list[int]
    first: list[int]
    num_pages: tuple[int, ...]
    page_table: Tensor


class Paging:
    """Sequences as lists of pages in two pools, the 16-bit window and the packed one.

    The first `sink_tokens` and last `recent_tokens` tokens of a sequence, rounded up to whole pages, stay in 16 bits. A
    page is re-encoded when it is full and all its tokens have left the recent window.

    packs:      False: everything stays in the window, which then is the only pool
    attended:   queries see only so many tokens up to themselves, as in a layer with sliding-window attention: pages
                before them are given up, but for `recent_tokens` more, so that tokens can be taken back. None: all
    max_tokens: longest sequence for which pages and page table are there from the beginning; they grow if need be
    """

    @lasting()
    def __init__(
        self,
        batch: int,
        page_size: int,
        sink_tokens: int,
        recent_tokens: int,
        *,
        packs: bool = True,
        attended: int | None = None,
        max_tokens: int = 0,
        device: torch.device | str | None = None,
    ):
        self.page_size, self.recent_tokens, self.packs, self.attended = page_size, recent_tokens, packs, attended
        self.sink_pages = -(-sink_tokens // page_size)
        self.rows: list[list[int]] = [[] for _ in range(batch)]  # page-table entries
        self.lens = [0] * batch
        self.first = [0] * batch  # places before this one were given up
        max_pages = -(-max_tokens // page_size)
        self.pools = [Pages(batch * max_pages)]
        if packs:
            packed = max(self.packed_end(max_tokens) - self.sink_pages, 0)
            self.pools = [Pages(batch * n) for n in (min(self.window_pages, max_pages), packed)]
        self.page_table = torch.zeros(batch, max(max_pages, 1), dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(batch, dtype=torch.int32, device=device)
        self._begin()

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Of each pool, free ones too."""
        return tuple(len(p.users) for p in self.pools)

    @property
    def window_pages(self) -> int:
        """16-bit pages that a sequence can need: sinks, recent tokens, a page just begun and one about to be packed."""
        return self.sink_pages + -(-self.recent_tokens // self.page_size) + 2

    def packed_end(self, tokens: int) -> int:
        """A sequence of so many tokens keeps its pages from this one on in 16 bits."""
        return max(tokens - self.recent_tokens, 0) // self.page_size if self.packs else 0

    @lasting()
    def append(self, counts: Sequence[int], tokens: int) -> Append:
        """Make room for the first counts[b] of `tokens` new tokens of each sequence b. The memory must do what it
        returns, or else `undo`."""
        self._begin()
        try:
            return self._append(counts, tokens)
        except BaseException:
            self.undo()
            raise

    def _append(self, counts: Sequence[int], tokens: int) -> Append:
        starts, size = self.lens, self.page_size
        ends = [start + n for start, n in zip(starts, counts)]
        packed = [self.packed_end(end) for end in ends]
        for row, end in enumerate(ends):
            self.rows[row] += [NO_PAGE] * (-(-end // size) - len(self.rows[row]))
            if self.attended is not None:
                self.first[row] = max(self.first[row], (end - self.attended - self.recent_tokens) // size)
        # Full pages leave the window before new ones enter it, so that it never holds both.
        leaving = self._pack(starts, [min(end, start // size) for end, start in zip(packed, starts)])
        whole = self._add_packed(starts, packed)
        copied, slots, written = self._add_window(starts, ends, tokens)
        left = self._pack(starts, packed)
        if self.attended is not None:  # after pages were taken: should the step fail, what is given up is still whole
            for row, first in enumerate(self.first):
                self._give_up(row, self._before.first[row], first)
        self._set_lens(ends)
        return Append(self.num_pages, leaving, whole, copied, slots, written, left)

    @lasting()
    def reset(self, rows: Sequence[int]) -> None:
        """Empty these sequences and free their pages."""
        for row in rows:
            self._give_up(row, 0, len(self.rows[row]))
            self.rows[row], self.first[row] = [], 0
        self._set_lens([0 if row in rows else n for row, n in enumerate(self.lens)])

    @lasting()
    def fork(self, src: Sequence[int]) -> None:
        """Make sequence i what sequence src[i] is now. The batch becomes len(src), at least 1. No page is copied."""
        rows, lens, first = [list(self.rows[i]) for i in src], [self.lens[i] for i in src], [self.first[i] for i in src]
        device = self.page_table.device
        page_table = self.page_table[torch.tensor(src, device=device)]
        seq_lens = torch.tensor(lens, dtype=torch.int32, device=device)
        for entry in (entry for row in rows for entry in row if entry != NO_PAGE):
            self.pools[entry >> PAGE_BITS].users[entry & PAGE_MASK] += 1
        for row in range(len(self.rows)):
            self._give_up(row, 0, len(self.rows[row]))
        self.rows, self.lens, self.first = rows, lens, first
        self.page_table, self.seq_lens = page_table, seq_lens

    @lasting()
    def crop(self, counts: Sequence[int]) -> tuple[tuple[int, ...], Tensor | None]:
        """Take counts[b] tokens from the end of each sequence b, at most as many as it has.

        Returns what the memory must do, or else `undo`: have so many pages, and decode packed pages into pages of the
        window, int32 [N, 2]. A last page that is not full has to be of 16 bits. ValueError: pages that the sequence
        then needs again were given up.
        """
        self._begin()
        try:
            return self._crop(counts)
        except BaseException:
            self.undo()
            raise

    @lasting()
    def undo(self) -> None:
        """Take back the last append or crop, which the memory could not do."""
        lens, self.first, num_pages, self.page_table = self._before
        for entries, n in zip(self.rows, lens):
            places = -(-n // self.page_size)
            entries[:] = entries[:places] + [NO_PAGE] * (places - len(entries))
        replaced = [(row, place, entry) for row, place, entry in self._replaced if place < len(self.rows[row])]
        for row, place, entry in reversed(replaced):
            self.rows[row][place] = entry
        for number, (pool, n) in enumerate(zip(self.pools, num_pages)):
            used = (entry for entries in self.rows for entry in entries if entry != NO_PAGE)
            pool.recount(n, [entry & PAGE_MASK for entry in used if entry >> PAGE_BITS == number])
        self._write_table([(row, place, self.rows[row][place]) for row, place, _ in replaced])
        self._set_lens(lens)

    def _crop(self, counts: Sequence[int]) -> tuple[tuple[int, ...], Tensor | None]:
        ends = [n - count for n, count in zip(self.lens, counts)]
        for row, (old, new) in enumerate(zip(self.lens, ends)):
            if self.attended is not None and self.first[row] * self.page_size > max(new - self.attended + 1, 0):
                raise ValueError(
                    f"crop: sequence {row} has {old} tokens, of which only the last {self.attended} are attended to; "
                    f"{self.recent_tokens} (recent_tokens) can be taken back, not {old - new}"
                )
        moves = []
        for row, end in enumerate(ends):
            self._give_up(row, -(-end // self.page_size), len(self.rows[row]))
            del self.rows[row][-(-end // self.page_size) :]
            if end % self.page_size and self.rows[row][-1] >> PAGE_BITS == PACKED:
                moves.append((row, len(self.rows[row]) - 1, self.rows[row][-1]))
        pairs = self._move(moves, WINDOW) if moves else None
        self._set_lens(ends)
        return self.num_pages, pairs

    def slots(self, last: int) -> list[Tensor]:
        """Where tokens 0 ... last - 1 of every sequence stand, for read_kv: of each pool int64 [B, last], -1 for tokens
        that are not there."""
        position = torch.arange(last, device=self.page_table.device)
        entry = self.page_table[:, position // self.page_size].long()
        slot = (entry & PAGE_MASK) * self.page_size + position % self.page_size
        first = torch.tensor(self.first, device=entry.device) * self.page_size
        there = (position < self.seq_lens[:, None]) & (position >= first[:, None])
        return [slot.where(there & (entry >> PAGE_BITS == pool), -1) for pool in range(len(self.pools))]

    def _begin(self) -> None:
        self._before = Before(self.lens, list(self.first), self.num_pages, self.page_table)
        self._replaced: list[tuple[int, int, int]] = []  # row, place, the entry that stood there

    def _set_lens(self, lens: list[int]) -> None:
        self.lens = lens
        self.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))

    def _drop(self, entry: int) -> None:
        self.pools[entry >> PAGE_BITS].release(entry & PAGE_MASK)

    def _give_up(self, row: int, first: int, last: int) -> None:
        for place in range(first, last):
            entry = self.rows[row][place]
            if entry != NO_PAGE:
                self._replaced.append((row, place, entry))
                self._drop(entry)
                self.rows[row][place] = NO_PAGE

    def _take(self, pool: int, count: int) -> list[int]:
        """Entries of free pages; _assign makes them used."""
        pages = self.pools[pool]
        bounded = pool == WINDOW and self.packs
        pages.reserve(count, len(self.rows) * self.window_pages if bounded else PAGE_MASK)
        return [pool << PAGE_BITS | pages.free.pop() for _ in range(count)]

    def _assign(self, changes: list[tuple[int, int, int]]) -> None:
        """Put (row, place, entry) into the page table; what stood there loses a user."""
        for row, place, entry in changes:
            old = self.rows[row][place]
            self._replaced.append((row, place, old))
            self.pools[entry >> PAGE_BITS].users[entry & PAGE_MASK] += 1
            if old != NO_PAGE:
                self._drop(old)
            self.rows[row][place] = entry
        self._write_table(changes)

    def _write_table(self, changes: list[tuple[int, int, int]]) -> None:
        """Of (row, place, entry)."""
        if not changes:
            return
        width, need = self.page_table.shape[1], max(place + 1 for _, place, _ in changes)
        if need > width:
            self.page_table = torch.nn.functional.pad(self.page_table, (0, max(need, 2 * width) - width))
        rows, places, entries = torch.tensor(changes, device=self.page_table.device).unbind(1)
        self.page_table[rows, places] = entries.int()

    def _move(self, moves: list[tuple[int, int, int]], pool: int) -> Tensor:
        """Give (row, place, entry) a page of another pool; sequences that share a page share the new one."""
        old = list(dict.fromkeys(entry for _, _, entry in moves))
        new = dict(zip(old, self._take(pool, len(old))))
        self._assign([(row, place, new[entry]) for row, place, entry in moves])
        return self._int32([(a & PAGE_MASK, b & PAGE_MASK) for a, b in new.items()])

    def _pack(self, starts: list[int], ends: list[int]) -> Tensor | None:
        """Re-encode the 16-bit pages before place ends[row], sinks apart; done already for lengths `starts`."""
        moves = [
            (row, place, self.rows[row][place])
            for row, (start, end) in enumerate(zip(starts, ends))
            for place in range(max(self.packed_end(start), self.sink_pages, self.first[row]), end)
            if self.rows[row][place] >> PAGE_BITS == WINDOW
        ]
        return self._move(moves, PACKED) if moves else None

    def _add_packed(self, starts: list[int], packed: list[int]) -> list[tuple[int, slice, Tensor]]:
        """The pages that lie wholly within the new tokens and outside both windows: no 16-bit page is needed."""
        size, whole = self.page_size, []
        for row, (start, last) in enumerate(zip(starts, packed)):
            first = max(-(-start // size), self.sink_pages, self.first[row])
            if first < last:
                entries = self._take(PACKED, last - first)
                pairs = self._int32([(i, entry & PAGE_MASK) for i, entry in enumerate(entries)])
                whole.append((row, slice(first * size - start, last * size - start), pairs))
                self._assign([(row, first + i, entry) for i, entry in enumerate(entries)])
        return whole

    def _add_window(
        self, starts: list[int], ends: list[int], width: int
    ) -> tuple[tuple[list[int], list[int]] | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        """All other new tokens: every sequence gets a page of its own to write to. Copied pages, slots, tokens."""
        size = self.page_size
        wanted, copied = [], []  # places that need a page; those among them whose shared page is copied
        users: dict[int, int] = {}
        for row, (start, end) in enumerate(zip(starts, ends)):
            first = max(start // size, self.first[row])
            for place in range(first, -(-end // size) if end > start else 0):
                entry = self.rows[row][place]
                if entry == NO_PAGE:
                    wanted.append((row, place))
                elif entry >> PAGE_BITS == WINDOW:
                    left = users.setdefault(entry, self.pools[WINDOW].users[entry])
                    if left > 1:  # the last of those that share it keeps it
                        users[entry] = left - 1
                        wanted.append((row, place))
                        copied.append((entry, len(wanted) - 1))
        entries = self._take(WINDOW, len(wanted))
        self._assign([(row, place, entry) for (row, place), entry in zip(wanted, entries)])

        rows: list[int] = []
        tokens: list[int] = []
        slots: list[int] = []
        for row, (start, end) in enumerate(zip(starts, ends)):
            for place in range(max(start // size, self.first[row]), -(-end // size) if end > start else 0):
                entry = self.rows[row][place]
                if entry >> PAGE_BITS == WINDOW:
                    first, last = max(start, place * size), min(end, (place + 1) * size)
                    rows += [row] * (last - first)
                    tokens += range(first - start, last - start)
                    slots += range(entry * size + first % size, entry * size + first % size + last - first)
        device = self.page_table.device
        some = None
        if len(slots) < len(starts) * width:
            some = (torch.tensor(rows, device=device), torch.tensor(tokens, device=device))
        return (
            ([a for a, _ in copied], [entries[i] for _, i in copied]) if copied else None,
            torch.tensor(slots, device=device) if slots else None,
            some if slots else None,
        )

    def _int32(self, numbers: list[tuple[int, int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.page_table.device)
