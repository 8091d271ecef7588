"""plan_prefix: which sequences of a batch have which pages in common."""

from typing import Any

import torch
from torch import Tensor

from kvkernels.ops import _args
from kvkernels.ops._refusal import refused
from kvkernels.plan import Plan

DTYPES = (torch.int32,)
FORMATS = ()
# The default of min_tokens. With 64, trees of many small nodes were slower on CPU than no plan: bench prefix_attention.
MIN_TOKENS = 128
MAX_DEPTH = 8  # kMaxPlanDepth: nodes of a sequence, its leaf among them

_op = torch.ops.kvkernels.plan.default


def plan_prefix(
    page_table: Tensor, seq_lens: Tensor, page_size: int, *, num_queries: int = 1, min_tokens: int | None = None
) -> Plan:
    """Find the sequences whose leading page-table entries are equal, so that attention reads those pages once.

    page_table   int32 [B, max_pages], as the attention ops take it; only entries of tokens that may be shared are read
    seq_lens     int32 [B], tokens, the queries' own included; 0: empty
    page_size    tokens per page
    num_queries  Tq of the attention, at least 1: shared are whole pages before a sequence's last num_queries tokens
    min_tokens   what a shared run must save: T tokens of n sequences are read once where T (n - 1) / n >= min_tokens,
                 else by each group that goes on from there. None: 128

    Returns a Plan on the device of its arguments, for `plan=` of quant_attention, flash_decode and prefix_attention:
    any number of groups, trees of up to 8 levels (what is shared further down is read by each sequence for itself). One
    for all layers of a step. Found on the device, without waiting for it;
    in a CUDA graph it follows the tables and lengths of each replay. The same on CPU and CUDA. ValueError: dtypes,
    shapes or numbers that do not fit; seq_lens that are negative or do not fit the table (seen on CPU, checked there on
    every call); on CUDA B above 2048.

    Source: Juravsky et al. 2024, arXiv:2402.05099 (Hydragen: queries of a shared prefix as rows of one product); Pan et
    al., MLSys 2025 (FastTree: trees of prefixes, and a cost that decides which nodes are worth it).
    """
    try:
        if torch.is_grad_enabled():
            _args.refuse_grad("plan_prefix", page_table=page_table, seq_lens=seq_lens)
        if page_table is None:  # by which the op knows plan_decode
            raise TypeError("plan_prefix: page_table must be a tensor, got None")
        plan = empty_plan(seq_lens)
        _op(page_table, seq_lens, page_size, num_queries, MIN_TOKENS if min_tokens is None else min_tokens, *plan)
        return plan
    except Exception as e:
        raise refused(plan_prefix, e, locals()) from None


def empty_plan(seq_lens: Tensor) -> Plan:
    B = seq_lens.shape[0]
    return Plan(*(torch.empty(n, dtype=torch.int32, device=seq_lens.device) for n in ((2 * B, 5), (B,), (B,))))


@torch.library.register_fake("kvkernels::plan")
def _(page_table: Tensor | None, seq_lens: Tensor, page_size: int, num_queries: int, min_tokens: int, nodes: Tensor,
      order: Tensor, leaf: Tensor) -> None:  # fmt: skip
    op = "plan_decode" if page_table is None else "plan_prefix"
    _args.same_device(op, seq_lens=seq_lens, page_table=page_table, nodes=nodes, order=order, leaf=leaf)


def reference(
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    *,
    num_queries: int = 1,
    min_tokens: int | None = None,
    dtype: torch.dtype | None = None,
) -> Plan:
    """The definition. dtype is not used: a plan is whole numbers."""
    lens = seq_lens.tolist()
    rows = [row[: max(0, n - num_queries) // page_size] for row, n in zip(page_table.tolist(), lens)]
    least = MIN_TOKENS if min_tokens is None else min_tokens
    children: dict[int, list[tuple[int, int]]] = {-1: []}  # node -> (smallest sequence, node)
    spans: list[tuple[int, int, int]] = []  # of a node: first token, one past its last, its parent
    depth = {-1: 0}

    def add(sequence: int, begin: int, end: int, parent: int) -> int:
        node = len(spans)
        spans.append((begin, end, parent))
        children[node] = []
        depth[node] = depth[parent] + 1
        children[parent].append((sequence, node))
        return node

    leaf_of: dict[int, int] = {}
    todo = [([b for b, n in enumerate(lens) if n > 0], 0, 0, -1)]
    while todo:
        members, pages, begin, parent = todo.pop()  # members agree on `pages` pages; `parent` ends at token `begin`
        if len(members) == 1 or depth[parent] == MAX_DEPTH - 1:
            leaf_of.update((b, add(b, begin, lens[b], parent)) for b in members)
            continue
        shortest = min((len(rows[b]) for b in members), default=0)
        while pages < shortest and len({rows[b][pages] for b in members}) == 1:
            pages += 1
        tokens, n = pages * page_size - begin, len(members)
        if tokens > 0 and tokens * (n - 1) >= least * n:
            parent, begin = add(members[0], begin, pages * page_size, parent), pages * page_size
        groups: dict[Any, list[int]] = {}
        for b in members:
            groups.setdefault(rows[b][pages] if len(rows[b]) > pages else ("alone", b), []).append(b)
        todo += [(group, pages, begin, parent) for group in groups.values()]

    nodes = torch.tensor([[0, 0, 0, 0, -1]] * (2 * len(lens)), dtype=torch.int32).view(-1, 5)
    order: list[int] = []
    number: dict[int, int] = {-1: -1}
    sequence_of = {node: b for b, node in leaf_of.items()}
    path = sorted(children[-1], reverse=True)
    while path:  # preorder; a node is met again, as ~node, when all below it is placed
        sequence, node = path.pop()
        if node < 0:
            nodes[number[~node], 1] = len(order)
            continue
        begin, end, parent = spans[node]
        number[node] = len(number) - 1
        nodes[number[node]] = torch.tensor([len(order), len(order) + 1, begin, end, number[parent]])
        if node in sequence_of:
            order.append(sequence_of[node])
        else:
            path += [(sequence, ~node), *sorted(children[node], reverse=True)]
    leaf = [number[leaf_of[b]] if b in leaf_of else -1 for b in range(len(lens))]
    order += [b for b, n in enumerate(lens) if n == 0]
    return Plan(nodes, torch.tensor(order, dtype=torch.int32), torch.tensor(leaf, dtype=torch.int32))


def cases() -> list[dict[str, Any]]:
    """tree: how sequences share, as random_batch() makes it."""
    base = {"tree": "random", "B": 24, "page_size": 4, "seed": 0}
    return [
        base,
        *({**base, "seed": seed, "min_tokens": least} for seed in range(1, 7) for least in (0, 5, 20)),
        *({**base, "tree": tree, "min_tokens": 0} for tree in TREES if tree != "random"),
        {**base, "B": 0},
        {**base, "B": 1},
        {**base, "B": 100, "page_size": 16},
        {**base, "B": 33, "page_size": 1, "min_tokens": 1, "num_queries": 5},
        {**base, "tree": "one prefix", "B": 8, "pages": 300},
        {**base, "tree": "one prefix", "B": 3, "pages": 100, "min_tokens": 267},  # 400 tokens: 267 * 3 > 400 * 2
        {**base, "tree": "comb", "B": 70, "min_tokens": 3},
    ]


TREES = ("random", "nothing", "identical", "one prefix", "groups", "comb", "reversed comb", "pairs", "equal tables")


def random_batch(tree: str, B: int, pages: int, page_size: int, num_queries: int, gen: torch.Generator) -> tuple[
    list[list[int]], list[int]
]:  # fmt: skip
    """Page numbers and length of each sequence. Numbers are given once, so only what `tree` shares is shared; some
    random sequences are empty, end with a page, or are no longer than their queries."""
    given = iter(range(1 << 20))

    def new(n: int) -> list[int]:
        return [next(given) for _ in range(n)]

    def below(n: int) -> int:
        return int(torch.randint(0, n, (1,), generator=gen))

    rows: list[list[int]] = []
    trunk, groups = new(pages), [new(pages) for _ in range(3)]
    for b in range(B):
        shared = {
            "random": lambda b: rows[below(b)][: below(pages)] if b and below(4) else [],
            "nothing": lambda b: [],
            "identical": lambda b: trunk,
            "one prefix": lambda b: trunk,
            "groups": lambda b: groups[b % 3][: pages - b % 2],
            "comb": lambda b: trunk[: b + 1],
            "reversed comb": lambda b: trunk[: B - b],
            "pairs": lambda b: rows[b - 1][:-2] if b % 2 else trunk[: b // 8],
            "equal tables": lambda b: rows[0] if b else [],
        }[tree](b)
        own = 0 if tree in ("identical", "equal tables") and b else 1 + below(3)
        rows.append([*shared, *new(own)])
    lens = [len(row) * page_size - below(page_size) for row in rows]
    if tree == "random":
        for b in range(B):
            lens[b] = [lens[b], len(rows[b]) * page_size, lens[b], 0, lens[b], min(lens[b], num_queries)][below(6)]
    order = torch.randperm(B, generator=gen).tolist() if tree == "random" else range(B)
    return [rows[b] for b in order], [lens[b] for b in order]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Entries past the pages that may be shared are equal in all rows: they must not count."""
    gen = torch.Generator().manual_seed(1000 * seed + case["seed"])
    options: dict[str, Any] = {k: case[k] for k in ("num_queries", "min_tokens") if k in case}
    B, page_size, num_queries = case["B"], case["page_size"], options.get("num_queries", 1)
    rows, lens = random_batch(case["tree"], B, case.get("pages", 12), page_size, num_queries, gen)
    table = torch.full((B, max(map(len, rows), default=0) + 3), 7, dtype=torch.int32)
    for b, row in enumerate(rows):
        used = max(0, lens[b] - num_queries) // page_size
        table[b, :used] = torch.tensor(row[:used], dtype=torch.int32)
    return (table, torch.tensor(lens, dtype=torch.int32), page_size), options


def cost(case: dict[str, Any]) -> tuple[int, int]:
    """Bytes of the table's entries, of which a plan reads each at most about once."""
    return 4 * make(case)[0][0].numel(), 0
