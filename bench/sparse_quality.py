"""What sparse attention loses on real keys and values: `python -m bench.sparse_quality [--results]`.

The recipes of docs/sparse.md decode tokens 448 .. 511 of the three layers in tests/data at several budgets. Prints the
softmax mass on the tokens that were read and the relative error of the output; --results writes both and a picture to
bench/results.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

import kvkernels as kk
from bench import build, picture, report
from bench.demo import CALIBRATION_KEYS, CALIBRATION_QUERIES, FIRST_QUERY, Layer, error, exact, load

BUDGETS = (32, 64, 128, 256)  # tokens of 449 to 512
RESULTS = build.ROOT / "bench" / "results" / "sparse-quality.md"
PICTURE = RESULTS.with_suffix(".svg")
PAGE, SHORT_PAGE = 16, 8


def recipes() -> SimpleNamespace:
    """The functions that docs/sparse.md defines, in one namespace."""
    text = (build.ROOT / "docs" / "sparse.md").read_text(encoding="utf-8")
    found: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(compile(block, "docs/sparse.md", "exec"), found)
    return SimpleNamespace(**found)


class Step(NamedTuple):
    """All decode steps of a layer: each is a sequence of its own length over the same pages."""

    layer: Layer
    q: Tensor  # [N, Hq, D]
    lens: Tensor  # [N]
    truth: Tensor  # [N, Hq, D] float64
    mass: Tensor  # [N, Hkv, T] mean softmax weight over the query heads of a KV head


def steps_of(layer: Layer) -> Step:
    positions = torch.arange(FIRST_QUERY + CALIBRATION_QUERIES, len(layer.k))
    layer = Layer(layer.q, layer.k.bfloat16().float(), layer.v.bfloat16().float())  # what the pages hold
    q = layer.q[positions - FIRST_QUERY]
    n, heads, dim = q.shape
    k = layer.k.double().repeat_interleave(heads // layer.k.shape[1], 1)
    scores = torch.einsum("nhd,thd->nht", q.double(), k) * dim**-0.5
    scores.masked_fill_(torch.arange(len(k)) > positions[:, None, None], -torch.inf)
    mass = scores.softmax(-1).view(n, layer.k.shape[1], -1, len(k)).mean(2)
    return Step(layer, q, (positions + 1).int(), exact(layer, positions), mass)


def cache(layer: Layer, name: str, page: int) -> tuple[kk.PagedKV, Tensor]:
    tokens, heads, dim = layer.k.shape
    basis = kk.calibrate_keys(layer.k[:CALIBRATION_KEYS], layer.q[:CALIBRATION_QUERIES])
    kv = kk.PagedKV.empty(name, tokens // page, heads, dim, page, transform=basis)
    kk.write_kv(layer.k, layer.v, kv, 0, torch.arange(tokens))
    return kv, torch.arange(tokens // page, dtype=torch.int32)[None]


def sentence_ends(tokens: int) -> Tensor:
    """Runs of 8 to 31 tokens: the fixture has no text, so that these only have the lengths of sentences."""
    lengths = torch.randint(8, 32, (tokens,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().clamp_max(tokens).unique()


class Method(NamedTuple):
    name: str
    colour: str
    # of a step and a budget: the output, and pages or tokens [N, Hkv, k] and how many tokens each is
    run: Callable[[Step, int], tuple[Tensor, Tensor, int]]
    layers: tuple[int, ...] = (0, 1, 2)


def methods(steps: list[Step]) -> list[Method]:
    do = recipes()
    pages16 = [cache(s.layer, "bf16", PAGE) for s in steps]
    pages8 = [cache(s.layer, "bf16", SHORT_PAGE) for s in steps]
    pages_u2 = [cache(s.layer, "u2", PAGE) for s in steps]
    whole = torch.tensor([len(steps[0].layer.k)], dtype=torch.int32)

    def at(step: Step, caches: list[tuple[kk.PagedKV, Tensor]]) -> tuple[kk.PagedKV, Tensor, Tensor]:
        kv, table = caches[next(i for i, s in enumerate(steps) if s is step)]
        return kv, table, table.expand(len(step.lens), -1).contiguous()

    def streaming(step: Step, budget: int) -> tuple[Tensor, Tensor, int]:
        kv, _, table = at(step, pages16)
        sinks = torch.arange(4).expand(len(step.lens), -1)
        recent = step.lens[:, None] - torch.arange(budget - 4, 0, -1)
        chosen = torch.cat([sinks, recent], 1)[:, None].expand(-1, kv.num_kv_heads, -1)
        return do.streaming_llm(step.q, kv, table, step.lens, 4, budget - 4), chosen, 1

    def quest(caches: list[tuple[kk.PagedKV, Tensor]], bits: int) -> Callable[[Step, int], tuple[Tensor, Tensor, int]]:
        def run(step: Step, budget: int) -> tuple[Tensor, Tensor, int]:
            kv, one, table = at(step, caches)
            bounds = kk.page_summaries(kv, one, whole, bits=bits)
            return (*do.quest(step.q, kv, bounds, table, step.lens, budget // PAGE), PAGE)

        return run

    def shadow(step: Step, budget: int) -> tuple[Tensor, Tensor, int]:
        kv, one, table = at(step, pages8)
        landmarks = kk.page_summaries(kv, one, whole, "mean")
        pages = budget // SHORT_PAGE
        # of the prompt: the pages before the first of these steps
        outliers = do.outlier_pages(step.layer.k[None, : int(step.lens[0])], SHORT_PAGE, pages // 4)
        outliers = outliers.expand(len(step.lens), -1, -1)
        found = do.shadow_kv(step.q, kv, landmarks, outliers, table, step.lens, pages, recent_pages=2)
        return (*found, SHORT_PAGE)

    def labels(share: int) -> Callable[[Step, int], tuple[Tensor, Tensor, int]]:
        def run(step: Step, budget: int) -> tuple[Tensor, Tensor, int]:
            kv, one, table = at(step, pages16)
            layer = step.layer
            count = layer.k.shape[-1] // share
            channels = kk.calibrate_channels(layer.k[:CALIBRATION_KEYS], layer.q[:CALIBRATION_QUERIES], count)
            records = kk.page_summaries(kv, one, whole, "channels", channels=channels)
            return (*do.double_sparsity(step.q, kv, records, table, step.lens, budget), 1)

        return run

    def sentences(step: Step, budget: int) -> tuple[Tensor, Tensor, int]:
        kv, _, table = at(step, pages16)
        ends = sentence_ends(len(step.layer.k))
        offsets = torch.minimum(ends[None], step.lens[:, None])
        records = kk.page_summaries(kv, table, step.lens, "mean", segments=offsets)
        last = step.lens - 1
        begin = ends[torch.searchsorted(ends, last, right=True) - 1]
        probe = torch.stack(
            [step.layer.q[b - FIRST_QUERY : e - FIRST_QUERY + 1].mean(0) for b, e in zip(begin, last, strict=True)]
        )
        sinks, recent = 4, budget // 4
        return (*do.sentence_kv(step.q, probe, kv, records, table, step.lens, budget, sinks, recent), 1)

    def best_mass(step: Step, budget: int) -> tuple[Tensor, Tensor, int]:
        kv, _, table = at(step, pages16)
        scores = kk.score_tokens(step.q, kv, table, step.lens, reduce="softmax_sum")
        chosen = kk.select_tokens(scores, step.lens, budget, sink_tokens=0, recent_tokens=0)
        return kk.sparse_attention(step.q, kv, table, step.lens, tokens=chosen), chosen, 1

    def tidal(selecting: int | None) -> Callable[[Step, int], tuple[Tensor, Tensor, int]]:
        def run(step: Step, budget: int) -> tuple[Tensor, Tensor, int]:
            other = step if selecting is None else steps[selecting]
            kv, _, table = at(other, pages16)
            _, chosen = do.tidal_decode(2, other.q, kv, table, step.lens, budget)
            kv, _, table = at(step, pages16)
            return (*do.tidal_decode(3, step.q, kv, table, step.lens, budget, chosen), 1)

        return run

    return [
        Method("StreamingLLM, 4 sinks", "#868e96", streaming),
        Method("Quest, pages of 16", "#0b7285", quest(pages16, 16)),
        Method("Quest, 8-bit bounds", "#66d9e8", quest(pages16, 8)),
        Method("Quest on u2 pages", "#c2255c", quest(pages_u2, 16)),
        Method("ShadowKV landmarks, pages of 8", "#5f3dc4", shadow),
        Method("SentenceKV, runs of 8 to 31", "#e8590c", sentences),
        Method("Double Sparsity, 1/8 of the channels", "#2b8a3e", labels(8)),
        Method("Double Sparsity, 1/16 of the channels", "#8ce99a", labels(16)),
        Method("TidalDecode, lists of layer 15 in 29", "#f08c00", tidal(1), (2,)),
        Method("best tokens by q.k (its own layer)", "#495057", tidal(None)),
        Method("best tokens by softmax mass", "#1f2933", best_mass),
    ]


class Found(NamedTuple):
    method: Method
    mass: list[float]  # per budget, mean over layers
    error: list[float]


def covered(step: Step, chosen: Tensor, size: int) -> float:
    tokens = step.mass.shape[-1]
    read = torch.zeros(*chosen.shape[:2], tokens + size, dtype=torch.bool)
    places = torch.where(chosen < 0, tokens, chosen * size).long()
    for i in range(size):
        read.scatter_(2, places + i, True)
    return (step.mass * read[..., :tokens]).sum(-1).mean().item()


def measure(budgets: tuple[int, ...] = BUDGETS) -> list[Found]:
    steps = [steps_of(layer) for layer in load()]
    found = []
    for method in methods(steps):
        masses, errors = [], []
        for budget in budgets:
            mass = wrong = 0.0
            for i in method.layers:
                out, chosen, size = method.run(steps[i], budget)
                mass += covered(steps[i], chosen, size) / len(method.layers)
                wrong += error(out, steps[i].truth) / len(method.layers)
            masses.append(mass)
            errors.append(wrong)
        found.append(Found(method, masses, errors))
    return found


def tables(found: list[Found], budgets: tuple[int, ...] = BUDGETS) -> str:
    parts = []
    for title, values in (
        ("softmax mass on what is read", [f.mass for f in found]),
        ("relative error of the output", [f.error for f in found]),
    ):
        body = [[f.method.name, *(f"{100 * x:.1f} %" for x in row)] for f, row in zip(found, values, strict=True)]
        parts.append(report.table([title, *(f"{b} tokens" for b in budgets)], body))
    return "\n\n".join(parts)


def draw(found: list[Found], budgets: tuple[int, ...] = BUDGETS) -> str:
    series = []
    for f in found:
        points = [picture.Point(b, e, "") for b, e in zip(budgets, f.error, strict=True)]
        series.append(picture.Series(f.method.name, f.method.colour, points, True))
    return picture.scatter(
        "Error of the attention output over tokens read",
        "SmolLM2-135M, layers 0, 15 and 29, 64 decode steps at 449 to 512 tokens",
        "tokens read per KV head (log scale)",
        "relative error",
        series,
        [*budgets, 512],  # the last: all there are
        [0, 0.2, 0.4, 0.6, 0.8, 1.0],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", action="store_true", help=f"write {RESULTS.relative_to(build.ROOT)} and a picture")
    args = parser.parse_args()
    found = measure()
    text = tables(found)
    print(text)
    if args.results:
        head = f"""# Sparse attention on real keys

Generated by `python -m bench.sparse_quality --results` from the recipes of [docs/sparse.md](../../docs/sparse.md).

SmolLM2-135M, layers 0, 15 and 29 (`tests/data`), 9 query heads on 3 KV heads of 64, decode steps of tokens 448 to 511,
mean over layers and steps, bf16 pages. A budget holds everything that is read: sinks, recent tokens, outliers. Labels
are calibrated on keys 0 to 255 and queries 384 to 447, not on those steps. 512 tokens are few: a budget of 32 is 1/16
of them. The runs of SentenceKV have the lengths of sentences, but are none.

![error over budget]({PICTURE.name})
"""
        RESULTS.write_text(f"{head}\n{text}\n")
        PICTURE.write_text(draw(found))
        print(f"written: {RESULTS}, {PICTURE}")


if __name__ == "__main__":
    main()
