"""Mixed precision by saliency: tokens of a prompt in pools of different formats, by how much they matter."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvkernels.ops.write_kv import write_kv
from kvkernels.paged_kv import PAGE_BITS, PAGE_MASK, PagedKV


class TokenLayout(NamedTuple):
    """Where `lay_tokens` put the tokens of B prompts. Attention takes place j of a sequence for its token j.

    order:      int64 [B, T], the token of the prompt at each place; -1 past the end
    slots:      int64 [B, T], of each place in its pool, as write_kv takes them; -1 past the end
    page_table: int32 [B, max_pages], -1 past the end
    seq_lens:   int32 [B]
    """

    order: Tensor
    slots: Tensor
    page_table: Tensor
    seq_lens: Tensor


def tier_tokens(
    scores: Tensor,
    budgets: Sequence[int],
    *,
    page_size: int,
    seq_lens: Tensor | None = None,
    recent_tokens: int = 0,
) -> Tensor:
    """The pool of every token of B prompts, by how much it matters.

    scores        [B, T] floating point, not NaN; more matters more, of equal ones the earlier. Such as the attention of
                  the last queries of the prompt, score_tokens(..., reduce="softmax_sum").sum(1); Inf for sinks
    budgets       tokens for each pool but the last, the most important first; the last pool takes the rest
    page_size     of the cache
    seq_lens      int32 [B], at most T; None: all T. Tokens past the end have no pool
    recent_tokens the newest ones, whose scores are taken for Inf; no more than budgets[0]

    Returns int32 [B, T], -1 past the end. Pools but the first get whole pages: budgets are rounded up to pages, as far
    as there are tokens, and what fills no page stays in pool 0, which so holds up to page_size - 1 more. B or T 0:
    empty.

    Scores and lengths are read on the host. ValueError: NaN among the tokens that are there, lengths below 0 or past T,
    shapes and numbers that do not fit. TypeError: numbers that are no integers.

    Source: He et al. 2024, arXiv:2405.14256 (ZipCache): bits by the attention that tokens get; Yang et al. 2024,
    arXiv:2402.18096 (MiKV): tokens that others would drop stay at few bits.
    """
    budgets = [_integer(f"budgets[{i}]", n) for i, n in enumerate(budgets)]
    page_size, recent_tokens = _integer("page_size", page_size), _integer("recent_tokens", recent_tokens)
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"tier_tokens: scores must be [B, T] floating point; got {scores.dtype} {list(scores.shape)}")
    if not budgets or min(budgets) < 0:
        raise ValueError(f"tier_tokens: budgets must be one number of tokens or more, at least 0; got {budgets}")
    if page_size < 1:
        raise ValueError(f"tier_tokens: page_size must be at least 1; got {page_size}")
    if not 0 <= recent_tokens <= budgets[0]:
        raise ValueError(
            f"tier_tokens: recent_tokens must be 0 to budgets[0] = {budgets[0]}, of pool 0; got {recent_tokens}"
        )
    B, T = scores.shape
    if seq_lens is None:
        lens = torch.full((B, 1), T, device=scores.device)
    else:
        if seq_lens.shape != (B,) or seq_lens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"tier_tokens: seq_lens must be int32 [B] = [{B}], from scores; got {seq_lens.dtype} "
                f"{list(seq_lens.shape)}"
            )
        if seq_lens.device != scores.device:
            raise ValueError(f"tier_tokens: seq_lens is on {seq_lens.device}, but scores is on {scores.device}")
        wrong = ((seq_lens < 0) | (seq_lens > T)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"tier_tokens: seq_lens[{wrong[0]}] must be 0 to T = {T}, from scores; got {int(seq_lens[wrong[0]])}"
            )
        lens = seq_lens.long().unsqueeze(1)
    token = torch.arange(T, device=scores.device).expand(B, T)
    alive = token < lens
    unknown = (scores.isnan() & alive & (token < lens - recent_tokens)).nonzero().tolist()
    if unknown:
        raise ValueError("tier_tokens: scores[{}, {}] is NaN, and its token is not past the end".format(*unknown[0]))
    weight = scores.masked_fill(token >= lens - recent_tokens, torch.inf).masked_fill(~alive, -torch.inf)
    ranking = weight.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(ranking).scatter_(1, ranking, token)

    left = lens - lens.clamp(max=budgets[0])
    sizes = []  # of pools 1, 2, ...
    for budget in budgets[1:]:
        pages = torch.minimum(left // page_size, torch.full_like(left, -(-budget // page_size)))
        sizes.append(pages * page_size)
        left = left - sizes[-1]
    sizes.append(left // page_size * page_size)
    # [B, pools - 1]: ranks at which pools 1, 2, ... begin
    borders = lens - torch.cat(sizes, 1).flip(1).cumsum(1).flip(1)
    pool = (rank.unsqueeze(2) >= borders.unsqueeze(1)).sum(2, dtype=torch.int32)
    return pool.masked_fill(~alive, -1)


def _integer(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"tier_tokens: {name} must be an integer; got {value!r}") from None


def lay_tokens(
    k: Tensor, v: Tensor, kv: PagedKV, tiers: Tensor, pages: Sequence[Sequence[int] | Tensor]
) -> TokenLayout:
    """Write prompts into a cache, every token into its pool, and say where they are.

    k, v    [B, T, Hkv, D], keys after RoPE, as write_kv takes them
    kv      written in place
    tiers   int32 [B, T], the pool of every token, of `tier_tokens`; -1: the token is left out
    pages   for every pool its free pages, which are taken from the front, sequence by sequence

    Returns the TokenLayout. Pages of pool 0 stand last in a sequence, those of the last pool first; tokens of a pool
    keep their order. New tokens go on behind the newest of pool 0, in its last page (place n has slot
    page * page_size + n % page_size) and in new pages of any pool. Attention sees tokens in the order of the layout,
    which makes no difference to keys after RoPE and queries of appended tokens; only `window` and `alibi_slopes` would
    count places.

    The sizes of the tiers are read on the host. ValueError: shapes that do not fit, tokens of a pool other than 0 that
    are no whole pages, a pool without enough free pages or pages that it does not have, and all that write_kv refuses.
    B or T 0: nothing is written.
    """
    size = kv.page_size
    if k.dim() != 4 or tiers.shape != k.shape[:2] or tiers.is_floating_point():
        raise ValueError(
            f"lay_tokens: k must be [B, T, Hkv, D] and tiers int32 [B, T]; got {list(k.shape)} and {tiers.dtype} "
            f"{list(tiers.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"lay_tokens: v must have k's shape {list(k.shape)}; got {list(v.shape)}")
    if len(pages) != len(kv.pools):
        raise ValueError(f"lay_tokens: pages must be a list for each of the {len(kv.pools)} pools; got {len(pages)}")
    B, T = tiers.shape
    tiers = tiers.long()
    counts = torch.stack([(tiers == pool).sum(1) for pool in range(len(pages))], 1).tolist()
    lens = (tiers >= 0).sum(1)
    if (tiers >= len(pages)).any():
        raise ValueError(f"lay_tokens: tiers name pool {int(tiers.max())}, but there are {len(pages)}")

    given = [own.tolist() if isinstance(own, Tensor) else list(own) for own in pages]
    for pool, own in enumerate(given):
        if len(set(own)) < len(own):
            raise ValueError(f"lay_tokens: pages of pool {pool} name a page twice; got {own}")
        records = kv.pools[pool]
        there = len(records[0] if isinstance(records, tuple) else records)
        for page in own:
            if not 0 <= page < there:
                raise ValueError(f"lay_tokens: pages of pool {pool} must be 0 to {there - 1}; got {page}")
    free = [iter(own) for own in given]
    rows: list[list[int]] = []
    for b, own in enumerate(counts):
        row = []
        for pool in reversed(range(len(pages))):
            if pool and own[pool] % size:
                raise ValueError(
                    f"lay_tokens: tiers of sequence {b} have {own[pool]} tokens in pool {pool}, no whole pages of "
                    f"{size}; only pool 0, whose pages stand last, may end within one"
                )
            for _ in range(-(-own[pool] // size)):
                page = next(free[pool], None)
                if page is None:
                    raise ValueError(
                        f"lay_tokens: pool {pool} needs {sum(-(-c[pool] // size) for c in counts)} pages; "
                        f"got {len(pages[pool])}"
                    )
                row.append(kv.entry(pool, page))
        rows.append(row)

    width = -(-T // size)
    table = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32, device=k.device)
    table = table.view(B, width)
    alive = torch.arange(T, device=k.device) < lens.unsqueeze(1)
    order = torch.where(tiers >= 0, -tiers, 1).sort(dim=1, stable=True).indices  # the last pool first
    entries = table.long().repeat_interleave(size, 1)[:, :T]
    slots = (entries & PAGE_MASK) * size + torch.arange(T, device=k.device) % size
    for pool in range(len(pages)):
        sequence, place = (alive & (entries >> PAGE_BITS == pool)).nonzero(as_tuple=True)
        token = order[sequence, place]
        write_kv(k[sequence, token], v[sequence, token], kv, pool, slots[sequence, place])
    return TokenLayout(order.masked_fill(~alive, -1), slots.masked_fill(~alive, -1), table, lens.int())
