"""sparse_attention: decode attention over the pages or tokens that were selected."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from kvkernels.formats import format, formats
from kvkernels.ops import _args, _attention, _reference
from kvkernels.ops import quant_attention as quant
from kvkernels.ops._refusal import refused
from kvkernels.paged_kv import PagedKV

DTYPES, CUDA_DTYPES, FORMATS = quant.DTYPES, quant.CUDA_DTYPES, quant.FORMATS

_op = torch.ops.kvkernels.sparse_attention.default


@overload
def sparse_attention(
    q: Tensor,
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    pages: Tensor | None = None,
    tokens: Tensor | None = None,
    entries: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    head_windows: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor] | None = None,
    head_map: Sequence[int] | None = None,
    split_tokens: int | None = None,
    return_lse: Literal[False] = False,
    out: Tensor | None = None,
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    pages: Tensor | None = None,
    tokens: Tensor | None = None,
    entries: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    head_windows: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor] | None = None,
    head_map: Sequence[int] | None = None,
    split_tokens: int | None = None,
    return_lse: Literal[True],
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Tensor,
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    pages: Tensor | None = None,
    tokens: Tensor | None = None,
    entries: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    tree_mask: Tensor | None = None,
    head_windows: Tensor | None = None,
    extra: tuple[Tensor, Tensor, Tensor] | None = None,
    head_map: Sequence[int] | None = None,
    split_tokens: int | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """quant_attention over some pages or tokens of each sequence, a list for every KV head.

    pages    int32 [B or 1, Hkv or 1, K]: page numbers within the sequence (columns of page_table), ascending, distinct,
             below ceil(seq_lens / page_size); a list ends at its first negative number. Of select_pages, or any
    tokens   likewise, positions below seq_lens: of select_tokens, or any. Exactly one of pages and tokens is given
    entries  int32 [B or 1, Hkv or 1, K], with pages: their page-table entries, of gather_pages; page_table is then not
             read. None: page_table has them

    Lists may be used by other layers and later steps. Queries see of the listed tokens what they would see of all:
    every option counts by the true positions, causal, window, tree_mask, ALiBi alike. An empty list gives out 0, lse
    -inf, but for sinks and extra. With split_tokens, intervals are counted along the list. q, kv, page_table, seq_lens
    and the options are those of quant_attention, but for plan. Pages and tokens that are not listed are never read, nor
    are the table's entries of such pages.

    Returns out, or (out, lse): states that merge_states joins with others. ValueError: as quant_attention; lists that
    do not ascend or reach past the sequence (seen on CPU).

    Source: Tang et al. 2024, arXiv:2406.10774 (Quest: pages); Yang et al. 2024, arXiv:2410.05076 (TidalDecode: tokens,
    lists that later layers use again); Sun et al. 2024, arXiv:2410.21465 (ShadowKV: pages in main memory).
    """
    try:
        pools, codes = _args.all_pools("sparse_attention", kv)
        left, right = window
        if left < -1 or right not in (-1, 0):
            _args.bad_window("sparse_attention", left, right)
        if torch.is_grad_enabled() and (
            q.requires_grad or sinks is not None or alibi_slopes is not None or extra is not None or out is not None
        ):
            named = _args.parts(extra, None)
            _args.refuse_grad("sparse_attention", q=q, sinks=sinks, alibi_slopes=alibi_slopes, out=out, **named)
        given = out
        if out is None:
            out = torch.empty_like(q)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device) if return_lse else None
        centre, balance, order = _args.NO_TRANSFORM if kv.transform is None else kv.transform
        if scale is None:
            scale = q.shape[-1] ** -0.5
        if split_tokens is None:
            split_tokens = 0
        elif split_tokens == 0:
            _args.no_split("sparse_attention")
        _op(q, pools, codes, kv.page_size, page_table, seq_lens, pages, tokens, entries, centre, balance, order, scale,
            left, softcap, sinks, alibi_slopes, split_tokens, tree_mask, head_windows,
            extra, head_map, out, lse)  # fmt: skip
        if given is not None:
            _args.written(given)
        return out if lse is None else (out, lse)
    except Exception as e:
        raise refused(sparse_attention, e, locals()) from None


@torch.library.register_fake("kvkernels::sparse_attention")
def _(q: Tensor, pools: list[Tensor], formats: list[int], page_size: int, page_table: Tensor, seq_lens: Tensor,
      pages: Tensor | None, tokens: Tensor | None, entries: Tensor | None, centre: Tensor | None,
      balance: Tensor | None, order: Tensor | None, scale: float, window_left: int, softcap: float,
      sinks: Tensor | None, alibi_slopes: Tensor | None, split_tokens: int, tree_mask: Tensor | None,
      head_windows: Tensor | None, extra: list[Tensor] | None, head_map: list[int] | None, out: Tensor,
      lse: Tensor | None) -> None:  # fmt: skip
    numbered = {f"pool tensor {i}": pool for i, pool in enumerate(pools)}
    _args.same_device("sparse_attention", q=q, **numbered, page_table=page_table, seq_lens=seq_lens, pages=pages,
                      tokens=tokens, entries=entries, centre=centre, balance=balance, order=order, sinks=sinks,
                      alibi_slopes=alibi_slopes, tree_mask=tree_mask, head_windows=head_windows,
                      **_args.parts(extra, None), out=out, lse=lse)  # fmt: skip


def reference(
    q: Tensor,
    kv: PagedKV,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    pages: Tensor | None = None,
    tokens: Tensor | None = None,
    entries: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """out, or out and lse, in `dtype`. Every length and page id is checked."""
    D, heads, size = q.shape[-1], kv.num_kv_heads, kv.page_size
    given = pages if pages is not None else tokens
    assert given is not None
    run = size if pages is not None else 1
    B = len(seq_lens)
    lists = given.expand(B, heads, -1)
    of_pages = None if entries is None else entries.expand(B, heads, -1)
    selected = torch.zeros(B, heads, int(seq_lens.max()) + size if B else 0, dtype=torch.bool)
    where: list[list[dict[int, int]]] = [[{} for _ in range(heads)] for _ in range(B)]  # entries of the pages
    for b in range(B):
        for h in range(heads):
            for i, item in enumerate(lists[b, h].tolist()):
                if item < 0:
                    break
                selected[b, h, item * run : (item + 1) * run] = True
                page = item * run // size
                where[b][h][page] = int(page_table[b, page] if of_pages is None else of_pages[b, h, i])

    def rows(b: int, seen: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (torch.full((len(seen) + size, heads, D), float("nan"), dtype=dtype) for _ in "kv")
        for h, pages_of_head in enumerate(where[b]):
            for page, entry in pages_of_head.items():
                rows = _reference.read_page(kv, *_reference.locate(kv, entry, f"page {page} of {b}"), D, dtype)
                k[page * size : (page + 1) * size, h], v[page * size : (page + 1) * size, h] = (x[h] for x in rows)
        return k[: len(seen)], v[: len(seen)]

    return _attention.reference(q, rows, (heads, heads), D, seq_lens, **options, selected=selected, dtype=dtype)


def cases() -> list[dict[str, Any]]:
    """of: "pages", "tokens", "entries" (pages, by their entries alone). part: how much is listed. shared: lists of all
    heads, of all sequences, or both."""
    base = {"of": "pages", "part": 0.5, "Tq": 1, "Hq": 4, "Hkv": 2, "D": 128, "page_size": 16,
            "lens": (150, 1, 0, 300), "dtype": "float32", "formats": ("bf16",)}  # fmt: skip
    mixed = ("bf16", "u4", "m31/t1")
    both, kinds = ("pages", "tokens"), (("bf16",), ("u2",), mixed)
    own = [f.name for f in formats() if 64 in _reference.head_dims(f.name)]
    any_width = ("u8", "u2", "m31/t1")
    options = [o for o in _attention.OPTIONS if "head_map" not in o and o.get("Tq") != 16]
    return [
        *({**base, "of": "tokens", "formats": (f.name,), "transform": True} for f in formats()),
        *({**base, "formats": (name,), "transform": True} for name in own),
        *({**base, "of": of, "formats": (f,), "D": d} for of in both for f in any_width for d in (64, 256)),
        *({**base, "of": of, "formats": (f,), "D": d} for of in both for f, d in (("bf16 NHD", 80), ("f16 HND", 192))),
        *({**base, "of": of, "formats": ("u3/u2", "bf16/u2", "kivi2/u4"), "page_size": 32} for of in both),
        *({**base, "of": of, "formats": mixed, "transform": True} for of in (*both, "entries")),
        *({**base, **o, "of": both[i % 2], "formats": kinds[i % 3]} for i, o in enumerate(options)),
        *({**base, "of": of, **_attention.TOGETHER, "formats": mixed, "transform": True} for of in (*both, "entries")),
        *({**base, "of": of, "page_size": ps} for of in both for ps in (1, 5)),
        *({**base, "of": of, "shared": "heads", "formats": f} for of in both for f in kinds[:2]),
        *({**base, "of": of, "shared": "both", "formats": f, "lens": (150, 300)} for of in both for f in kinds[:2]),
        *({**base, "of": of, "part": part} for of in both for part in (0.0, 0.04, 1.0)),
        *({**base, "of": of, "dtype": "bfloat16", "Hq": 14, "strided": True, "Tq": 2} for of in both),
        *({**base, "of": of, "lens": (2100, 900), "page_size": 64, "Hq": 8, "formats": f, "part": 0.2}
          for of in both for f in kinds[:2]),
        {**base, "lens": ()},
    ]  # fmt: skip


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What is not listed is poisoned: tokens and pages, head by head; entries of pages that no head lists are none."""
    gen = torch.Generator().manual_seed(seed)
    heads, D, page_size, lens = case["Hkv"], case["D"], case["page_size"], case["lens"]
    kv, table = _reference.random_cache(case, gen, lambda length: range(-(-length // page_size)))
    run = 1 if case["of"] == "tokens" else page_size
    lists: list[Tensor] = []
    reach = min(lens, default=0) if case.get("shared") == "both" else None
    rows, columns = {"heads": (len(lens), 1), "both": (1, 1)}.get(case.get("shared", ""), (len(lens), heads))
    for b in range(rows if lens else 0):
        count = -(-(lens[b] if reach is None else reach) // run)
        lists += [torch.where(torch.rand(count, generator=gen) < case["part"])[0].int() for _ in range(columns)]
    width = max(map(len, lists), default=0) + 2
    padded = torch.full((len(lists), width), -1, dtype=torch.int32)
    for row, chosen in zip(padded, lists):
        row[: len(chosen)] = chosen
        row[len(chosen) + 1 :] = 7  # behind the end of a list
    given = padded.view(rows, columns, width) if lens else padded.view(0, heads, width)

    options = _attention.random_options(case, heads, D, D, gen)
    options["tokens" if case["of"] == "tokens" else "pages"] = given
    entries = torch.full((len(lens), heads, width), _reference.NO_PAGE, dtype=torch.int32)
    for b, length in enumerate(lens):
        listed: set[int] = set()
        for h in range(heads):
            chosen = lists[(b if rows > 1 else 0) * columns + (h if columns > 1 else 0)].tolist()
            for i in range(-(-length // page_size)):
                pool, page = _reference.locate(kv, int(table[b, i]), "page_table")
                if case["of"] == "tokens":
                    rest = set(range(page_size)) - {t - i * page_size for t in chosen}
                    _reference.poison_tokens(kv, pool, page, rest, D, slice(h, h + 1))
                elif i not in chosen:
                    _reference.poison_page(kv, pool, page, slice(h, h + 1))
                else:
                    entries[b, h, chosen.index(i)] = table[b, i]
            listed |= {t * run // page_size for t in chosen}
        for i in range(table.shape[1]):
            if i not in listed or case["of"] == "entries":
                table[b, i] = _reference.NO_PAGE
    if case["of"] == "entries":
        options["entries"] = entries
    q = _attention.random_queries(case, D, gen)
    return (q, kv, table, torch.tensor(lens, dtype=torch.int32)), options


def cost(case: dict[str, Any]) -> tuple[int, int]:
    """Bytes of what is listed, and of q and out; flops of q k^T and p v."""
    page_size, D, Tq, names = case["page_size"], case["D"], case["Tq"], case["formats"]
    sizes = [format(name.partition(" ")[0]).data_bytes(page_size, D) for name in names]
    tokens = int(case["part"] * sum(case["lens"]))
    moved = sum(sizes) // len(sizes) * tokens // page_size * case["Hkv"]
    vectors = 2 * len(case["lens"]) * Tq * case["Hq"] * D
    return moved + vectors * getattr(torch, case["dtype"]).itemsize, 4 * tokens * Tq * case["Hq"] * D
