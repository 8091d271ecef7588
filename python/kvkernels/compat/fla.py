"""The delta rule under the signatures of flash-linear-attention (fla-core 0.6), on CPU and CUDA, with gradients.

    from kvkernels.compat.fla import chunk_gated_delta_rule    # instead of fla.ops.gated_delta_rule

Arguments, shapes, defaults and results are fla's, of the same meaning: o in q's dtype and the final state in float32,
or None. What differs: any K, V <= 256 and float32 inputs are taken everywhere; the recurrent forms have gradients;
chunk_size=None is our own choice; `safe_gate`, `disable_recompute` and `use_graph` change nothing, because no gate
overflows, nothing is stored and every call can be captured. cu_seqlens_cpu and chunk_indices are not needed and not
read. Refused with ValueError: cp_context (kk.delta_context does that), gates over V (gv), beta over V.

Source: https://github.com/fla-org/flash-linear-attention, its docstrings; written anew.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvkernels.ops.delta_rule import delta_rule

Result = tuple[Tensor, Tensor | None]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> Result:
    """fla.ops.gated_delta_rule.chunk_gated_delta_rule: Gated DeltaNet, a gate per value head. g [B, T, HV]."""
    if use_gate_in_kernel:
        g = _gate("chunk_gated_delta_rule", g, A_log, dt_bias, None)
    return _run("chunk_gated_delta_rule", q, k, v, beta, g, scale, initial_state, output_final_state,
                use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens,
                cp_context, chunk_size)  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule: token by token, with gates gk [B, T, HV, K] too."""
    name = "fused_recurrent_gated_delta_rule"
    if gv is not None:
        raise ValueError(f"{name}: gv, a gate over the channels of v, is not supported")
    if use_gate_in_kernel:
        if g is None:
            raise ValueError(f"{name}: use_gate_in_kernel needs g, the gate before its activation")
        g = _gate(name, g, A_log, dt_bias, None)
    if gk is not None:
        g = gk if g is None else gk + g.unsqueeze(-1)
    return _run(name, q, k, v, beta, g, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
                use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens, None, None,
                "recurrent")  # fmt: skip


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    chunk_size: int | None = None,
) -> Result | tuple[Tensor, Tensor | None, Tensor]:
    """fla.ops.kda.chunk_kda: Kimi delta attention, a gate per value head and key channel. g [B, T, HV, K].

    With return_intermediate_states a third result: the states at the starts of chunks of chunk_size (64 unless given)
    tokens, bfloat16 [B, NT, HV, K, V], NT = ceil(T / chunk_size); with cu_seqlens those of all sequences one after the
    other, for which the host waits for cu_seqlens.
    """
    if use_gate_in_kernel:
        g = _gate("chunk_kda", g, A_log, dt_bias, lower_bound)
    every = (chunk_size or 64) if return_intermediate_states else 0
    return _run("chunk_kda", q, k, v, beta, g, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
                use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens, cp_context, chunk_size,
                every=every)  # fmt: skip


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """fla.ops.kda.fused_recurrent_kda: the same token by token."""
    if use_gate_in_kernel:
        g = _gate("fused_recurrent_kda", g, A_log, dt_bias, lower_bound)
    return _run("fused_recurrent_kda", q, k, v, beta, g, scale, initial_state, output_final_state,
                use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens, None,
                None, "recurrent")  # fmt: skip


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    *,
    chunk_size: int | None = None,
) -> Result:
    """fla.ops.delta_rule.chunk_delta_rule: DeltaNet, no gate."""
    return _run("chunk_delta_rule", q, k, v, beta, None, scale, initial_state, output_final_state,
                use_qk_l2norm_in_kernel, False, False, False, cu_seqlens, None, chunk_size)  # fmt: skip


def fused_recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """fla.ops.delta_rule.fused_recurrent_delta_rule: the same token by token."""
    return _run("fused_recurrent_delta_rule", q, k, v, beta, None, scale, initial_state, output_final_state,
                use_qk_l2norm_in_kernel, False, False, False, cu_seqlens, None, None, "recurrent")  # fmt: skip


def _gate(name: str, x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """The gate's activation, in float32 and differentiable: x [B, T, HV] or [B, T, HV, K], A_log of HV numbers."""
    if A_log is None and lower_bound is None:
        raise ValueError(f"{name}: use_gate_in_kernel needs A_log, or a lower_bound")
    heads = (x.shape[2], *(1,) * (x.dim() - 3))
    x = x.float()
    if dt_bias is not None:
        x = x + dt_bias.float().reshape(x.shape[2:])
    rate = A_log.float().exp().reshape(heads) if A_log is not None else 1.0
    return -rate * F.softplus(x) if lower_bound is None else lower_bound * torch.sigmoid(rate * x)


def _run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    l2norm: bool,
    sigmoid: bool,
    neg_eigval: bool,
    v_first: bool,
    cu_seqlens: Tensor | None,
    cp_context: Any,
    chunk_size: int | None,
    mode: str = "chunk",
    every: int = 0,
) -> Any:
    if cp_context is not None:
        raise ValueError(f"{name}: cp_context is not supported; kk.delta_context cuts a sequence over devices")
    if neg_eigval and not sigmoid:
        raise ValueError(f"{name}: allow_neg_eigval needs use_beta_sigmoid_in_kernel")
    if beta is not None and beta.dim() == 4:
        raise ValueError(f"{name}: beta must be [B, T, HV]; one over the channels of v is not supported")
    if initial_state is not None:
        initial_state = (initial_state.transpose(-1, -2) if v_first else initial_state).float().contiguous()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    g = g if g is None or g.stride(-1) == 1 else g.contiguous()
    result: Any = delta_rule(
        q, k, v, beta, g,
        scale=scale, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        qk_l2norm=l2norm, beta_rule=("sigmoid2" if neg_eigval else "sigmoid") if sigmoid else "raw",
        chunk_size=chunk_size, checkpoint_every=every, mode=mode,
    )  # fmt: skip
    if not output_final_state and not every:
        return result, None
    o, final_state = result[:2]
    if final_state is not None and v_first:
        final_state = final_state.transpose(-1, -2).contiguous()
    if not every:
        return o, final_state
    states = _states_at_chunk_starts(result[2], initial_state, cu_seqlens, every, q.shape[1])
    return o, final_state, states.transpose(-1, -2) if v_first else states


def _states_at_chunk_starts(
    ends: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, every: int, tokens: int
) -> Tensor:
    """The initial state, then the states after all chunks but the last, in bfloat16."""
    if cu_seqlens is None:
        first = torch.zeros_like(ends[:, :0].sum(1)) if initial_state is None else initial_state
        return torch.cat([first.unsqueeze(1), ends], 1)[:, : -(-tokens // every)].bfloat16()
    bounds = cu_seqlens.tolist()
    parts = []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        if end > begin:
            first = torch.zeros_like(ends[:0].sum(0)) if initial_state is None else initial_state[n]
            slot = begin // every
            parts += [first.unsqueeze(0), ends[slot : slot + (end - begin - 1) // every]]
    return torch.cat(parts or [ends[:0]]).unsqueeze(0).bfloat16()
