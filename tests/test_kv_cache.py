"""KVCache: every page is where it belongs and holds what was appended, sequences do not disturb one another."""

import math
import pickle
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kvkernels as kk
from kvkernels.formats import decode_page, encode_page
from kvkernels.paged_kv import FORMAT_OF_DTYPE, PAGE_BITS, PAGE_MASK
from kvkernels.paging import NO_PAGE, PACKED, WINDOW

HEADS, HEAD_DIM = 2, 64


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    """The checks are many small PyTorch ops, slower on more threads; test_contract.py varies the count."""
    threads(1)


class Model:
    """A cache, and beside it all that was appended to each sequence."""

    def __init__(self, batch: int, format: str = "u2", **options):
        self.cache = kk.KVCache(batch, HEADS, HEAD_DIM, format, **options)
        self.gen = torch.Generator().manual_seed(batch)
        self.k = [torch.zeros(0, HEADS, HEAD_DIM)] * batch
        self.v = list(self.k)
        self.packed = [0] * batch  # tokens in pages that were packed already, sinks included

    def append(self, tokens: int, lengths: list[int] | None = None) -> None:
        k, v = torch.randn(2, len(self.k), tokens, HEADS, HEAD_DIM, generator=self.gen)
        if tokens == 1 and lengths is None:
            self.cache.append(k[:, 0], v[:, 0])
        else:
            self.cache.append(k, v, lengths)
        for row, n in enumerate(lengths or [tokens] * len(self.k)):
            self.k[row], self.v[row] = torch.cat([self.k[row], k[row, :n]]), torch.cat([self.v[row], v[row, :n]])

    def fork(self, src: list[int]) -> None:
        self.cache.fork(src)
        self.k, self.v, self.packed = ([x[i] for i in src] for x in (self.k, self.v, self.packed))

    def reset(self, rows: list[int]) -> None:
        self.cache.reset(rows)
        for row in rows:
            self.k[row], self.v[row], self.packed[row] = self.k[row][:0], self.v[row][:0], 0

    def crop(self, lengths: list[int]) -> None:
        """What the end of a packed page leaves is from now on its decoded tokens."""
        size, dtype = self.cache.page_size, self.cache.dtype
        self.packed = [self.packed_end(row) for row in range(len(self.k))]
        for row, n in enumerate(lengths):
            place = n // size
            pages = self.expected(row)
            if n % size and pages[place][0] == PACKED:
                for side, x in ((1, self.k), (2, self.v)):
                    decoded = pages[place][side].transpose(0, 1).to(dtype).float()
                    x[row] = torch.cat([x[row][: place * size], decoded])
            self.k[row], self.v[row] = self.k[row][:n], self.v[row][:n]
            self.packed[row] = min(self.packed[row], place * size)
        self.cache.crop(lengths)

    def packed_end(self, row: int) -> int:
        size = self.cache.page_size
        return max(self.packed[row], (len(self.k[row]) - self.cache.recent_tokens) // size * size)

    def expected(self, row: int) -> list[tuple[int, Tensor, Tensor]]:
        """Of each page the pool, and keys and values [Hkv, tokens, D] as attention should see them."""
        cache, size = self.cache, self.cache.page_size
        window = kk.format(FORMAT_OF_DTYPE[cache.dtype])
        pages = []
        for first in range(0, len(self.k[row]), size):
            k, v = (x[row][first : first + size].to(cache.dtype).float().transpose(0, 1) for x in (self.k, self.v))
            old = first >= cache.sink_tokens and first + size <= self.packed_end(row)
            pool = PACKED if old and cache.format != window else WINDOW
            if pool == PACKED:
                data = encode_page(cache.format, k, v, cache.transform)
                k, v = decode_page(cache.format, data, size, HEAD_DIM, cache.transform)
            pages.append((pool, k, v))
        return pages

    def check(self) -> None:
        cache, size = self.cache, self.cache.page_size
        assert cache.seq_lens.tolist() == [len(k) for k in self.k]
        users: Counter[int] = Counter()
        for row in range(len(self.k)):
            for place, (pool, k, v) in enumerate(self.expected(row)):
                entry = int(cache.page_table[row, place])
                users[entry] += 1
                assert entry >> PAGE_BITS == pool, f"sequence {row}, place {place} of {len(self.k[row])} tokens"
                page = cache.kv.pools[pool][entry & PAGE_MASK]
                got = decode_page(cache.kv.formats[pool], page, size, HEAD_DIM, cache.transform)
                for x, expected in zip(got, (k, v)):
                    assert torch.equal(x[:, : expected.shape[1]], expected), f"sequence {row}, place {place}"
        for number, pool in enumerate(cache._paging.pools):
            assert pool.users == [users[number << PAGE_BITS | page] for page in range(len(pool.users))]
            assert sorted(pool.free) == [page for page, n in enumerate(pool.users) if n == 0]
        in_use = sum(cache.kv.pools[e >> PAGE_BITS][0].nbytes for e in users)
        assert cache.nbytes == in_use <= cache.reserved_nbytes == cache.kv.nbytes

    def attend(self, q: Tensor) -> Tensor:
        """Softmax attention in float64 over the decoded pages."""
        out = torch.zeros(q.shape, dtype=torch.float64)
        for row in range(len(self.k)):
            pages = self.expected(row)
            if not pages:
                continue
            k, v = (torch.cat([page[side] for page in pages], 1).double() for side in (1, 2))
            group = q.shape[1] // HEADS
            scores = torch.einsum("hgd,htd->hgt", q[row].double().unflatten(0, (HEADS, group)), k) / math.sqrt(HEAD_DIM)
            out[row] = (torch.softmax(scores, -1) @ v).flatten(0, 1)
        return out


def transform() -> kk.KVTransform:
    gen = torch.Generator().manual_seed(7)
    centre, spread = torch.randn(2, HEADS, HEAD_DIM, generator=gen)
    order = torch.stack([torch.randperm(HEAD_DIM, generator=gen) for _ in range(HEADS)]).int()
    return kk.KVTransform(centre, torch.exp(0.5 * spread), order)


@pytest.mark.parametrize("format", [f.name for f in kk.formats()] + ["u3/u2", "kivi2/bf16", "m31/t1.e5m3"])
@pytest.mark.parametrize("seed", range(2))
def test_any_history(format: str, seed: int) -> None:
    """Prompts, tokens, resets, forks and crops in random order; after each step every page is as it must be."""
    rng = random.Random(f"{format} {seed}")
    model = Model(
        rng.choice([1, 3]),
        format,
        page_size=rng.choice([16, 32]),
        sink_tokens=rng.choice([0, 5, 16, 40]),
        recent_tokens=rng.choice([0, 7, 32, 50]),
        max_tokens=rng.choice([None, 1000]),
        dtype=rng.choice([torch.bfloat16, torch.float16]),
        transform=rng.choice([None, transform()]),
    )
    reserved = model.cache.reserved_nbytes
    for _ in range(16):
        batch = len(model.k)
        step = rng.choice(["token", "token", "prompt", "prompt", "fork", "crop", "crop", "reset"])
        if step == "token":
            for _ in range(rng.choice([1, 9])):
                model.append(1)
        elif step == "prompt":
            tokens = rng.choice([3, 20, 130])
            model.append(tokens, [rng.randint(0, tokens) for _ in range(batch)])
        elif step == "fork":
            model.fork([rng.randrange(batch) for _ in range(batch)])
        elif step == "crop":
            back = rng.choice([0, 4, 20, 100])
            model.crop([max(len(k) - rng.randint(0, back), 0) for k in model.k])
        else:
            model.reset([rng.randrange(batch)])
        model.check()
    if model.cache.max_tokens is not None:
        assert model.cache.reserved_nbytes == reserved


@pytest.mark.once
@pytest.mark.parametrize("where", ["zero_pool", "torch.nn.functional.pad", "pack_pages", "write_kv"])
@pytest.mark.parametrize("steps", [[(300, None)], [(150, [150, 0, 77])] * 3, [(40, [40, 25, 7])] + [(1, None)] * 60])
def test_a_failed_append_changes_nothing(
    where: str, steps: list[tuple[int, list[int] | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is tried with `where` out of memory; every page is then as it was, and the step can be done."""
    model = Model(3, "u2", page_size=16, sink_tokens=16, recent_tokens=20, transform=transform())
    failures = 0

    def fail(*args: object, **options: object) -> None:
        raise MemoryError

    for tokens, lengths in steps:
        before = dict(vars(model))
        with monkeypatch.context() as patch:
            patch.setattr(where if "." in where else f"kvkernels.kv_cache.{where}", fail)
            try:
                model.append(tokens, lengths)
            except MemoryError:
                failures += 1
            else:
                continue
        vars(model).update(before)
        model.check()
        model.append(tokens, lengths)
        model.check()
    assert failures


@pytest.mark.once
def test_growth_that_failed_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(1, "u2", page_size=16, sink_tokens=0, recent_tokens=16)
    model.append(40)
    sizes = []

    def small(shape: tuple[int, ...], device: torch.device) -> Tensor:
        sizes.append(shape[0])
        if shape[0] > 100:
            raise MemoryError
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    monkeypatch.setattr("kvkernels.kv_cache.zero_pool", small)
    k, v = model.k[0], model.v[0]
    with pytest.raises(MemoryError):
        model.append(10000)
    assert max(sizes) > 500
    sizes.clear()
    model.k[0], model.v[0] = k, v
    model.append(60)
    model.check()
    assert max(sizes) < 10


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"centre": torch.zeros(2, 64).double()}, TypeError, "centre must be torch.float32; got torch.float64"),
        ({"balance": torch.ones(2, 128)}, ValueError, r"balance must be \[Hkv, D\] = \[2, 64\], .*; got \[2, 128\]"),
        ({"centre": torch.zeros(1, 2, 64)}, ValueError, r"centre must be .*; got \[1, 2, 64\]"),
        ({"balance": torch.ones(2, 64, device="meta")}, ValueError, "balance must be on cpu, .*; got meta"),
        ({"order": torch.arange(HEAD_DIM).repeat(2, 1)}, TypeError, "order must be torch.int32; got torch.int64"),
        ({"order": torch.zeros(2, 64).int()}, ValueError, r"order\[0\] must be a permutation .*; got \[0, 0, 0"),
        ({"order": torch.arange(1, 65).repeat(2, 1).int()}, ValueError, r"order\[0\] must be a permutation"),
        ({"centre": None}, TypeError, "centre must be a tensor; got NoneType"),
    ],
)
def test_a_transform_that_does_not_fit(change: dict, error: type[Exception], message: str) -> None:
    wrong = transform()._replace(**change)
    with pytest.raises(error, match=rf"transform\.{message}"):
        kk.KVCache(1, HEADS, HEAD_DIM, "u2", transform=wrong)
    with pytest.raises(error, match=rf"transform\.{message}"):
        kk.PagedKV.empty("u2", 3, HEADS, HEAD_DIM, 16, transform=wrong)
    cache = torch.zeros(3, 16, HEADS, HEAD_DIM).bfloat16()
    with pytest.raises(error, match=rf"transform\.{message}"):
        kk.PagedKV.from_caches(cache, cache, transform=wrong)


@pytest.mark.once
def test_a_transform_that_is_none() -> None:
    with pytest.raises(TypeError, match="transform must be a KVTransform, of calibrate_keys, or None; got tuple"):
        kk.KVCache(1, HEADS, HEAD_DIM, "u2", transform=tuple(transform()))


@pytest.mark.parametrize("format", ["u2", "kivi2", "bf16", "m31/u2", "m31/t1.e5m3"])
def test_attend_is_attention_over_what_was_appended(format: str) -> None:
    model = Model(3, format, page_size=16, sink_tokens=16, recent_tokens=32, transform=transform())
    q = torch.randn(3, 3 * HEADS, HEAD_DIM, generator=model.gen)
    assert torch.equal(model.cache.attend(q), torch.zeros_like(q))
    model.append(200, [200, 0, 77])
    for _ in range(3):
        model.append(1)
        torch.testing.assert_close(model.cache.attend(q).double(), model.attend(q), rtol=0, atol=2e-4)
    out, lse = model.cache.attend(q, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:2]
    several = model.cache.attend(torch.stack([q, q], 1))
    torch.testing.assert_close(several[:, 1], out, rtol=0, atol=1e-5)


def dense(q: Tensor, cache: kk.KVCache, sees: Tensor) -> Tensor:
    """Attention in fp32 over what the cache holds; sees: bool [B, Tq, T]."""
    k, v = (x.repeat_interleave(q.shape[2] // HEADS, 2) for x in cache.read())
    scores = torch.einsum("bqhd,bthd->bhqt", q, k) / math.sqrt(HEAD_DIM)
    return torch.einsum("bhqt,bthd->bqhd", scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("format", ["bf16", "u2", "kivi2", "m31/t1.e5m3"])
@pytest.mark.parametrize("recent", [0, 32])  # without a recent window, drafts are packed and crops decode pages
def test_speculative_decoding(format: str, recent: int) -> None:
    """Drafts of 4 tokens, chains and trees, are verified by attention and cropped to what was accepted of them."""
    rng, gen = random.Random(format), torch.Generator().manual_seed(0)
    options = {"page_size": 16, "sink_tokens": 16, "recent_tokens": recent, "transform": transform()}
    cache, never, exact = (kk.KVCache(2, HEADS, HEAD_DIM, name, **options) for name in (format, format, "bf16"))
    for x in (cache, never, exact):
        x.append(*torch.randn(2, 2, 90, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1)), [90, 55])
    for round in range(30):
        k, v = torch.randn(2, 2, 4, HEADS, HEAD_DIM, generator=gen)
        q = torch.randn(2, 4, 3 * HEADS, HEAD_DIM, generator=gen)
        lens = cache.seq_lens.tolist()
        cache.append(k, v)
        tree = [0b0001, 0b0011, 0b0101, 0b1101] if round % 2 else [0b0001, 0b0011, 0b0111, 0b1111]
        mask = torch.tensor([tree, tree], dtype=torch.int32)
        sees = torch.arange(max(lens) + 4).expand(2, 4, -1) < cache.seq_lens[:, None, None] - 4
        for b, i, j in ((b, i, j) for b in range(2) for i in range(4) for j in range(4) if tree[i] >> j & 1):
            sees[b, i, lens[b] + j] = True
        got = cache.attend(q, tree_mask=mask)
        torch.testing.assert_close(got, dense(q, cache, sees), rtol=0, atol=2e-4)
        if tree[3] == 0b1111:
            assert torch.equal(got, cache.attend(q))
        accepted = [rng.randint(0, 4), rng.randint(0, 4)]
        if round % 2:  # the second branch, tokens 0, 2 and 3, does not stand where it was drafted
            cache.crop(torch.tensor(lens, dtype=torch.int32))
            k, v, accepted = k[:, [0, 2, 3]], v[:, [0, 2, 3]], [min(n, 3) for n in accepted]
            cache.append(k, v, accepted)
        else:
            cache.crop([n + more for n, more in zip(lens, accepted)])
        never.append(k, v, accepted)
        exact.append(k, v, accepted)
        assert cache.seq_lens.tolist() == never.seq_lens.tolist() == [n + more for n, more in zip(lens, accepted)]
    assert min(cache.seq_lens.tolist()) > 85
    k, v = torch.randn(2, 2, 4, HEADS, HEAD_DIM, generator=gen)
    for x in (cache, never, exact):  # as long as the longest draft was: then both have packed the same pages
        x.append(k, v)
    q = torch.randn(2, 3 * HEADS, HEAD_DIM, generator=gen)
    if recent or format == "bf16":
        assert torch.equal(cache.attend(q), never.attend(q))
        assert all(torch.equal(a, b) for a, b in zip(cache.read(), never.read()))
    else:  # what crop says that decoding and packing again costs
        bits = 0.5 if format == "kivi2" else 0.05
        for a, b, x in zip(cache.read(), never.read(), exact.read()):
            assert 0 < (a - x).norm() <= 2**bits * (b - x).norm()


@pytest.mark.once
@pytest.mark.parametrize("where", ["zero_pool", "pack_pages"])
def test_a_crop_that_fails_changes_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cache that is all packed: the crop needs pages of 16 bits."""
    model = Model(2, "u2", page_size=16, sink_tokens=0, recent_tokens=0)
    model.append(160)

    def fail(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(f"kvkernels.kv_cache.{where}", fail)
        with pytest.raises(MemoryError):
            model.cache.crop([37, 101])
    model.check()
    model.crop([37, 101])
    model.check()


@pytest.mark.once
@pytest.mark.parametrize("lengths", [-1, 11, [10], [10, 8], [10, -1], torch.tensor([3, 4, 5])])
def test_crop_refuses(lengths: int | list[int] | Tensor) -> None:
    cache = kk.KVCache(2, HEADS, HEAD_DIM, "u2")
    cache.append(*torch.zeros(2, 2, 10, HEADS, HEAD_DIM), [10, 7])
    with pytest.raises(
        ValueError, match=r"crop: lengths must be 2 numbers from 0 to the sequences' own, \[10, 7\]; got"
    ):
        cache.crop(lengths)
    with pytest.raises(TypeError):
        cache.crop(2.5)
    assert cache.seq_lens.tolist() == [10, 7]


@pytest.mark.once
def test_repr_says_how_long_and_how_large() -> None:
    cache = kk.KVCache(2, HEADS, HEAD_DIM, "u3/u2", page_size=16, sink_tokens=0, recent_tokens=16)
    assert repr(cache) == 'KVCache("u3/u2", lengths [0, 0], nan bits per element, 0.00 MB)'
    cache.append(*torch.zeros(2, 2, 160, HEADS, HEAD_DIM), [160, 32])
    assert repr(cache) == (
        f'KVCache("u3/u2", lengths [160, 32], {cache.bits_per_element:.2f} bits per element, '
        f"{cache.nbytes / 1e6:.2f} MB)"
    )


@pytest.mark.parametrize("format", ["bf16", "u3/u2"])
def test_a_pickled_cache_goes_on(format: str) -> None:
    model = Model(2, format, page_size=16, sink_tokens=16, recent_tokens=16, transform=transform())
    model.append(100, [100, 60])
    first, model.cache = model.cache, pickle.loads(pickle.dumps(model.cache))
    model.check()
    model.append(30)
    model.crop([90, 11])
    model.check()
    assert first.seq_lens.tolist() == [100, 60]


def test_read_gives_what_was_appended() -> None:
    cache = kk.KVCache(2, HEADS, HEAD_DIM, "u2")
    assert [x.shape for x in cache.read()] == [(2, 0, HEADS, HEAD_DIM)] * 2
    given = torch.randn(2, 2, 50, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache.append(*given, [50, 20])
    for got, x in zip(cache.read(torch.bfloat16), given):
        assert torch.equal(got[0], x[0])
        assert torch.equal(got[1, :20], x[1, :20])
        assert not got[1, 20:].any()


def test_bytes_do_not_depend_on_how_a_text_was_cut() -> None:
    k, v = torch.randn(2, 1, 300, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    pages = []
    for step in (300, 1, 7, 100):
        cache = kk.KVCache(1, HEADS, HEAD_DIM, "u2", page_size=16, sink_tokens=20, recent_tokens=40)
        for i in range(0, 300, step):
            cache.append(k[:, i : i + step], v[:, i : i + step])
        entries = [int(e) for e in cache.page_table[0, : -(-300 // 16)]]
        pages.append([cache.kv.pools[e >> PAGE_BITS][e & PAGE_MASK] for e in entries[:-1]])
    for other in pages[1:]:
        assert all(torch.equal(a, b) for a, b in zip(pages[0], other))


def test_layout_and_dtype_of_what_is_appended_do_not_matter() -> None:
    k, v = torch.randn(2, 2, 100, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    q = torch.randn(2, 4, HEAD_DIM)
    outs = []
    for change in (
        lambda x: x,
        lambda x: x.float(),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        cache = kk.KVCache(2, HEADS, HEAD_DIM, "u2", page_size=16, sink_tokens=0, recent_tokens=16)
        cache.append(change(k), change(v), torch.tensor([100, 50]))
        outs.append(cache.attend(q))
    for out in outs[1:]:
        assert torch.equal(out, outs[0])


def test_fork_shares_full_pages_and_copies_only_the_last() -> None:
    model = Model(1, "u2", page_size=16, sink_tokens=16, recent_tokens=32)
    model.append(200)  # 12 full pages, one of 8 tokens
    pages = [p.used for p in model.cache._paging.pools]
    model.fork([0, 0, 0])
    assert [p.used for p in model.cache._paging.pools] == pages
    model.check()
    model.append(1)
    model.check()
    # the last of the three keeps the page
    assert [p.used for p in model.cache._paging.pools] == [pages[0] + 2, pages[1]]
    for _ in range(4):
        for _ in range(10):
            model.append(1)
        model.check()
    # Three places left the window since: two are still shared, in the third the sequences part.
    assert model.cache._paging.pools[PACKED].used == pages[1] + 2 + 3
    model.fork([2, 2, 1])
    model.append(5)
    model.check()


def test_the_window_pool_holds_no_more_than_the_windows() -> None:
    """However the text comes: 16-bit pages are sinks, recent tokens, one just begun and one about to be packed."""
    for format in ("u2", "kivi2"):
        for steps in ([1000], [1] * 300, [90] * 10, [500, *[1] * 50, 400]):
            cache = kk.KVCache(2, HEADS, HEAD_DIM, format, page_size=16, sink_tokens=16, recent_tokens=64)
            for n in steps:
                x = torch.zeros(2, n, HEADS, HEAD_DIM)
                cache.append(x, x)
            assert cache.kv.pools[WINDOW].shape[0] <= 2 * (1 + 4 + 2)


def test_max_tokens_takes_all_memory_at_once() -> None:
    cache = kk.KVCache(2, HEADS, HEAD_DIM, "u2", page_size=16, sink_tokens=16, recent_tokens=32, max_tokens=333)
    where = [pool.data_ptr() for pool in cache.kv.pools]
    table = cache.page_table.data_ptr()
    x = torch.zeros(2, 111, HEADS, HEAD_DIM)
    for _ in range(3):
        cache.append(x, x)
    assert [pool.data_ptr() for pool in cache.kv.pools] == where
    assert cache.page_table.data_ptr() == table
    with pytest.raises(ValueError, match="sequence 0 would have 334 tokens; max_tokens is 333"):
        cache.append(x[:, 0], x[:, 0])
    assert cache.seq_lens.tolist() == [333, 333]


def test_bits_per_element_counts_what_is_there() -> None:
    """At 32k tokens with the default windows: 2.125 bits, and 16 for the 64 + 256 tokens of the windows."""
    cache = kk.KVCache(1, 1, 128, "u2")
    assert math.isnan(cache.bits_per_element)
    x = torch.zeros(1, 32768, 1, 128, dtype=torch.bfloat16)
    cache.append(x, x)
    assert cache.bits_per_element == pytest.approx((2.125 * (32768 - 320) + 16 * 320) / 32768)
    assert cache.bits_per_element == cache.nbytes * 8 / (2 * 32768 * 128)
    cache.reset()
    assert cache.nbytes == 0
    cache.append(x[:, :1], x[:, :1])
    assert cache.bits_per_element == 16 * 64  # one token fills a page of 64


@pytest.mark.once
def test_inference_mode_may_come_and_go() -> None:
    model = Model(1, "u2", page_size=16, sink_tokens=16, recent_tokens=16)
    for step in range(8):
        with torch.inference_mode(step % 2 == 0):
            if step == 4:
                model.fork([0, 0])
            model.append(37)
            model.append(1)
            if step == 5:
                model.reset([0])
    model.check()
    with torch.inference_mode():
        cache = kk.KVCache(2, HEADS, HEAD_DIM, "u2", max_tokens=99)
    x = torch.zeros(2, HEADS, HEAD_DIM)
    cache.append(x, x)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"recent_tokens": -1}, "recent_tokens must be at least 0; got -1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1; got 0"),
        ({"format": "int9"}, 'unknown format "int9"; known formats: bf16'),
        ({"page_size": 24}, "page_size must be a multiple of 16"),
        ({"head_dim": 96}, "head_dim must be one of 64, 128, 256"),
    ],
)
def test_constructor_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kk.KVCache(**{"batch": 1, "num_kv_heads": 2, "head_dim": 64, "format": "u2", **options})


@pytest.mark.once
@pytest.mark.parametrize(
    ("shape", "v_shape", "lengths", "message"),
    [
        ((3, 5, 2, 64), (3, 5, 2, 64), None, "with B = 2, Hkv = 2, D = 64 from the cache; got"),
        ((2, 5, 2, 64), (2, 4, 2, 64), None, "v must have k's shape"),
        ((2, 2, 64), (2, 1, 2, 64), None, "k must be"),
        ((2, 5, 2, 64), (2, 5, 2, 64), [5], "2 numbers from 0 to T = 5; got"),
        ((2, 5, 2, 64), (2, 5, 2, 64), [5, 6], "2 numbers from 0 to T = 5; got"),
        ((2, 5, 2, 64), (2, 5, 2, 64), [5, -1], "2 numbers from 0 to T = 5; got"),
    ],
)
def test_append_errors(shape: tuple, v_shape: tuple, lengths: list[int] | None, message: str) -> None:
    cache = kk.KVCache(2, 2, 64, "u2")
    with pytest.raises(ValueError, match=message):
        cache.append(torch.zeros(shape), torch.zeros(v_shape), lengths)
    assert cache.seq_lens.tolist() == [0, 0]


@pytest.mark.once
def test_other_errors() -> None:
    cache = kk.KVCache(2, 2, 64, "u2")
    x = torch.zeros(2, 2, 64)
    with pytest.raises(TypeError, match="dtype must be bfloat16 or float16; got"):
        kk.KVCache(2, 2, 64, "u2", dtype=torch.float32)
    with pytest.raises(TypeError, match="format"):
        kk.KVCache(2, 2, 64)
    with pytest.raises(TypeError, match="v must be a tensor; got list"):
        cache.append(x, [1])
    with pytest.raises(TypeError, match="float"):
        cache.append(x[:, None], x[:, None], [0.5, 1])
    with pytest.raises(TypeError, match="k must be floating point"):
        cache.append(x.int(), x)
    with pytest.raises(ValueError, match="k requires grad"):
        cache.append(x.clone().requires_grad_(), x)
    with pytest.raises(ValueError, match=r"fork: src_rows must be 0 to 1; got \[2\]"):
        cache.fork([2])
    with pytest.raises(ValueError, match="at least one row"):
        cache.fork([])
    with pytest.raises(ValueError, match=r"reset: rows must be 0 to 1; got \[-1\]"):
        cache.reset([-1])
    cache.append(x[:, None][:, :0], x[:, None][:, :0])
    cache.reset([])
    assert cache.seq_lens.tolist() == [0, 0]
    assert not any(NO_PAGE in row for row in cache._paging.rows)
