"""The main job on real input: `python -m bench.demo`, which `make demo` calls.

Packs the keys and values of three layers of a real model with every format; prints bytes, bits, the error of the
attention output and the time of a decode step; draws error over bits. Then 32k tokens with the same outlier channels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import kvkernels as kk
from bench import build, peers, picture, report
from bench.pages import attend
from bench.race import in_turn

FIXTURE = build.ROOT / "tests" / "data" / "smollm2_kv.npz"
PICTURE = build.ROOT / "build" / "demo.svg"
LAYERS = (0, 15, 29)
FIRST_QUERY = 384  # the fixture holds the queries of the last 128 of 512 tokens
# Keys 16 .. 255 and queries 384 .. 447 calibrate; the queries of 448 .. 511 are the decode steps that are measured.
CALIBRATION_KEYS, CALIBRATION_QUERIES = 256, 64
LONG = 32768


class Layer(NamedTuple):
    """q [128, Hq, D], k and v [512, Hkv, D], fp32."""

    q: Tensor
    k: Tensor
    v: Tensor


class Row(NamedTuple):
    """A way of storing: format, the key basis, and tokens kept in 16 bits at the start."""

    format: str
    basis: str = "both"
    sinks: int = 0

    @property
    def name(self) -> str:
        return self.format + (f" + {self.sinks} sinks" if self.sinks else "")


ROWS = (
    Row("f16", "-"),
    Row("bf16", "-"),
    Row("u8"),
    Row("u4"),
    Row("u4/u2"),
    Row("u3"),
    Row("u3/u2"),
    Row("kivi2", "-"),
    Row("u2", "rotation only"),
    Row("u2", "centre"),
    Row("u2", "balance"),
    Row("u2"),
    Row("u2", sinks=16),
    Row("m42/u2.e5m3", sinks=16),
    Row("m31/u2.e5m3", sinks=16),
    Row("m31/t1.e5m3", sinks=16),
    Row("m31/b1.e5m3", sinks=16),
)
LONG_ROWS = ("bf16", "u8", "u4", "u3", "u3/u2", "kivi2", "u2", "m31/u2.e5m3", "m31/t1.e5m3", "m31/b1.e5m3")


def load() -> list[Layer]:
    data = np.load(FIXTURE)
    names = ("q_post_last128", "k_post", "v")
    return [
        Layer(*(torch.from_numpy(data[f"l{i}_{name}"]).float().transpose(0, 1).contiguous() for name in names))
        for i in LAYERS
    ]


def transform(layer: Layer, basis: str) -> kk.KVTransform | None:
    """The key basis of a row, from tokens and queries that are not measured."""
    if basis in ("-", "rotation only"):
        return None
    both = kk.calibrate_keys(layer.k[:CALIBRATION_KEYS], layer.q[:CALIBRATION_QUERIES])
    if basis == "centre":
        return both._replace(balance=torch.ones_like(both.balance))
    if basis == "balance":
        return both._replace(centre=torch.zeros_like(both.centre))
    return both


def pack(k: Tensor, v: Tensor, row: Row, basis: kk.KVTransform | None, page: int) -> tuple[kk.PagedKV, Tensor, int]:
    """k, v [T, Hkv, D] as pages of a format, the first `sinks` tokens as bf16 pages; the page table; bytes in use."""
    tokens, heads, dim = k.shape
    pages, kept = tokens // page, row.sinks // page
    kv = kk.PagedKV.empty(("bf16", row.format), pages, heads, dim, page, transform=basis)
    k16, v16 = k.bfloat16(), v.bfloat16()
    kk.write_kv(k16, v16, kv, 0, torch.arange(tokens))
    if kv.formats[1].whole_pages:
        kk.pack_pages(kv, 0, 1, torch.arange(pages, dtype=torch.int32)[:, None].repeat(1, 2))
    else:
        kk.write_kv(k, v, kv, 1, torch.arange(tokens))
    table = torch.tensor([kv.entry(0 if i < kept else 1, i) for i in range(pages)], dtype=torch.int32)
    used = sum(heads * f.page_bytes(page, dim) * n for f, n in zip(kv.formats, (kept, pages - kept), strict=True))
    if not kept:
        kv, table = kk.PagedKV((kv.pools[1],), (kv.formats[1],), page, basis), table & (2**28 - 1)
    return kv, table, used


def exact(layer: Layer, positions: Tensor) -> Tensor:
    """Causal attention of the queries at these positions in float64: [N, Hq, D]."""
    q = layer.q[positions - FIRST_QUERY].double()
    group = q.shape[1] // layer.k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (layer.k, layer.v))
    scores = torch.einsum("nhd,thd->nht", q, k) * q.shape[-1] ** -0.5
    scores.masked_fill_(torch.arange(k.shape[0]) > positions[:, None, None], -torch.inf)
    return torch.einsum("nht,thd->nhd", scores.softmax(-1), v)


def error(out: Tensor, truth: Tensor) -> float:
    return ((out.double() - truth).norm() / truth.norm()).item()


class Packed(NamedTuple):
    row: Row
    bytes: int  # of one layer
    bits: float
    error: float  # mean over the layers
    step: Callable[[], Tensor]  # the last decode step of the middle layer


def real(layers: list[Layer]) -> list[Packed]:
    """Every row on every layer; each decode step is a sequence of its own length over the same pages."""
    positions = torch.arange(FIRST_QUERY + CALIBRATION_QUERIES, layers[0].k.shape[0])
    truths = [exact(layer, positions) for layer in layers]
    found = []
    for row in ROWS:
        errors, steps = [], []
        for layer, truth in zip(layers, truths, strict=True):
            kv, table, used = pack(layer.k, layer.v, row, transform(layer, row.basis), 16 if row.sinks else 64)
            lens = (positions + 1).int()
            out = attend(layer.q[positions - FIRST_QUERY], kv, table.expand(len(lens), -1).contiguous(), lens)
            errors.append(error(out, truth))
            q16 = layer.q[-1:].bfloat16()
            steps.append(partial(attend, q16, kv, table[None], lens[-1:]))
        bits = used * 8 / (2 * layers[0].k.numel())
        found.append(Packed(row, used, bits, sum(errors) / len(errors), steps[len(steps) // 2]))
    return found


def real_table(packed: list[Packed], layer: Layer) -> str:
    q, k, v = layer.q[-1:].bfloat16(), *(x.transpose(0, 1)[None].bfloat16().contiguous() for x in (layer.k, layer.v))
    runs: dict[str, Callable[[], object]] = {"sdpa": partial(peers.sdpa, q, k, v)}
    runs |= {f"{p.row}": p.step for p in packed}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # 20 us are not worth a second one
    times = in_turn(runs, inner=50, min_rounds=5, max_rounds=9, budget=3.0)
    torch.set_num_threads(threads)
    body = []
    for p in packed:
        ratio = median(b / a for a, b in zip(times[f"{p.row}"], times["sdpa"], strict=True))
        body.append(
            [
                p.row.name,
                p.row.basis,
                f"{p.bytes:,}",
                f"{p.bits:.3f}",
                f"{100 * p.error:.2f} %",
                report.duration(median(times[f"{p.row}"])),
                f"{ratio:.1f}",
            ]
        )
    body.append(
        ["torch SDPA", "bf16", f"{2 * k.numel() * 2:,}", "16.000", "", report.duration(median(times["sdpa"])), ""]
    )
    return report.table(
        ["K and V", "key basis", "bytes", "bits/element", "error", "decode step", "x SDPA"], body, left=2
    )


def draw(packed: list[Packed]) -> str:
    def points(keep: Callable[[Row], bool], label: Callable[[Row], str], right: bool = True) -> list[picture.Point]:
        return [picture.Point(p.bits, p.error, label(p.row), right) for p in packed if keep(p.row)]

    one = [
        picture.Series(
            "centred, balanced, rotated", "#0b7285",
            points(lambda r: r.basis == "both" and "/" not in r.format and not r.sinks, lambda r: r.format), True,
        ),
        picture.Series(
            "K and V differ", "#5f3dc4",
            points(lambda r: "/" in r.format and not r.sinks, lambda r: r.format),
        ),
        picture.Series("with 16 sink tokens in 16 bits", "#2b8a3e", points(lambda r: r.sinks > 0, lambda r: r.name)),
        picture.Series(
            "u2, parts of the key basis", "#e8590c",
            points(lambda r: r.format == "u2" and r.basis not in ("both",), lambda r: r.basis, False),
        ),
        picture.Series("KIVI, pages of 64", "#c2255c", points(lambda r: r.format == "kivi2", lambda r: r.format)),
        picture.Series("bf16", "#868e96", points(lambda r: r.format == "bf16", lambda r: r.format, False)),
    ]  # fmt: skip
    return picture.scatter(
        "Error of the attention output over bits per element",
        "SmolLM2-135M, layers 0, 15 and 29, 64 decode steps at 449 to 512 tokens; metadata counted",
        "bits per element of K and V (log scale)",
        "relative error",
        one,
        [1.5, 2, 3, 4, 6, 8, 12, 16],
        [0, 0.1, 0.2, 0.3, 0.4],
    )


def synthetic(layers: list[Layer], tokens: int, heads: int, group: int, dim: int) -> Layer:
    """Gaussian numbers with the channel means and deviations of real heads, two of which make a head of 128."""
    generator = torch.Generator().manual_seed(0)

    def like(name: str, tokens: int, group: int) -> Tensor:
        real = torch.cat([getattr(layer, name).transpose(0, 1) for layer in layers])  # [layers * heads, T, D]
        if name != "q":
            real = real[:, 16:]  # sinks are unlike all others
        kv_heads = len(layers) * layers[0].k.shape[1]
        per = len(real) // kv_heads
        pick = torch.tensor([[(h + i) % kv_heads * per + g % per for i in range(dim // real.shape[-1])]
                             for h in range(heads) for g in range(group)])  # fmt: skip
        mean, deviation = real.mean(1)[pick].flatten(1), real.std(1)[pick].flatten(1)
        return torch.randn(tokens, heads * group, dim, generator=generator) * deviation + mean

    return Layer(like("q", 64, group), like("k", tokens, 1), like("v", tokens, 1))


def long_table(layer: Layer) -> str:
    tokens = len(layer.k)
    q = layer.q[-1:].bfloat16()
    # What is stored is bf16 everywhere, so the peers' exact answer is the truth.
    layer = Layer(layer.q, layer.k.bfloat16().float(), layer.v.bfloat16().float())
    k, v = (x.transpose(0, 1)[None].bfloat16().contiguous() for x in (layer.k, layer.v))
    truth = peers.matmul(q.float(), k.float(), v.float()).double()
    basis = kk.calibrate_keys(layer.k[:1024], layer.q[:-1])
    lens = torch.tensor([tokens], dtype=torch.int32)
    runs: dict[str, Callable[[], Tensor]] = {}
    facts: dict[str, tuple[int, float]] = {}
    for name in LONG_ROWS:
        print(f"  packing {name}", flush=True)
        kv, table, used = pack(layer.k, layer.v, Row(name), basis, 64)
        runs[name] = partial(attend, q, kv, table[None], lens)
        facts[name] = (used, error(runs[name](), truth))
    others = {"SDPA": partial(peers.sdpa, q, k, v), "matmul": partial(peers.matmul, q, k, v)}
    for name, run in others.items():
        runs[name] = run
        facts[name] = (2 * k.numel() * 2, error(run(), truth))
    print("  timing", flush=True)
    cold = torch.ones(2**25, dtype=torch.int32)
    times = in_turn(runs, before=cold.sum, min_rounds=5, max_rounds=15, budget=6.0)
    body = [
        [
            f"torch {name} bf16" if name in others else name,
            f"{used / 1e6:.1f} MB",
            f"{used * 8 / (2 * layer.k.numel()):.3f}",
            f"{100 * wrong:.2f} %",
            report.duration(median(times[name])),
            *(f"{median(b / a for a, b in zip(times[name], times[other], strict=True)):.1f}" for other in others),
        ]
        for name, (used, wrong) in facts.items()
    ]
    return report.table(["K and V", "memory", "bits/element", "error", "decode step", "x SDPA", "x matmul"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=PICTURE, metavar="FILE", help="SVG (build/demo.svg)")
    parser.add_argument("--tokens", type=int, default=LONG, help="of the long context, a multiple of 64 (%(default)s)")
    args = parser.parse_args()
    began = time.perf_counter()
    layers = load()
    print(f"{build.cpu_name()}, {torch.get_num_threads()} threads\n")
    print(
        "1. Real keys and values: SmolLM2-135M, layers 0, 15, 29; 9 query heads, 3 KV heads, head dim 64, 512 tokens",
        flush=True,
    )
    packed = real(layers)
    print(real_table(packed, layers[1]))
    print(
        "bytes: K and V of one layer. error: of the attention output against float64, mean over the layers and the\n"
        "decode steps of tokens 448 .. 511. The key basis is calibrated on keys 16 .. 255 and queries 384 .. 447, not\n"
        "on those. Pages of 64 tokens (16 with sinks). decode step: last token, layer 15, warm cache, 1 thread."
    )
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    args.picture.write_text(draw(packed))
    print(f"picture: {args.picture}\n")
    heads, group, dim = 8, 4, 128
    print(
        f"2. {args.tokens} tokens, {heads * group} query heads, {heads} KV heads, head dim {dim}: synthetic, with the "
        f"channel means and\n   deviations of the tensors above; caches cold, {torch.get_num_threads()} threads",
        flush=True,
    )
    print(long_table(synthetic(layers, args.tokens, heads, group, dim)))
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
