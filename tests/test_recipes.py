"""The recipes of docs/sparse.md against a plain reading of their papers: what is chosen, and what comes out in float64.

Keys are real (tests/data) and bf16, queries float32, two sequences of unlike lengths. The query heads of a KV head
choose as one.
"""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import kvkernels as kk

pytest.importorskip("numpy")
from bench.demo import load
from bench.sparse_quality import recipes

LENGTHS = (512, 437)
PAGE = 16


class Problem(NamedTuple):
    q: Tensor  # [B, Hq, D]
    k: list[Tensor]  # of each sequence [L, Hkv, D] bf16
    v: list[Tensor]
    seq_lens: Tensor

    def cache(self, page: int, name: str = "bf16") -> tuple[kk.PagedKV, Tensor]:
        pages = -(-max(LENGTHS) // page)
        order = torch.randperm(len(LENGTHS) * pages, generator=torch.Generator().manual_seed(0))
        table = order.view(len(LENGTHS), pages).int()
        _, heads, dim = self.k[0].shape
        kv = kk.PagedKV.empty(name, table.numel(), heads, dim, page)
        for row, k, v in zip(table.long(), self.k, self.v, strict=True):
            tokens = torch.arange(len(k))
            kk.write_kv(k, v, kv, 0, row[tokens // page] * page + tokens % page)
        return kv, table

    def grouped(self, b: int) -> Tensor:
        """Queries of a sequence [Hkv, G, D], float64."""
        heads, dim = self.k[0].shape[1:]
        return self.q[b].double().view(heads, -1, dim)

    def keys(self, b: int) -> Tensor:
        return self.k[b].double().transpose(0, 1)  # [Hkv, L, D]

    def attention(self, read: list[Tensor]) -> Tensor:
        """Of what a KV head reads: bool [Hkv, L] per sequence."""
        outs = []
        for b, seen in enumerate(read):
            scores = self.grouped(b) @ self.keys(b).transpose(1, 2) * self.q.shape[-1] ** -0.5
            weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
            outs.append((weights @ self.v[b].double().transpose(0, 1)).flatten(0, 1))
        return torch.stack(outs)


@pytest.fixture(scope="module")
def do() -> SimpleNamespace:
    return recipes()


@pytest.fixture(scope="module")
def problem() -> Problem:
    layers = [load()[i] for i in (1, 2)]
    k, v = ([getattr(x, name)[:n].bfloat16() for x, n in zip(layers, LENGTHS, strict=True)] for name in "kv")
    q = torch.stack([x.q[n - 512 - 1] for x, n in zip(layers, LENGTHS, strict=True)])
    return Problem(q, k, v, torch.tensor(LENGTHS, dtype=torch.int32))


def best(scores: Tensor, count: int, always: list[int]) -> list[list[int]]:
    """Per row, `always` and the highest scores of the others, `count` in all; of equal ones the first."""
    rows = []
    for row in scores.tolist():
        rest = sorted((i for i in range(len(row)) if i not in always), key=lambda i: (-row[i], i))
        rows.append(sorted(always + rest[: count - len(always)]))
    return rows


def tokens_of(chosen: list[list[int]], size: int, length: int) -> Tensor:
    read = torch.zeros(len(chosen), length, dtype=torch.bool)
    for row, items in zip(read, chosen, strict=True):
        for i in items:
            row[i * size : (i + 1) * size] = True
    return read


def check(problem: Problem, out: Tensor, chosen: Tensor, expected: list[list[list[int]]], size: int) -> None:
    for b, rows in enumerate(expected):
        assert [[i for i in row if i >= 0] for row in chosen[b].tolist()] == rows
    read = [tokens_of(rows, size, n) for rows, n in zip(expected, LENGTHS, strict=True)]
    torch.testing.assert_close(out.double(), problem.attention(read), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("pages", [3, 8, 40])
def test_quest(do: SimpleNamespace, problem: Problem, pages: int) -> None:
    kv, table = problem.cache(PAGE)
    bounds = kk.page_summaries(kv, table, problem.seq_lens)
    out, chosen = do.quest(problem.q, kv, bounds, table, problem.seq_lens, pages)
    expected = []
    for b in range(len(LENGTHS)):
        q, chunks = problem.grouped(b), problem.keys(b).split(PAGE, 1)
        above = [torch.maximum(q * c.amax(1)[:, None], q * c.amin(1)[:, None]).sum(-1).amax(1) for c in chunks]
        expected.append(best(torch.stack(above, 1), pages, [len(chunks) - 1]))
    check(problem, out, chosen, expected, PAGE)


def test_tidal_decode(do: SimpleNamespace, problem: Problem) -> None:
    """Layer 2 attends to everything and chooses; layer 3 attends to that, with other queries."""
    kv, table = problem.cache(PAGE)
    out, none = do.tidal_decode(0, problem.q, kv, table, problem.seq_lens, 64)
    everything = problem.attention([torch.ones(3, n, dtype=torch.bool) for n in LENGTHS])
    torch.testing.assert_close(out.double(), everything, rtol=2e-5, atol=2e-6)
    assert none is None
    out, chosen = do.tidal_decode(2, problem.q, kv, table, problem.seq_lens, 64)
    torch.testing.assert_close(out.double(), everything, rtol=2e-5, atol=2e-6)
    expected = [
        best((problem.grouped(b) @ problem.keys(b).transpose(1, 2)).amax(1), 64, []) for b in range(len(LENGTHS))
    ]
    later = problem._replace(q=problem.q.flip(0))
    out, same = do.tidal_decode(3, later.q, kv, table, problem.seq_lens, 64, chosen)
    assert same is chosen
    check(later, out, chosen, expected, 1)


@pytest.mark.parametrize("share", [8, 16])
def test_double_sparsity(do: SimpleNamespace, problem: Problem, share: int) -> None:
    kv, table = problem.cache(PAGE)
    heads, dim = problem.k[0].shape[1:]
    calibration = load()[0]
    channels = kk.calibrate_channels(calibration.k, calibration.q, dim // share)
    weight = calibration.k.abs().mean(0) * calibration.q.abs().mean(0).view(heads, -1, dim).mean(1)
    heavy = weight.topk(dim // share, -1).indices.sort(-1).values
    assert torch.equal(channels.long(), heavy)
    labels = kk.page_summaries(kv, table, problem.seq_lens, "channels", channels=channels)
    out, chosen = do.double_sparsity(problem.q, kv, labels, table, problem.seq_lens, 32)
    expected = []
    for b, n in enumerate(LENGTHS):
        q = problem.grouped(b).gather(2, heavy[:, None].expand(-1, 3, -1))
        k = problem.keys(b).gather(2, heavy[:, None].expand(-1, n, -1))
        expected.append(best((q @ k.transpose(1, 2)).amax(1), 32, []))
    check(problem, out, chosen, expected, 1)


def test_shadow_kv(do: SimpleNamespace, problem: Problem) -> None:
    page, pages, count, recent = 8, 16, 4, 4
    kv, table = problem.cache(page)
    landmarks = kk.page_summaries(kv, table, problem.seq_lens, "mean")
    outliers = torch.cat([do.outlier_pages(k[None], page, count) for k in problem.k])
    out, chosen = do.shadow_kv(problem.q, kv, landmarks, outliers, table, problem.seq_lens, pages, recent)
    expected = []
    for b, n in enumerate(LENGTHS):
        chunks = problem.keys(b).split(page, 1)
        means = torch.stack([c.mean(1) for c in chunks], 1).bfloat16().double()
        scores = (problem.grouped(b) @ means.transpose(1, 2) * problem.q.shape[-1] ** -0.5).softmax(-1).amax(1)
        rows = []
        for h in range(len(scores)):
            unlike = [1 - torch.cosine_similarity(c[h], c[h].mean(0), -1).min().item() for c in chunks[: n // page]]
            kept = sorted(range(len(unlike)), key=lambda i: -unlike[i])[:count]
            assert sorted(outliers[b, h].tolist()) == sorted(kept)
            always = sorted({*kept, *range(len(chunks) - recent, len(chunks))})
            rows += best(scores[h : h + 1], pages, always)
        expected.append(rows)
    check(problem, out, chosen, expected, page)


def test_sentence_kv(do: SimpleNamespace, problem: Problem) -> None:
    """Sentences best first, as far as the budget goes; the one that does not fit gives its first tokens."""
    kv, table = problem.cache(PAGE)
    gen = torch.Generator().manual_seed(3)
    ends = [torch.cat([torch.zeros(1), torch.randint(5, 40, (40,), generator=gen).cumsum(0)]).int() for _ in LENGTHS]
    offsets = torch.stack([e.clamp_max(n) for e, n in zip(ends, LENGTHS, strict=True)])
    sentences = kk.page_summaries(kv, table, problem.seq_lens, "mean", segments=offsets)
    probe = problem.q + 0.1 * problem.q.flip(0)
    tokens, sinks, recent = 128, 8, 16
    out, chosen = do.sentence_kv(problem.q, probe, kv, sentences, table, problem.seq_lens, tokens, sinks, recent)
    expected = []
    for b, n in enumerate(LENGTHS):
        spans = [(i, j) for i, j in zip(offsets[b].tolist(), offsets[b, 1:].tolist(), strict=False) if i < j]
        means = torch.stack([problem.keys(b)[:, i:j].mean(1) for i, j in spans], 1).bfloat16().double()
        scores = (problem._replace(q=probe).grouped(b) @ means.transpose(1, 2)).amax(1)
        rows = []
        for row in scores.tolist():
            read = {*range(sinks), *range(n - recent, n)}
            for s in sorted(range(len(spans)), key=lambda s: -row[s]):
                for t in range(*spans[s]):
                    if len(read) < tokens:
                        read.add(t)
            rows.append(sorted(read))
        expected.append(rows)
    check(problem, out, chosen, expected, 1)


def test_streaming_llm(do: SimpleNamespace, problem: Problem) -> None:
    kv, table = problem.cache(PAGE)
    out = do.streaming_llm(problem.q, kv, table, problem.seq_lens, 4, 60)
    read = []
    for n in LENGTHS:
        seen = torch.zeros(3, n, dtype=torch.bool)
        seen[:, :4] = seen[:, n - 60 :] = True
        read.append(seen)
    torch.testing.assert_close(out.double(), problem.attention(read), rtol=2e-5, atol=2e-6)


def test_offloaded_step(do: SimpleNamespace, problem: Problem) -> None:
    """The same as reading the chosen pages in place, step after step, with few slots."""
    kv, table = problem.cache(PAGE)
    bounds = kk.page_summaries(kv, table, problem.seq_lens)
    small, store = kk.offload(kv, 0, slots=6, batch=len(LENGTHS), max_pages=table.shape[1])
    for step in range(3):
        q = problem.q.roll(step, 1)
        out = do.offloaded_step(q, small, store, bounds, table, problem.seq_lens, 6)
        chosen = kk.select_pages(
            kk.score_pages(q, bounds, table, problem.seq_lens), problem.seq_lens, 6, page_size=PAGE
        )
        assert torch.equal(out, kk.sparse_attention(q, kv, table, problem.seq_lens, pages=chosen))


def test_quality() -> None:
    """On real keys: more is better, and nothing covers more mass than the tokens that have it."""
    from bench.sparse_quality import measure

    found = {f.method.name: f for f in measure((64, 128))}
    most = found["best tokens by softmax mass"]
    for f in found.values():
        assert f.mass[1] > f.mass[0]
        assert f.error[1] < f.error[0]
        if len(f.method.layers) == len(most.method.layers):
            assert all(a <= b + 1e-6 for a, b in zip(f.mass, most.mass, strict=True))
    assert most.error[1] < found["StreamingLLM, 4 sinks"].error[1]
    assert found["Quest, 8-bit bounds"].error[1] < 1.1 * found["Quest, pages of 16"].error[1]
