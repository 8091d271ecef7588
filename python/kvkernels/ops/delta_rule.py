"""delta_rule: linear attention whose state is corrected, not only added to."""

import itertools
from typing import Any

import torch
from torch import Tensor

from kvkernels.ops import _args, _delta
from kvkernels.ops._refusal import refused

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = ()

MODES = {"chunk": False, "recurrent": True}
KEPT_EVERY = 512  # tokens from one state that is kept for the backward pass to the next

_op = torch.ops.kvkernels.delta_rule.default
_backward_op = torch.ops.kvkernels.delta_rule_backward.default


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None = None,
    *,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    beta_rule: str = "raw",
    chunk_size: int | None = None,
    checkpoint_every: int = 0,
    mode: str = "chunk",
) -> Tensor | tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
    """A state S [K, V] per sequence and value head; every token changes it and then reads it:

        S <- diag(exp g) S                                       forget
        S <- S + k (beta write v - S^T (beta erase k))^T         put v where k points, in place of what was there
        o  = scale S^T q

    Without g this is DeltaNet; g per head, Gated DeltaNet; g per channel, KDA (Kimi Delta Attention); erase and write,
    gates of each channel of the two sides, GDN-2. Value head h uses queries and keys of head h // (HV // H).

    q, k           [B, T, H, K] float32, float16 or bfloat16; K and V at most 256
    v              [B, T, HV, V], same dtype; HV a multiple of H
    beta           [B, T, HV], or None for 1. Comes before g; fla and the models of transformers pass g before beta
    g              [B, T, HV] or [B, T, HV, K]: natural log of the decay, <= 0, -inf included. None: no decay
    erase, write   [B, T, HV, K] and [B, T, HV, V], or None for 1
    scale          of q; None: 1 / sqrt(K)
    initial_state  float32 [N, HV, K, V] contiguous; None: zeros. N sequences
    cu_seqlens     int32 or int64 [N + 1], B = 1: sequence n is tokens cu_seqlens[n] to cu_seqlens[n + 1], which may be
                   none; tokens past cu_seqlens[N] are not read and get zeros. None: B sequences of T tokens
    qk_l2norm      q and k are divided by sqrt(sum of squares + 1e-6), in float32
    beta_rule      "raw"; "sigmoid": beta is put through it; "sigmoid2": and doubled, so that eigenvalues down to -1 are
                   possible; "kaczmarz": beta is divided by (sum of k^2 + 1e-6), the step that makes S^T k = v at 1
    chunk_size     tokens that are worked on at once: 16, 32 or 64. None: the fastest here
    checkpoint_every  n > 0 (a multiple of chunk_size): the state after every n tokens of a sequence is returned too
    mode           "chunk", or "recurrent": token by token, with the bits of delta_rule_step

    beta, g, erase and write may each be float32, float16 or bfloat16. Tensors are contiguous in the last dim (beta, and
    g per head, need not be), otherwise strides are honoured.

    Returns o [B, T, HV, V] in the dtype of q; with output_final_state (o, final_state [N, HV, K, V] float32); with
    checkpoint_every (o, final_state or None, checkpoints), float32 [B, T // n, HV, K, V]: state j of a sequence is the
    one after its tokens up to (j + 1) n. With cu_seqlens checkpoints are [T // n, HV, K, V], and state j of sequence i
    is number cu_seqlens[i] // n + j; numbers that no sequence has hold zeros.

    The gradient is that of everything but checkpoints, whatever the mode. For it, on CPU, the state is kept every
    checkpoint_every tokens, 512 unless given; the rest, on CUDA all, is computed again. There is no second derivative.

    State and sums are float32; for 16-bit inputs, products with the state may round it, which moves states by less than
    1e-3 of their size (docs/delta.md). Keys of length 1 and beta of at most 2 keep S from growing. Bits of a sequence
    do not depend on others in the batch, on padding, or on the number of threads. ValueError: dtypes, shapes or devices
    that do not fit, options out of range, cu_seqlens that is not ascending from 0 to at most T (seen on CPU).

    Source: Yang et al. 2024, arXiv:2406.06484 (DeltaNet in chunks), arXiv:2412.06464 (Gated DeltaNet); Kimi Team 2025,
    arXiv:2510.26692 (KDA); Grazzi et al. 2024, arXiv:2411.12537 (negative eigenvalues).
    """
    try:
        o, final_state, checkpoints = _delta_rule(
            q, k, v, beta, g, erase=erase, write=write, scale=scale, initial_state=initial_state,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens, qk_l2norm=qk_l2norm, beta_rule=beta_rule,
            chunk_size=chunk_size, checkpoint_every=checkpoint_every, mode=mode,
        )  # fmt: skip
        assert o is not None
        if checkpoints is not None:
            return o, final_state, checkpoints
        return (o, final_state) if output_final_state else o
    except Exception as e:
        raise refused(delta_rule, e, locals()) from None


def _delta_rule(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None = None,
    *,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    beta_rule: str = "raw",
    chunk_size: int | None = None,
    checkpoint_every: int = 0,
    mode: str = "chunk",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """o, final_state, checkpoints, each None unless asked for. Without q only states are computed."""
    rule = _delta.option("delta_rule", "beta_rule", beta_rule, _delta.BETA_RULES)
    recurrent = bool(_delta.option("delta_rule", "mode", mode, MODES))
    if scale is None:
        scale = k.shape[-1] ** -0.5 if k.dim() and k.shape[-1] else 1.0
    elif scale != scale:
        raise ValueError("delta_rule: scale is NaN")
    if cu_seqlens is not None and cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = str(cu_seqlens.dtype).removeprefix("torch.")
        raise ValueError(f"delta_rule: cu_seqlens must be int32 or int64, got {kind}")
    if cu_seqlens is not None and cu_seqlens.dtype == torch.int64:
        cu_seqlens = cu_seqlens.clamp(-1, 2**31 - 1).to(torch.int32)
    every = checkpoint_every
    if (
        not every
        and k.device.type == "cpu"  # on CUDA the backward pass makes all of them again
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (q, k, v, beta, g, erase, write, initial_state))
    ):
        every = KEPT_EVERY
    o, final_state, checkpoints = _op(
        q, k, v, beta, g, erase, write, initial_state, cu_seqlens, scale, qk_l2norm, rule, chunk_size, every,
        output_final_state, recurrent,
    )  # fmt: skip
    return (
        None if q is None else o,
        final_state if output_final_state else None,
        checkpoints if checkpoint_every else None,
    )


@torch.library.register_fake("kvkernels::delta_rule")
def _(q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, erase: Tensor | None,
      write: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, qk_l2norm: bool,
      beta_rule: int, chunk_size: int | None, checkpoint_every: int, want_final: bool, recurrent: bool,
      ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _args.same_device("delta_rule", q=q, k=k, v=v, beta=beta, g=g, erase=erase, write=write,
                      initial_state=initial_state, cu_seqlens=cu_seqlens)  # fmt: skip
    B, T, HV, V = v.shape
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (HV, k.shape[-1], V)
    none = k.new_empty(0, dtype=torch.float32)
    checkpoints = none
    if checkpoint_every > 0:
        rows = (B,) if cu_seqlens is None else ()
        checkpoints = k.new_empty((*rows, T // checkpoint_every, *state), dtype=torch.float32)
    return (
        none if q is None else v.new_empty(v.shape),
        k.new_empty((sequences, *state), dtype=torch.float32) if want_final else none.clone(),
        checkpoints if checkpoint_every > 0 else none.clone(),
    )


@torch.library.register_fake("kvkernels::delta_rule_backward")
def _(q: Tensor | None, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, erase: Tensor | None,
      write: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, checkpoints: Tensor | None,
      d_out: Tensor | None, d_final: Tensor | None, scale: float, qk_l2norm: bool, beta_rule: int,
      chunk_size: int | None, checkpoint_every: int, wanted: int) -> tuple[Tensor, ...]:  # fmt: skip
    def gradient(i: int, x: Tensor | None, dtype: torch.dtype) -> Tensor:
        return k.new_empty(x.shape if x is not None and wanted >> i & 1 else (0,), dtype=dtype)

    same = [gradient(i, x, k.dtype if wanted >> i & 1 else torch.float32) for i, x in enumerate((q, k, v))]
    rest = (beta, g, erase, write, initial_state)
    return (*same, *(gradient(i, x, torch.float32) for i, x in enumerate(rest, 3)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, l2norm, rule, chunk_size, every, want_final, _ = inputs
    checkpoints = output[2]
    ctx.save_for_backward(*tensors, checkpoints if every else None)
    ctx.options = scale, l2norm, rule, chunk_size, every
    ctx.want_final = want_final
    ctx.mark_non_differentiable(checkpoints)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens, checkpoints = ctx.saved_tensors
    d_out = None if d_out is None or tensors[0] is None else d_out.contiguous()
    d_final = None if d_final is None or not ctx.want_final else d_final.contiguous()
    wanted = sum(1 << i for i, needed in enumerate(ctx.needs_input_grad[:8]) if needed)
    gradients = _backward_op(*tensors, cu_seqlens, checkpoints, d_out, d_final, *ctx.options, wanted)
    of_inputs = (
        d.to(x.dtype) if x is not None and wanted >> i & 1 else None for i, (d, x) in enumerate(zip(gradients, tensors))
    )
    return (*of_inputs, *(None,) * 8)


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("delta_rule: there is no second derivative")


torch.library.register_autograd("kvkernels::delta_rule", _backward, setup_context=_setup_context)
torch.library.register_autograd("kvkernels::delta_rule_backward", _no_second_derivative)


def reference(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None = None,
    *,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    beta_rule: str = "raw",
    chunk_size: int | None = None,
    checkpoint_every: int = 0,
    mode: str = "chunk",
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor | None, ...]:
    """The recurrence, which knows no chunks and no modes; autograd goes through it. o, final_state, checkpoints, those
    that were asked for."""
    B, T, HV, V = v.shape
    K = k.shape[-1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rule = _delta.Rule(K**-0.5 if scale is None else scale, qk_l2norm, beta_rule)
    if cu_seqlens is None:
        spans = [(b, 0, T) for b in range(B)]
    else:
        ends = cu_seqlens.tolist()
        spans = [(0, begin, end) for begin, end in itertools.pairwise(ends)]
    rows: list[list[Tensor]] = [[] for _ in range(B)]
    finals: list[Tensor] = []
    zero = torch.zeros(HV, K, V, dtype=wide)
    slots = T // checkpoint_every if checkpoint_every else 0
    kept: list[list[Tensor]] = [[zero] * slots for _ in range(B)]
    for n, (b, begin, end) in enumerate(spans):
        inputs = [None if x is None else x[b, begin:end] for x in (q, k, v, beta, g, erase, write)]
        state = zero if initial_state is None else initial_state[n].to(wide)
        o, states = _delta.tokens(rule, inputs, state, dtype)
        if o is not None:
            rows[b].append(o.to(dtype))
        finals.append(states[-1] if states else state)
        for j in range((end - begin) // checkpoint_every if checkpoint_every else 0):
            kept[b][begin // checkpoint_every + j] = states[(j + 1) * checkpoint_every - 1]
    results: list[Tensor | None] = []
    if q is not None:
        past = T - spans[-1][2] if spans else 0
        results.append(torch.stack([torch.cat([*r, torch.zeros(past, HV, V, dtype=dtype)]) for r in rows])
                       if B else torch.zeros(v.shape, dtype=dtype))  # fmt: skip
    if output_final_state:
        results.append(torch.stack(finals) if finals else zero.new_zeros(0, HV, K, V))
    if checkpoint_every:
        states = [torch.stack(s) if s else zero.new_zeros(0, HV, K, V) for s in kept]
        results.append(states[0] if cu_seqlens is not None else torch.stack(states))
    return tuple(results)


def cases() -> list[dict[str, Any]]:
    base = {"B": 2, "T": 70, "H": 1, "HV": 2, "K": 32, "V": 32, "dtype": "float32", "gate": "head"}
    return [
        base,
        {**base, "gate": None, "beta": 2},
        {**base, "gate": "channel"},
        {**base, "gate": "channel", "erase": True, "write": True, "beta": None, "K": 16, "V": 48, "T": 33},
        {**base, "gate": None, "write": True, "beta_rule": "kaczmarz", "T": 17},
        {**base, "erase": True, "gate_dtype": "float16", "T": 40, "V": 16},
        *({**base, "gate": g, "K": 60, "V": 100, "T": 37, "B": 1, "strided": True, "l2norm": True}
          for g in ("head", "channel")),
        *({**base, "gate": g, "K": 128, "V": 128, "H": 1, "HV": 1, "B": 1, "dtype": "bfloat16",
           "gate_dtype": "bfloat16", "T": 65, "initial_state": True, "l2norm": True, "beta_rule": "sigmoid2"}
          for g in ("head", "channel")),
        {**base, "dtype": "float16", "H": 2, "HV": 4, "K": 64, "V": 16, "T": 20, "beta_rule": "sigmoid"},
        *({**base, "B": 1, "lens": (0, 21, 1, 0, 33), "tail": 5, "initial_state": True, "checkpoint_every": 16,
           "gate": g, "dtype": d, "chunk_size": c}
          for g, d, c in (("head", "bfloat16", None), ("channel", "float32", 16))),
        {**base, "B": 1, "lens": (33, 0), "T": 33, "gate": "channel", "mode": "recurrent", "final": False},
        {**base, "T": 66, "checkpoint_every": 32, "chunk_size": 32, "initial_state": True, "mode": "recurrent"},
        *({**base, "chunk_size": c, "K": 16, "V": 16, "beta": 2} for c in (16, 32, 64)),
        {**base, "T": 64, "checkpoint_every": 64, "chunk_size": 64, "final": False, "K": 48},
        {**base, "T": 0, "initial_state": True},
        {**base, "T": 1, "B": 3, "K": 1, "V": 1},
        {**base, "T": 3, "B": 0},
        {**base, "T": 18, "H": 1, "HV": 1, "K": 256, "V": 256, "B": 1, "gate": "channel"},
    ]  # fmt: skip


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """lens: sequences in one row, and behind them `tail` tokens that must not be read; final: with final_state, as
    unless told. See _delta.random_inputs for the rest."""
    gen = torch.Generator().manual_seed(seed)
    lens, B = case.get("lens"), case["B"]
    T = sum(lens) + case.get("tail", 0) if lens else case["T"]
    x = _delta.random_inputs(case, (B, T), gen)
    options: dict[str, Any] = {"output_final_state": case.get("final", True)}
    if lens:
        options["cu_seqlens"] = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
        for t in x.values():
            if t is not None:
                t[:, sum(lens) :] = torch.nan
    if case.get("initial_state"):
        shape = (len(lens) if lens else B, case["HV"], case["K"], case["V"])
        options["initial_state"] = torch.randn(shape, generator=gen)
    options |= {n: case[n] for n in ("beta_rule", "chunk_size", "checkpoint_every", "mode") if n in case}
    if case.get("l2norm"):
        options["qk_l2norm"] = True
    return (x["q"], x["k"], x["v"], x["beta"], x["g"]), {**options, "erase": x["erase"], "write": x["write"]}


def cost(case: dict[str, Any]) -> tuple[int, int]:
    lens = case.get("lens")
    count = sum(lens) if lens else case["B"] * case["T"]
    states = (len(lens) if lens else case["B"]) * (bool(case.get("initial_state")) + case.get("final", True))
    if case.get("checkpoint_every"):
        states += sum(n // case["checkpoint_every"] for n in (lens or (case["T"],) * case["B"]))
    return _delta.cost(case, count, states, 4)
