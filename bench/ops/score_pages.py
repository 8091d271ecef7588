"""Scores of pages from their summaries, and of tokens from a label cache or the keys themselves. Llama-3-8B's heads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import kvkernels as kk
from bench.pages import HKV, HQ, D, pool_of, scattered
from bench.race import Contestant, Race

CASES = ((131072, 16), (131072, 64), (32768, 16))
QUICK = ((1024, 16),)


def races(threads: int, quick: bool) -> Iterator[Race]:
    for length, page in QUICK if quick else CASES:
        torch.manual_seed(0)
        n = length // page
        q = torch.randn(1, HQ, D, dtype=torch.bfloat16)
        kv, table, lens = pool_of("bf16", n, page), scattered([n]), torch.tensor([length], dtype=torch.int32)
        channels = torch.arange(0, D, 16, dtype=torch.int32).expand(HKV, -1).contiguous()
        contestants = []
        landmarks = kk.page_summaries(kv, table, lens, "mean")
        for kind, bits in (("minmax", 16), ("minmax", 8), ("mean", 16), ("mean", 8)):
            summaries = kk.page_summaries(kv, table, lens, kind, bits=bits)
            flops = 2.0 * n * HQ * D * (1 + (kind == "minmax"))
            run = partial(kk.score_pages, q, summaries, table, lens)
            contestants.append(Contestant(f"{kind}, {bits} bits", run, float(summaries.nbytes), flops))
        for bits in (16, 8, 4):
            labels = kk.page_summaries(kv, table, lens, "channels", bits=bits, channels=channels)
            flops = 2.0 * length * HQ * channels.shape[1]
            run = partial(kk.score_tokens, q, labels, table, lens)
            contestants.append(Contestant(f"labels, {bits} bits", run, float(labels.nbytes), flops))
        keys = 2.0 * length * HKV * D
        run = partial(kk.score_tokens, q, kv, table, lens)
        contestants.append(Contestant("exact", run, keys, 2.0 * length * HQ * D, rate="bf16"))
        run = partial(kk.score_pages, q, landmarks, table, lens, reduce="softmax_max")
        contestants.append(Contestant("mean, softmax_max", run, float(landmarks.nbytes), 2.0 * n * HQ * D))
        yield Race("score_pages", f"L{length} page {page}", threads, contestants, [])
