"""What only a GPU can show: graphs, streams, devices, memory of torch's own. KVKERNELS_TEST_DEVICE=cuda runs these."""

from typing import Any

import pytest
import torch
from backends import DEVICE, on_gpu_only
from conftest import assert_as_good_as, tensors_of, to_device
from torch import Tensor

import kvkernels as kk
from kvkernels.formats import encode_page
from kvkernels.ops import OPS

pytestmark = [on_gpu_only, pytest.mark.once]

HEADS, D, PAGE = 2, 128, 64


class Step:
    """A decode step on static tensors: write a token per sequence, pack a page, find what is shared, attend, merge;
    choose pages, bring them from main memory, attend to them, and to chosen tokens.
    Lengths, slots, the page table and the pairs are data, so a graph of it serves any of them."""

    def __init__(self, batch: int, pages: int):
        kv = kk.PagedKV.empty(["bf16", "u2"], batch * pages, HEADS, D, PAGE, device=DEVICE)
        gen = torch.Generator().manual_seed(0)
        k, v = torch.randn(2, batch * pages, HEADS, PAGE, D, generator=gen)
        for pool in (0, 1):
            kv.pools[pool].copy_(encode_page(kv.formats[pool], k, v, None))  # type: ignore[union-attr]
        self.kv, self.pages = kv, pages
        self.q = torch.zeros(batch, 4 * HEADS, D, dtype=torch.bfloat16, device=DEVICE)
        self.k = torch.zeros(batch, HEADS, D, dtype=torch.bfloat16, device=DEVICE)
        self.slots = torch.full((batch,), -1, dtype=torch.int64, device=DEVICE)
        self.pairs = torch.full((1, 2), -1, dtype=torch.int32, device=DEVICE)
        self.table = torch.zeros(batch, pages, dtype=torch.int32, device=DEVICE)
        self.lens = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
        self.summaries = kk.page_summaries(kv, self.table, self.lens)
        self.small, self.offloaded = kk.offload(kv, 1, 6, batch, pages)

    def fill(self, seed: int) -> None:
        gen = torch.Generator().manual_seed(seed)
        batch = len(self.lens)
        self.q.copy_(torch.randn(self.q.shape, generator=gen))
        self.k.copy_(torch.randn(self.k.shape, generator=gen))
        lens = torch.randint(0, self.pages * PAGE, (batch,), generator=gen)
        own = torch.arange(batch)[:, None] * self.pages + torch.arange(self.pages)
        pool = torch.randint(0, 2, own.shape, generator=gen)
        last = torch.arange(self.pages) == (lens // PAGE)[:, None]
        table = pool.where(~last, 0) << 28 | own
        for b in range(1, batch):  # some begin as the one before does
            shared = int(torch.randint(0, self.pages, (1,), generator=gen)) if (b + seed) % 3 else 0
            shared = min(shared, int(lens[b]) // PAGE, int(lens[b - 1]) // PAGE)
            table[b, :shared] = table[b - 1, :shared]
        self.table.copy_(table.int())
        self.lens.copy_((lens + 1).int())
        self.slots.copy_(own[torch.arange(batch), lens // PAGE] * PAGE + lens % PAGE)
        self.pairs.copy_(torch.tensor([[seed % len(own), (seed + 1) % len(own)]], dtype=torch.int32))

    def run(self) -> tuple[Tensor, ...]:
        kk.write_kv(self.k, self.k, self.kv, 0, self.slots)
        kk.pack_pages(self.kv, 0, 1, self.pairs)
        out, lse = kk.quant_attention(self.q, self.kv, self.table, self.lens, return_lse=True)
        plan = kk.plan_prefix(self.table, self.lens, PAGE, min_tokens=0)
        planned = kk.prefix_attention(self.q, self.kv, self.table, self.lens, plan=plan, return_lse=True)
        merged = kk.merge_states([out, planned[0]], [lse, planned[1]])
        read = kk.read_kv(self.kv, 0, self.slots, torch.bfloat16)
        return out, lse, *plan, *planned, *merged, *read, kk.fwht(out), *self.sparse()

    def sparse(self) -> tuple[Tensor, ...]:
        table, lens = self.table, self.lens
        summaries = kk.page_summaries(self.kv, table, lens, out=self.summaries)
        pages = kk.select_pages(kk.score_pages(self.q, summaries, table, lens), lens, 5, page_size=PAGE)
        for b in range(len(lens)):  # pages of host are others with each table
            self.offloaded.reset(b)
        entries = kk.gather_pages(self.offloaded, table, pages)
        coarse = kk.sparse_attention(self.q, self.small, table, lens, pages=pages, entries=entries)
        tokens = kk.select_tokens(kk.score_tokens(self.q, self.kv, table, lens), lens, 80)
        return pages, entries, coarse, tokens, kk.sparse_attention(self.q, self.kv, table, lens, tokens=tokens)


@pytest.mark.traced
def test_a_graph_replays_with_other_lengths_and_slots() -> None:
    step, eager = Step(5, 9), Step(5, 9)
    step.fill(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what must be loaded before a capture
        for _ in range(2):
            step.run()
    stream.synchronize()
    for mine, truth in zip(step.kv.pools, eager.kv.pools):
        mine.copy_(truth)  # type: ignore[union-attr, arg-type]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step.run()
    for seed in range(6):
        step.fill(seed)
        eager.fill(seed)
        graph.replay()
        for i, (mine, truth) in enumerate(zip(results, eager.run())):
            assert torch.equal(mine, truth), f"result {i} of seed {seed}"
        for mine, truth in zip(step.kv.pools, eager.kv.pools):
            assert torch.equal(mine, truth)  # type: ignore[arg-type]


@pytest.mark.traced
def test_work_goes_to_the_current_stream_and_nothing_waits() -> None:
    step = Step(5, 9)
    step.fill(3)
    want = [t.clone() for t in step.run()]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    q = step.q.clone()
    step.q.zero_()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # the copy and the step wait behind this; work on another stream would not
        step.q.copy_(q)
        torch.cuda.set_sync_debug_mode("error")
        got = step.run()
        torch.cuda.set_sync_debug_mode("default")
        assert not side.query(), "an op waited for the GPU"
    side.synchronize()
    for mine, truth in zip(got, want):
        assert torch.equal(mine, truth)


@pytest.mark.traced
@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_counts_not_the_current_one() -> None:
    args, options = OPS["quant_attention"].make(OPS["quant_attention"].cases()[0])
    want = kk.quant_attention(*to_device(args), **options)
    with torch.cuda.device(0):
        there = [x.to("cuda:1") if isinstance(x, Tensor) else x for x in to_device(args)]
        there[1] = args[1]._replace(pools=tuple(p.to("cuda:1") for p in args[1].pools), transform=None)
        assert torch.equal(kk.quant_attention(*there, **options)[0].cpu(), want[0].cpu())


@pytest.mark.traced
@pytest.mark.parametrize("name", OPS)
def test_ops_take_tensors_of_the_gpu(name: str) -> None:
    """Without the copies of tests/backends.py: outputs and workspaces are allocated where the inputs are."""
    op = OPS[name]
    case = next(c for c in op.cases() if 0 not in (*(c.get(k) for k in "TNSB"), *c.get("rows", ())))
    args, kwargs = op.make(case)
    moved = to_device(args)
    got = getattr(kk, name)(*moved, **to_device(kwargs))
    results = tensors_of(got)
    assert all(r.device.type == "cuda" for r in results)
    for i, mine in enumerate(results):
        exact, plain = (
            op.reference(*args, **{**kwargs, "dtype": dtype}) for dtype in (torch.float64, results[0].dtype)
        )
        exact, plain = tensors_of(exact)[i], tensors_of(plain)[i]
        assert_as_good_as(mine.cpu(), plain, exact, f"result {i}")
    if got is None:
        op.reference(*args, **kwargs)
    for mine, truth in zip(tensors_of(moved), tensors_of(args)):
        torch.testing.assert_close(mine.cpu(), truth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.traced
@pytest.mark.parametrize("format", ["u2", "kivi2", "bf16", "u3/u2"])
def test_a_cache_on_the_gpu_holds_the_bytes_of_one_on_the_cpu(format: str) -> None:
    gen = torch.Generator().manual_seed(1)
    caches = [
        kk.KVCache(2, HEADS, D, format, page_size=16, sink_tokens=16, recent_tokens=32, device=d)
        for d in ("cpu", DEVICE)
    ]
    for tokens in (200, 1, 1, 37):
        k, v = torch.randn(2, 2, tokens, HEADS, D, generator=gen)
        for cache in caches:
            cache.append(k.to(cache.page_table.device), v.to(cache.page_table.device))
    cpu, gpu = caches
    assert torch.equal(cpu.page_table, gpu.page_table.cpu())
    for mine, truth in zip(gpu.kv.pools, cpu.kv.pools):
        assert torch.equal(mine.cpu(), truth)  # type: ignore[union-attr, arg-type]
    q = torch.randn(2, 4 * HEADS, D, generator=gen).bfloat16()
    torch.testing.assert_close(gpu.attend(q.to(DEVICE)).cpu(), cpu.attend(q), rtol=0, atol=2e-2)


@pytest.mark.traced
def test_tensors_on_two_devices_are_refused() -> None:
    (q, kv, table, lens), _ = OPS["quant_attention"].make(OPS["quant_attention"].cases()[0])
    with pytest.raises(ValueError, match="quant_attention: pool 0 is on cpu, but q is on cuda:0"):
        kk.quant_attention(q.to(DEVICE), kv, table, lens)


@pytest.mark.traced
def test_calibration_stays_on_the_gpu() -> None:
    k = torch.randn(100, HEADS, D, device=DEVICE)
    q = torch.randn(100, 4 * HEADS, D, device=DEVICE)
    found: Any = kk.calibrate_keys(k, q)
    assert {t.device for t in found} == {k.device}
    assert kk.calibrate_channels(k, q).device == k.device
