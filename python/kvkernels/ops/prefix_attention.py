"""prefix_attention: decode attention that reads once what sequences have in common."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kvkernels.formats import format, formats
from kvkernels.ops import _attention, _reference, plan_prefix
from kvkernels.ops import quant_attention as quant
from kvkernels.ops._refusal import refused
from kvkernels.paged_kv import PAGE_BITS, PagedKV
from kvkernels.plan import Plan

DTYPES, CUDA_DTYPES, FORMATS = quant.DTYPES, quant.CUDA_DTYPES, quant.FORMATS


@overload
def prefix_attention(
    q: Tensor,
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    plan: Plan | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor] | None = None,
    head_map: Sequence[int] | None = None,
    return_lse: Literal[False] = False,
    out: Tensor | None = None,
) -> Tensor: ...


@overload
def prefix_attention(
    q: Tensor,
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    plan: Plan | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor] | None = None,
    head_map: Sequence[int] | None = None,
    return_lse: Literal[True],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def prefix_attention(
    q: Tensor,
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    plan: Plan | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor] | None = None,
    head_map: Sequence[int] | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """quant_attention where sequences whose rows of page_table begin alike share the work of those pages.

    A shared page is read once, and the queries of all its sequences are rows of one matrix product; results are joined
    by their lse. Equal to quant_attention but for rounding.

    plan   None: plan_prefix(page_table, seq_lens, kv.page_size, num_queries=Tq), made anew by each call; pass it to all
           layers of a step instead. For two 16-bit caches: flash_decode(..., plan=plan)

    The other arguments, what is returned and what is refused are those of quant_attention, but for window, head_windows
    and split_tokens, which do not go together with a plan.

    Source: Juravsky et al. 2024, arXiv:2402.05099 (Hydragen); Pan et al., MLSys 2025 (FastTree).
    """
    try:
        if plan is None:
            Tq = q.shape[1] if q.dim() == 4 else 1
            plan = plan_prefix.plan_prefix(page_table, seq_lens, kv.page_size, num_queries=Tq)
        options: dict[str, Any] = {
            "scale": scale, "softcap": softcap, "sinks": sinks, "alibi_slopes": alibi_slopes, "tree_mask": tree_mask,
            "extra": extra, "head_map": head_map, "return_lse": return_lse, "out": out,
        }  # fmt: skip
        return quant.quant_attention(q, kv, page_table, seq_lens, plan=plan, **options)
    except Exception as e:
        raise refused(prefix_attention, e, locals(), "plan_prefix", "quant_attention") from None


reference = quant.reference  # of every sequence by itself


def cases() -> list[dict[str, Any]]:
    """tree: how sequences share, as plan_prefix.random_batch() makes it. least: min_tokens of a plan that is passed."""
    base = {"tree": "random", "B": 9, "pages": 5, "Tq": 1, "Hq": 4, "Hkv": 2, "D": 128, "page_size": 16,
            "dtype": "bfloat16", "formats": ("bf16",), "least": 0}  # fmt: skip
    mixed = ("bf16", "u4", "m31/t1")
    own = [f.name for f in formats() if 64 in _reference.head_dims(f.name)]
    options = ("Tq", "softcap", "sinks", "alibi", "scale", "tree", "extra", "head_map")
    alone = [o for o in _attention.OPTIONS if set(o) <= {*options, "lens"} and o.get("Tq", 1) < 16]
    together = {k: v for k, v in _attention.TOGETHER.items() if k in (*options, "Hq")}
    return [
        base,
        *({**base, "tree": tree, "formats": f} for tree in plan_prefix.TREES for f in (("bf16",), ("u2",))),
        *({**base, "formats": (name,), "dtype": "float32", "transform": True} for name in own),
        *(_with_drafts({**base, **o, "formats": f}) for o in alone for f in (("bf16",), ("u2",))),
        *(_with_drafts({**base, **together, "formats": f, "transform": True}) for f in (("bf16 NHD",), ("u2",), mixed)),
        *({**base, "formats": mixed, "transform": True, "tree": tree} for tree in ("random", "one prefix", "comb")),
        *({**base, "formats": ("bf16 NHD",), "page_size": ps, "pages": 24} for ps in (1, 5)),
        *({**base, "D": d, "formats": (f,)} for d in (64, 256) for f in ("f16", "u2")),
        {**base, "dtype": "float16", "formats": ("u2",)},
        {**base, "tree": "one prefix", "B": 40, "Hq": 16},
        {**base, "tree": "one prefix", "B": 20, "Hq": 16, "Tq": 4, "formats": ("u4",)},
        {**base, "tree": "groups", "B": 7, "pages": 20, "least": None},
        {**base, "tree": "groups", "B": 7, "pages": 20, "least": None, "formats": ("u2",)},
        {**base, "tree": "comb", "B": 30, "pages": 30},
        {**base, "B": 1},
        {**base, "B": 0},
    ]


def _with_drafts(case: dict[str, Any]) -> dict[str, Any]:
    """`tree` of the options is a tree of drafts."""
    if case["tree"] is True:
        case.update(tree="random", drafts=True)
    case.pop("lens", None)
    return case


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pages go round the pools. What must not be read is poisoned: pages of nobody, and tokens past the end of all that
    have the page; table entries that must not be read are no pages at all. least None: the op makes its own plan."""
    gen = torch.Generator().manual_seed(seed)
    heads, D, page_size, names, Tq = (case[k] for k in ("Hkv", "D", "page_size", "formats", "Tq"))
    transform = _reference.random_transform(heads, D, gen) if case.get("transform") else None
    rows, lens = plan_prefix.random_batch(case["tree"], case["B"], case["pages"], page_size, Tq, gen)
    used: dict[int, int] = {}  # tokens that somebody has in a page
    for row, length in zip(rows, lens):
        for i, page in enumerate(row):
            used[page] = max(used.get(page, 0), min(page_size, length - i * page_size))
    pages = sorted(page for page, tokens in used.items() if tokens > 0)
    count = -(-len(pages) // len(names)) + 2
    pools = tuple(_reference.random_pool(name, count, heads, page_size, D, transform, gen) for name in names)
    kv = PagedKV(pools, tuple(format(name.partition(" ")[0]) for name in names), page_size, transform)
    free = [torch.randperm(count, generator=gen).tolist() for _ in names]
    entry: dict[int, int] = {}
    for n, page in enumerate(pages):
        pool = n % len(names)
        place = free[pool].pop()
        entry[page] = pool << PAGE_BITS | place
        if used[page] < page_size:
            _reference.poison_tokens(kv, pool, place, range(used[page], page_size), D)
    for pool, rest in enumerate(free):
        for place in rest:
            _reference.poison_page(kv, pool, place)
    table = torch.full((len(lens), max(map(len, rows), default=0) + 2), _attention.NO_PAGE, dtype=torch.int32)
    for b, length in enumerate(lens):
        for i in range(-(-length // page_size)):
            table[b, i] = entry[rows[b][i]]
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    full = {**case, "lens": lens, "tree": case.get("drafts")}
    options = _attention.random_options(full, heads, D, D, gen)
    if case["least"] is not None:
        least = case["least"]
        options["plan"] = plan_prefix.reference(table, seq_lens, page_size, num_queries=Tq, min_tokens=least)
    return (_attention.random_queries(full, D, gen), kv, table, seq_lens), options


def cost(case: dict[str, Any]) -> tuple[int, int]:
    """Bytes of all pages that some sequence has, each once, and of q and out; flops of q k^T and p v."""
    (q, kv, table, seq_lens), _ = make(case)
    tokens: dict[int, int] = {}
    for row, length in zip(table.tolist(), seq_lens.tolist()):
        for i, page in enumerate(row[: -(-length // kv.page_size)]):
            tokens[page] = max(tokens.get(page, 0), min(kv.page_size, length - i * kv.page_size))
    D = case["D"]
    sizes = [fmt.data_bytes(kv.page_size, D) for fmt in kv.formats]
    moved = sum(sizes[page >> PAGE_BITS] * n * case["Hkv"] // kv.page_size for page, n in tokens.items())
    return moved + 2 * q.numel() * q.element_size(), 4 * int(seq_lens.sum()) * case["Tq"] * case["Hq"] * D
