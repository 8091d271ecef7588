"""python -m bench.gpu [--quick] [--results [FILE]]

Times the ops on a GPU against its copy bandwidth, measured in the same run, and against what else is installed. Caches
are emptied before every call; the time is the GPU's own, between two events around one call.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kvkernels as kk
from bench import build, peers, report
from bench.ops import delta_rule, flash_decode, prefix_attention, sparse_attention
from bench.pages import HKV, HQ, PAGE, D, attend, data, paged
from kvkernels.ops import OPS

FORMATS = ("bf16", "u8", "u4", "u3", "u2", "t1", "b1", "m31/u2.e5m3", "m42/u2.e5m3", "kivi2")


class Row(NamedTuple):
    case: str
    what: str
    seconds: float
    nbytes: float  # that must be read or written


class Clock:
    def __init__(self, quick: bool):
        self.rounds = 5 if quick else 40
        # Larger than any L2; writing it also gives the host time to launch what is measured.
        self.cold = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds: the median."""
        for _ in range(3):
            run()
        pairs = []
        for _ in range(self.rounds):
            self.cold.fill_(1)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return median(begin.elapsed_time(end) for begin, end in pairs) / 1e3

    def copy_rate(self) -> float:
        """Bytes per second, read and written, of a 1 GiB copy."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.numel() / self(lambda: target.copy_(source))


def on_gpu(kv: kk.PagedKV) -> kk.PagedKV:
    return kv._replace(pools=tuple(p.cuda() if isinstance(p, Tensor) else (p[0].cuda(), p[1].cuda()) for p in kv.pools))


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    from flash_attn import flash_attn_with_kvcache

    nhd = [x.transpose(1, 2).contiguous() for x in (k, v)]
    return lambda: flash_attn_with_kvcache(q.unsqueeze(1), *nhd)


def flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    import flashinfer as fi

    batch, heads, length, dim = k.shape
    pages = length // PAGE
    cache = torch.stack([x.transpose(1, 2).reshape(batch * pages, PAGE, heads, dim) for x in (k, v)], 1)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), "NHD")
    steps = torch.arange(batch + 1, dtype=torch.int32) * pages
    full = torch.full((batch,), PAGE, dtype=torch.int32)
    wrapper.plan(steps, torch.arange(batch * pages, dtype=torch.int32, device="cuda"), full, HQ, heads, dim, PAGE,
                 q_data_type=q.dtype, kv_data_type=k.dtype)  # fmt: skip
    return lambda: wrapper.run(q, cache)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    return lambda: compiled(q.unsqueeze(2), k, v, enable_gqa=True)


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Callable[[], object]]] = {
    "torch SDPA": lambda q, k, v: partial(peers.sdpa, q, k, v),
    "torch SDPA, grouped": lambda q, k, v: partial(peers.sdpa_grouped, q, k, v),
    "torch matmul, grouped": lambda q, k, v: partial(peers.matmul, q, k, v),
    "flex_attention": flex,
    **({"flash-attn": flash_attn} if importlib.util.find_spec("flash_attn") else {}),
    **({"FlashInfer": flashinfer} if importlib.util.find_spec("flashinfer") else {}),
}


def peer_time(clock: Clock, what: str, prepare: Callable[[], Callable[[], object]]) -> float | None:
    try:
        return clock(prepare())
    except Exception as error:  # one that does not run on this machine is a line on the screen, not the end
        print(f"{what} does not run: {(str(error) or repr(error)).splitlines()[0]}", flush=True)
        return None


def attention(clock: Clock, quick: bool) -> Iterator[Row]:
    for batch, length in ((2, 2048),) if quick else ((1, 1024), (1, 32768), (8, 8192), (8, 32768), (64, 4096)):
        case = f"B{batch} L{length}"
        torch.manual_seed(0)
        k, v = (torch.randn(length, HKV, D, dtype=torch.bfloat16) for _ in "kv")
        q = torch.randn(batch, HQ, D, dtype=torch.bfloat16, device="cuda")
        # As many tokens as the mean of the ragged batch: what raggedness costs is the difference in % of copy.
        ragged = {case: [length] * batch}
        if batch > 1:
            ragged[f"{case}, lengths L / (i + 1)"] = [max(PAGE, length // (i + 1)) for i in range(batch)]
        for name in FORMATS:
            kv, table = paged(k, v, name, batch)
            kv, table = kv._replace(pools=(data(kv, 0).cuda(),)), table.cuda()
            for label, lens in ragged.items():
                run = partial(attend, q, kv, table, torch.tensor(lens, dtype=torch.int32, device="cuda"))
                shape = {"formats": (name,), "lens": tuple(lens), "Hq": HQ, "Hkv": HKV, "D": D, "page_size": PAGE}
                moved, _ = OPS["quant_attention"].cost({**shape, "Tq": 1, "dtype": "bfloat16"})
                yield Row(label, name, clock(run), moved)
        flat = [x.transpose(0, 1).expand(batch, -1, -1, -1).contiguous().cuda() for x in (k, v)]
        for name, prepare in PEERS.items():
            seconds = peer_time(clock, f"{case}: {name}", partial(prepare, q, *flat))
            if seconds is not None:
                yield Row(case, name, seconds, sum(x.nbytes for x in flat))


def codec(clock: Clock, quick: bool) -> Iterator[Row]:
    tokens = 1024 if quick else 65536
    torch.manual_seed(0)
    k, v = (torch.randn(tokens, HKV, D, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    slots = torch.randperm(tokens, device="cuda")
    pairs = torch.stack([torch.randperm(tokens // PAGE, device="cuda") for _ in "sd"], 1).int()
    for name in FORMATS:
        kv = kk.PagedKV.empty(["bf16", name], tokens // PAGE, HKV, D, PAGE, device="cuda")
        case = {"T": tokens, "N": tokens // PAGE, "Hkv": HKV, "D": D, "page_size": PAGE, "dtype": "bfloat16"}
        runs: dict[str, Callable[[], object]] = {
            "pack_pages": partial(kk.pack_pages, kv, 0, 1, pairs),
            "read_kv": partial(kk.read_kv, kv, 1, slots, out=(k, v)),
        }
        if not kk.format(name).whole_pages:
            runs["write_kv"] = partial(kk.write_kv, k, v, kv, 1, slots)
        for op, run in runs.items():
            moved, _ = OPS[op].cost({**case, "format": name, "src": "bf16", "dst": name})
            yield Row(f"{op}, {tokens} tokens", name, clock(run), moved)
    x = torch.randn(tokens * HKV, D, dtype=torch.bfloat16, device="cuda")
    yield Row(f"fwht [{tokens * HKV}, {D}]", "bf16 in, out", clock(lambda: kk.fwht(x)), 2 * x.nbytes)
    outs, lses = torch.randn(4, tokens, D, device="cuda").bfloat16(), torch.randn(4, tokens, device="cuda")
    moved = outs.nbytes * 5 // 4 + lses.nbytes * 5 // 4
    yield Row(f"merge_states [4, {tokens}, {D}]", "bf16", clock(lambda: kk.merge_states(outs, lses)), moved)


def decode(clock: Clock, quick: bool) -> Iterator[Row]:
    """Caches as vLLM and flash-attn hold them; pages of 1 and ragged batches against contiguous ones and uniform."""
    if quick:
        cases = [flash_decode.Case((1024,), 4, 16)]
    else:
        ragged = tuple(max(16, 32768 // (i + 1)) for i in range(32))
        cases = [flash_decode.Case((1024,), 4, 16), flash_decode.Case(flash_decode.LONG_AND_SHORT, 4, 16)]
        cases += [flash_decode.Case((8192,) * 32, 4, page) for page in (1, 16, 64)]
        cases += [flash_decode.Case(ragged, 4, 16), flash_decode.Case((sum(ragged) // 32,) * 32, 4, 16)]
    for case in cases:
        torch.manual_seed(0)
        k, v, table, lens = (x.cuda() for x in flash_decode.caches(case))
        q = torch.randn(len(case.lens), HQ, D, dtype=torch.bfloat16, device="cuda")
        moved = 4.0 * sum(case.lens) * (HQ // case.group) * D
        yield Row(case.label, "flash_decode", clock(partial(kk.flash_decode, q, k, v, table, lens)), moved)


def prefix(clock: Clock, quick: bool) -> Iterator[Row]:
    """Shared prefixes; bytes are those of every page once."""
    sizes = ((4, 1024),) if quick else ((32, 8192), (256, 8192), (256, 32768), (1024, 1024))
    for batch, shared in sizes:
        tree = prefix_attention.Tree((1, batch), (shared, 128))
        table, count = prefix_attention.table_of(tree, shared=True)
        kv = on_gpu(prefix_attention.pages_of(tree, count))
        table = table.cuda()
        lens = torch.full((batch,), shared + 128, dtype=torch.int32, device="cuda")
        q = torch.randn(batch, HQ, D, dtype=torch.bfloat16, device="cuda")
        moved = 4.0 * (shared + 128 * batch) * HKV * D
        plan = kk.plan_prefix(table, lens, tree.page)
        runs: dict[str, Callable[[], object]] = {
            "prefix_attention": partial(kk.prefix_attention, q, kv, table, lens, plan=plan),
            "plan_prefix": partial(kk.plan_prefix, table, lens, tree.page),
            "quant_attention": partial(attend, q, kv, table, lens),
        }
        for name, run in runs.items():
            yield Row(f"B{batch}, {shared} shared", name, clock(run), table.nbytes if name == "plan_prefix" else moved)


def sparse(clock: Clock, quick: bool) -> Iterator[Row]:
    """A budget of 1/16, selection included."""
    cases = sparse_attention.QUICK if quick else (*sparse_attention.CASES, sparse_attention.Case(16, 32768, 16))
    for case in cases:
        problem = sparse_attention.problem(case, torch.device("cuda"))
        for name, (run, moved) in problem.ways().items():
            yield Row(case.label, name, clock(run), moved)
        for name, (run, moved) in problem.parts().items():
            yield Row(case.label, name, clock(run), moved)


def delta(clock: Clock, quick: bool) -> Iterator[Row]:
    """Prompts, training steps and decode of the delta rule. Bytes: inputs and outputs once, or the states twice."""
    bf16 = torch.bfloat16
    cases = [delta_rule.Case("GDN", 256, 2, 4, bf16), delta_rule.Case("KDA", 256, 2, 2, bf16, backward=True)]
    if not quick:
        cases = [delta_rule.Case("GDN", tokens, 16, 64, bf16) for tokens in (2048, 8192, 65536)]
        cases += [delta_rule.Case("GDN", 8192, 2, 8, bf16), delta_rule.Case("KDA", 8192, 64, 64, bf16)]
        cases += [delta_rule.Case(rule, 8192, 16, 32, bf16, backward=True) for rule in ("GDN", "KDA")]
    for case in cases:
        torch.manual_seed(0)
        x = {name: t.cuda() for name, t in delta_rule.inputs(case).items()}
        moved = (3.0 if case.backward else 1.0) * sum(t.nbytes for t in (*x.values(), x["v"]))
        ways: dict[str, Callable[..., Any]] = {"chunk": partial(kk.delta_rule, qk_l2norm=True)}
        if importlib.util.find_spec("fla"):
            fla = importlib.import_module("fla.ops")
            theirs = fla.chunk_kda if case.rule == "KDA" else fla.chunk_gated_delta_rule
            ways["fla"] = partial(first_of, partial(theirs, use_qk_l2norm_in_kernel=True))
        for name, way in ways.items():
            run = partial(delta_rule.step, case, way, x)
            seconds = peer_time(clock, f"{case.label}: {name}", partial(same, run)) if name == "fla" else clock(run)
            if seconds is not None:
                yield Row(case.label, name, seconds, moved)
    H, HV, K = 16, 32, 128
    for batch in (4,) if quick else (1, 64, 256):
        q, k, v, beta, g = (torch.rand(batch, n, *d, device="cuda")
                            for n, d in ((H, (K,)), (H, (K,)), (HV, (K,)), (HV, ()), (HV, ())))  # fmt: skip
        slots = torch.arange(batch, dtype=torch.int32, device="cuda")
        for dtype in (torch.float32, bf16):
            state = torch.zeros(batch, HV, K, K, dtype=dtype, device="cuda")
            rows = [x.bfloat16() for x in (q, k, v, beta)]
            decode = partial(
                kk.delta_rule_step, rows[0], rows[1], rows[2], rows[3], -g, state=state, slots=slots, qk_l2norm=True
            )
            what = "bf16 state" if dtype == bf16 else "fp32 state"
            yield Row(f"delta_rule_step B{batch} HV{HV}", what, clock(decode), 2.0 * state.nbytes)


def first_of(function: Callable[..., tuple[Tensor, ...]], **x: Tensor) -> Tensor:
    return function(**x)[0]


def same(run: Callable[[], object]) -> Callable[[], object]:
    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small cases, few rounds: does it run?")
    parser.add_argument("--results", type=Path, nargs="?", const=Path(), metavar="FILE",
                        help="write a page (bench/results/<GPU>.md)")  # fmt: skip
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "bench.gpu: torch sees no GPU\n")
    if not json.loads(torch.ops.kvkernels.build_info())["cuda"]:
        parser.exit(1, "bench.gpu: this build of kvkernels has no CUDA kernels\n")
    gpu = torch.cuda.get_device_name()
    clock = Clock(args.quick)
    copy = clock.copy_rate()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=build.ROOT)
    lines = [
        f"# {gpu}",
        "",
        f"{datetime.date.today()}, commit {commit.stdout.strip() or 'unknown'}, torch {torch.__version__}, "
        f"`python -m bench.gpu{' --quick' if args.quick else ''}`. Hq {HQ}, Hkv {HKV}, D {D}, page {PAGE}, all bf16. "
        f"A copy of 1 GiB reads and writes {copy / 1e9:.0f} GB/s; % of copy is the rate of the bytes that must move "
        "against that one. Caches are emptied before every call; median of the GPU's own times.",
        "",
    ]
    print(*lines, sep="\n", flush=True)
    head, body = ["case", "what", "time", "GB/s", "% of copy"], []
    for row in (r for part in (attention, decode, prefix, sparse, delta, codec) for r in part(clock, args.quick)):
        rate = row.nbytes / row.seconds
        body.append(
            [row.case, row.what, report.duration(row.seconds), f"{rate / 1e9:.0f}", f"{100 * rate / copy:.0f} %"]
        )
        print(*body[-1], sep="   ", flush=True)
    page = "\n".join([*lines, report.table(head, body, left=2), ""])
    if args.results is not None:
        path = (
            args.results if args.results.name else build.ROOT / "bench/results" / f"{'-'.join(gpu.lower().split())}.md"
        )
        path.write_text(page)
        print(f"written: {path}")


if __name__ == "__main__":
    main()
