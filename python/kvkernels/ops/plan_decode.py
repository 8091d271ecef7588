"""plan_decode: the plan of a batch that shares nothing."""

from typing import Any

import torch
from torch import Tensor

from kvkernels.ops import _args, plan_prefix
from kvkernels.ops._refusal import refused
from kvkernels.plan import Plan

DTYPES = (torch.int32,)
FORMATS = ()

_op = torch.ops.kvkernels.plan.default


def plan_decode(seq_lens: Tensor) -> Plan:
    """A plan in which every sequence stands by itself: the same results as plan=None.

    seq_lens  int32 [B], tokens; 0: empty

    Returns a Plan on the device of seq_lens, for code that always passes one. Made on the device, without waiting for
    it; in a CUDA graph it follows the lengths of each replay. ValueError: a dtype or shape that does not fit, negative
    lengths (seen on CPU), on CUDA B above 2048.

    Source: Sanovar et al. 2024, arXiv:2405.10480 (LeanAttention: one schedule for all lengths).
    """
    try:
        if torch.is_grad_enabled():
            _args.refuse_grad("plan_decode", seq_lens=seq_lens)
        plan = plan_prefix.empty_plan(seq_lens)
        _op(None, seq_lens, 1, 1, 0, *plan)
        return plan
    except Exception as e:
        raise refused(plan_decode, e, locals()) from None


def reference(seq_lens: Tensor, dtype: torch.dtype | None = None) -> Plan:
    """The definition. dtype is not used: a plan is whole numbers."""
    B = len(seq_lens)
    nodes = torch.tensor([[0, 0, 0, 0, -1]] * (2 * B), dtype=torch.int32).view(-1, 5)
    leaf = torch.full((B,), -1, dtype=torch.int32)
    full = seq_lens.nonzero().flatten().tolist()
    for i, b in enumerate(full):
        nodes[i] = torch.tensor([i, i + 1, 0, seq_lens[b], -1])
        leaf[b] = i
    order = full + [b for b in range(B) if b not in full]
    return Plan(nodes, torch.tensor(order, dtype=torch.int32), leaf)


def cases() -> list[dict[str, Any]]:
    return [{"lens": lens} for lens in ((70, 1, 0, 129), (5,), (), (0, 0, 9), tuple(range(90)))]


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.tensor(case["lens"], dtype=torch.int32),), {}


def cost(case: dict[str, Any]) -> tuple[int, int]:
    return 4 * len(case["lens"]), 0
