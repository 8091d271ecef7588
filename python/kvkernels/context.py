"""Cutting a sequence of the delta rule over threads, devices or ranks: what a segment does to the state before it."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kvkernels.ops._delta import product as _product
from kvkernels.ops._refusal import refused
from kvkernels.ops.delta_rule import _delta_rule


class DeltaContext(NamedTuple):
    """A segment takes the state S before it to transition @ S + state. Both float32, one per sequence and value head.

    The transitions of a long chain must stay in float32: autocast does not reach them, but leave
    torch.backends.cuda.matmul.allow_tf32 off, as it is.
    """

    state: Tensor  # [N, HV, K, V]
    transition: Tensor  # [N, HV, K, K]

    def then(self, later: "DeltaContext") -> "DeltaContext":
        """The context of this segment and the `later` one that follows it. Associative."""
        return DeltaContext(later.after(self.state), _product(later.transition, self.transition))

    def after(self, initial_state: Tensor | None = None) -> Tensor:
        """The state after the segment, [N, HV, K, V]; initial_state: before it, zeros unless given."""
        return self.state if initial_state is None else _product(self.transition, initial_state) + self.state

    def initial_states(self, initial_state: Tensor | None = None) -> Tensor:
        """For N segments of one sequence, one after the other: the state before each, [N, HV, K, V].

        initial_state [HV, K, V]: before the first, zeros unless given. With cu_seqlens at the cuts, delta_rule then
        runs the segments side by side:

            context = kk.delta_context(k, v, beta, g, cu_seqlens=cuts)
            o = kk.delta_rule(q, k, v, beta, g, cu_seqlens=cuts, initial_state=context.initial_states())
        """
        before = [torch.zeros_like(self.state[:1].sum(0)) if initial_state is None else initial_state]
        for state, transition in zip(self.state[:-1], self.transition[:-1]):
            before.append(_product(transition, before[-1]) + state)
        return torch.stack(before[: len(self.state)]) if len(self.state) else self.state

    def gather(self, group: Any = None, initial_state: Tensor | None = None) -> Tensor:
        """Ranks hold consecutive segments of the same N sequences, rank 0 the first: the state before this rank's.

        group          a process group of torch.distributed; the default one unless given
        initial_state  float32 [N, HV, K, V], the same on all ranks: before rank 0's segment, zeros unless given

        One all-gather of K (V + K) numbers per head, whatever the length of the segments. Differentiable: its backward
        is one all-reduce, which every rank must take part in. Returns float32 [N, HV, K, V].

        Source: Sun et al. 2025, arXiv:2502.07563 (LASP-2).
        """
        V = self.state.shape[-1]
        every: Tensor = _AllGather.apply(torch.cat([self.state, self.transition], -1), group)
        # All ranks compute all states and take their own: rank 0 must depend on what was gathered too, or it would miss
        # the all-reduce of the backward.
        flat = DeltaContext(every[..., :V].flatten(1, 2), every[..., V:].flatten(1, 2))
        first = None if initial_state is None else initial_state.flatten(0, 1)
        return flat.initial_states(first)[dist.get_rank(group)].view_as(self.state)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)  # not the engine's own
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


def delta_context(
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None = None,
    *,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    beta_rule: str = "raw",
    chunk_size: int | None = None,
) -> DeltaContext:
    """What segments do to the state before them, without knowing it: DeltaContext(state, transition).

    All arguments as in delta_rule, over the tokens of a segment; N = B segments, or those of cu_seqlens. An empty
    segment has state 0 and transition 1. Gradients flow to every input. Exact: delta_rule over a whole sequence and
    over its segments, each from the state that the earlier contexts give, agree within rounding.

    The columns of a state do not know of each other, so the transition is what becomes of the unit matrix as state
    while nothing is written. Costs per token 4 K V operations for the state and 4 K K for the transition, where
    delta_rule has 6 K V.

    Errors as in delta_rule. Source: Sun et al. 2025, arXiv:2502.07563 (LASP-2); the context parallelism of
    flash-linear-attention.
    """
    try:

        def final_state(v: Tensor, write: Tensor | None, initial_state: Tensor | None) -> Tensor:
            state = _delta_rule(
                None, k, v, beta, g, erase=erase, write=write, initial_state=initial_state, output_final_state=True,
                cu_seqlens=cu_seqlens, qk_l2norm=qk_l2norm, beta_rule=beta_rule, chunk_size=chunk_size,
            )[1]  # fmt: skip
            assert state is not None
            return state

        state = final_state(v, write, None)
        K = k.shape[-1]
        nothing = v.new_zeros(K).expand(*v.shape[:-1], K)
        unit = torch.eye(K, dtype=torch.float32, device=k.device).expand(*state.shape[:2], K, K).contiguous()
        return DeltaContext(state, final_state(nothing, None, unit))
    except Exception as e:
        raise refused(delta_context, e, locals(), "delta_rule") from None
