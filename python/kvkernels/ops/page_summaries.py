"""page_summaries: what stands for the keys of a page when pages are chosen."""

import itertools
from typing import Any

import torch
from torch import Tensor

from kvkernels.formats import format, formats
from kvkernels.ops import _args, _reference
from kvkernels.ops._refusal import refused
from kvkernels.paged_kv import PagedKV, head_dim_of, zero_pool
from kvkernels.summaries import KINDS, PageSummaries, encode, record_bytes

DTYPES = ()  # pages only
FORMATS = tuple(f.name for f in formats())

_op = torch.ops.kvkernels.page_summaries.default


def page_summaries(
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    kind: str | None = None,
    *,
    bits: int | None = None,
    channels: Tensor | None = None,
    segments: Tensor | None = None,
    start: Tensor | None = None,
    out: PageSummaries | None = None,
) -> PageSummaries:
    """Records that stand for the keys of pages (or of segments) when some of them are chosen.

    kv          pools of any formats, D 64 to 256. Rotated keys are summarised as they were before, transform undone
    page_table  int32 [B, max_pages]. A page that several sequences share has one record, so all must have as many of
                its tokens, as in full pages of a common prefix
    seq_lens    int32 [B], tokens
    kind        "minmax" (None): largest and smallest value of each channel, from which a page's score is an upper bound
                of q.k over its tokens; "mean" of the keys: a landmark; "channels": some channels of every token, a
                label cache for score_tokens
    bits        16 (None), 8, or 4 (channels only). Bounds are rounded outwards and stay bounds. 8 and 4 bits have a
                scale for each of max, min and mean, or for every token; channels then need page_size % 16 == 0
    channels    int32 [Hkv, r], of kind "channels": from calibrate_channels, or any
    segments    int32 [B, num_segments + 1] ascending: records are those of tokens segments[b, s] ...
                segments[b, s + 1] - 1 (sentences, clusters), not of pages. Not with channels. A segment that is empty
                or ends past seq_lens has no record: zeros
    start       int32 [B]: only pages (segments) that end after this token are done again; None: all
    out         PageSummaries of the same kv, changed in place, kind, bits and channels being those of out; segments
                may be longer lists of the same shape. None: new ones, zero-filled

    Returns PageSummaries, those of `out` if given. Memory at D = 128, page 16, 16 bits: minmax 1/16 of the keys and
    values (1/32 at 8 bits), mean half of that. Tokens past seq_lens do not count and may hold NaN; a page with a NaN or
    infinite key has a score of NaN at 8 and 4 bits. The bytes are the same on CPU and CUDA. ValueError: dtypes, shapes
    or devices that do not fit; seq_lens, page ids, channels or offsets that are wrong (seen on CPU).

    Source: minmax, Tang et al. 2024, arXiv:2406.10774 (Quest); mean, Sun et al. 2024, arXiv:2410.21465 (ShadowKV);
    channels, Yang et al. 2024, arXiv:2408.07092 (Double Sparsity); segments, Zhu et al. 2025, arXiv:2504.00970
    (SentenceKV).
    """
    try:
        if out is not None:
            for name, given, has in (("kind", kind, out.kind), ("bits", bits, out.bits)):
                if given is not None and given != has:
                    raise ValueError(f"page_summaries: {name} must be that of out, {has!r}; got {given!r}")
            kind, bits = out.kind, out.bits
            channels = out.channels if channels is None else channels
            segments = out.segments if segments is None else segments
        kind = "minmax" if kind is None else kind
        bits = 16 if bits is None else bits
        if kind not in KINDS:
            raise ValueError(f"page_summaries: kind must be one of {', '.join(KINDS)}; got {kind!r}")
        pools, codes = _args.all_pools("page_summaries", kv)
        if torch.is_grad_enabled():
            _args.refuse_grad("page_summaries", **{f"pool tensor {i}": pool for i, pool in enumerate(pools)})
        head_dim, page_size = head_dim_of(kv), kv.page_size
        if out is None:
            size = record_bytes(kind, bits, page_size, head_dim, 0 if channels is None else channels.shape[-1])
            heads = pools[0].shape[1]
            if segments is None:
                counts = [(p[0] if isinstance(p, tuple) else p).shape[0] for p in kv.pools]
            else:
                counts = [segments.shape[0] * max(segments.shape[-1] - 1, 0)]
            records = tuple(_zeros((n, heads, size), pools[0].device) for n in counts)
            out = PageSummaries(kind, bits, page_size, head_dim, records, channels, segments)
        else:
            out = out._replace(channels=channels, segments=segments)
        centre, balance, order = _args.NO_TRANSFORM if kv.transform is None else kv.transform
        _op(pools, codes, page_size, head_dim, centre, balance, order, page_table, seq_lens, KINDS.index(kind),
            bits, channels, segments, start, list(out.records))  # fmt: skip
        _args.written(*out.records)
        return out
    except Exception as e:
        raise refused(page_summaries, e, locals()) from None


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():  # cannot be told of huge pages
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    return zero_pool(shape, device)


@torch.library.register_fake("kvkernels::page_summaries")
def _(pools: list[Tensor], formats: list[int], page_size: int, head_dim: int, centre: Tensor | None,
      balance: Tensor | None, order: Tensor | None, page_table: Tensor, seq_lens: Tensor, kind: int, bits: int,
      channels: Tensor | None, segments: Tensor | None, start: Tensor | None,
      records: list[Tensor]) -> None:  # fmt: skip
    numbered = {f"pool tensor {i}": pool for i, pool in enumerate(pools)}
    others = {f"records[{i}]": r for i, r in enumerate(records)}
    _args.same_device("page_summaries", **numbered, page_table=page_table, seq_lens=seq_lens, centre=centre,
                      balance=balance, order=order, channels=channels, segments=segments, start=start,
                      **others)  # fmt: skip


def reference(
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    kind: str | None = None,
    *,
    bits: int | None = None,
    channels: Tensor | None = None,
    segments: Tensor | None = None,
    start: Tensor | None = None,
    out: PageSummaries | None = None,
    dtype: torch.dtype = torch.float32,
) -> PageSummaries:
    """Bytes have no tolerance: the definition is the float32 of kvkernels/summaries.py, whatever `dtype`."""
    D, heads, size = kv.head_dim, kv.num_kv_heads, kv.page_size
    if out is None:
        kind, bits = kind or "minmax", bits or 16
        width = record_bytes(kind, bits, size, D, 0 if channels is None else channels.shape[1])
        counts = [_reference.num_pages(kv, pool) for pool in range(len(kv.pools))]
        if segments is not None:
            counts = [len(segments) * (segments.shape[1] - 1)]
        records = tuple(torch.zeros(n, heads, width, dtype=torch.uint8) for n in counts)
        out = PageSummaries(kind, bits, size, D, records, channels, segments)
    elif segments is not None:
        out = out._replace(segments=segments)
    for b, length in enumerate(seq_lens.tolist()):
        first = 0 if start is None else int(start[b])
        if out.segments is None:
            runs = [(i * size, min((i + 1) * size, length)) for i in range(-(-length // size))]
        else:
            offsets = out.segments[b].tolist()
            runs = list(itertools.pairwise(offsets))
        for i, (begin, end) in enumerate(runs):
            if begin == end or end > length or end <= first:
                continue
            if out.segments is None:
                pool, row = _reference.locate(kv, int(page_table[b, i]), f"page_table[{b}, {i}]")
            else:
                pool, row = 0, b * len(runs) + i
            keys = _reference.keys_of(kv, page_table, b, begin, end, torch.float32, D)
            out.records[pool][row] = encode(out.kind, out.bits, keys, size, out.channels)
    return out


# Of sequences of 70, 1, 0 and 129 tokens: empty ones, one past the end, tokens in none.
SEGMENTS = ((0, 7, 7, 40, 64, 70, 80), (0, 1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0, 0), (3, 20, 100, 101, 120, 128, 129))


def cases() -> list[dict[str, Any]]:
    """update: in place, from half of the lengths on. r: channels. nan: some keys are NaN or infinite."""
    base = {"kind": "minmax", "bits": 16, "Hkv": 2, "D": 128, "page_size": 32, "lens": (70, 1, 0, 129),
            "formats": ("bf16",)}  # fmt: skip
    kinds: list[dict[str, Any]] = [
        *({"kind": kind, "bits": bits} for kind in ("minmax", "mean") for bits in (16, 8)),
        *({"kind": "channels", "bits": bits, "r": 8} for bits in (16, 8, 4)),
    ]
    mixed = ("bf16", "u2", "kivi2")
    return [
        *({**base, **kind, "formats": f, "transform": True} for kind in kinds for f in (("bf16",), ("u2",))),
        *({**base, "formats": (f.name,), "transform": True} for f in formats() if f.name not in ("bf16", "u2")),
        *({**base, **kind, "formats": mixed, "transform": True, "update": True} for kind in kinds),
        *({**base, **kind, "nan": True} for kind in kinds),
        *({**base, "D": d, "formats": (f,)} for d, f in ((64, "u4"), (80, "f16 NHD"), (192, "bf16"), (256, "u8"))),
        *({**base, **kind, "page_size": 5} for kind in (kinds[0], kinds[3], kinds[4])),
        {**base, "page_size": 1, "kind": "mean"},
        *({**base, **kinds[i], "page_size": 16, "Hkv": 1, "r": r} for i, r in ((4, 1), (5, 3), (6, 5))),
        *({**base, **kind, "segments": SEGMENTS, "formats": mixed, "transform": True} for kind in kinds[:4]),
        {**base, "segments": SEGMENTS, "update": True},
        {**base, "lens": ()},
    ]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    gen = torch.Generator().manual_seed(seed)
    heads, D = case["Hkv"], case["D"]
    kv, table = _reference.random_cache(case, gen, lambda length: range(-(-length // case["page_size"])))
    if case.get("nan"):
        pool = kv.pools[0]
        assert isinstance(pool, Tensor)
        keys = pool[..., : case["page_size"] * D * 2].view(torch.bfloat16)
        keys[int(table[0, 0]), 0, 5] = float("nan")
        keys[int(table[3, 1]), 1, 1500] = float("inf")
        keys[int(table[3, 2]), 0, 700] = -float("inf")
    options: dict[str, Any] = {"kind": case["kind"], "bits": case["bits"]}
    if "r" in case and case["kind"] == "channels":
        options["channels"] = random_channels(heads, D, case["r"], gen)
    if "segments" in case:
        options["segments"] = torch.tensor(case["segments"], dtype=torch.int32)
    lens = torch.tensor(case["lens"], dtype=torch.int32)
    if case.get("update"):
        old = reference(kv, table, lens // 2, **options)
        options = {"out": old, "start": lens // 2}
    return (kv, table, lens), options


def random_channels(heads: int, D: int, r: int, gen: torch.Generator) -> Tensor:
    return torch.stack([torch.randperm(D, generator=gen)[:r].sort().values for _ in range(heads)]).int()


def cost(case: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the keys, as half of a page, and of the records; a comparison for each bound, an addition for a mean."""
    D, page_size, names = case["D"], case["page_size"], case["formats"]
    codes = [format(name.partition(" ")[0]).v_offset(page_size, D) for name in names]
    record = record_bytes(case["kind"], case["bits"], page_size, D, case.get("r", 0))
    moved = flops = 0
    for b, length in enumerate(case["lens"]):
        for i in range(-(-length // page_size)):
            moved += codes[(b + i) % len(names)] + record
        flops += length * D * {"minmax": 2, "mean": 1, "channels": 0}[case["kind"]]
    return moved * case["Hkv"], flops * case["Hkv"]
