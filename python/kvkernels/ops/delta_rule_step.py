"""delta_rule_step: the delta rule for decoding, on states that stay where they are."""

from typing import Any

import torch
from torch import Tensor

from kvkernels.ops import _args, _delta
from kvkernels.ops._refusal import refused

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMATS = ()
IN_PLACE = ("state",)

_op = torch.ops.kvkernels.delta_rule_step.default

Gate = tuple[Tensor, Tensor | None, float]


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None = None,
    *,
    state: Tensor,
    slots: Tensor,
    out_slots: Tensor | None = None,
    parents: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    beta_rule: str = "raw",
    gate: Gate | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """delta_rule for the next token of each of B sequences, or the next T; states are changed in place.

    q, k           [B, H, K], or [B, T, H, K]: T tokens, one after the other. As delta_rule takes them
    v              [B, HV, V] or [B, T, HV, V]; beta, g, erase, write likewise: see delta_rule. beta comes before g; fla
                   and the models of transformers pass g before beta. g is the natural log of the decay, <= 0, unless
                   `gate` makes one of it
    state          float32 or bfloat16 [num_slots, HV, K, V], contiguous within a slot: the pool
    slots          int32 [B]: where the state of a sequence is read. -1: a padding row, whose o is 0 and which reads and
                   writes no state
    out_slots      where states are written, -1: nowhere. None: where they were read. int32 [B]: after the last token.
                   int32 [B, T]: after each token; a rejected token is undone by reading an earlier one's slot next time
    parents        int32 [B, T], with out_slots [B, T]: token t goes on from the state after token parents[b, t] < t of
                   this call, which must have been written unless it is t - 1; -1: from the one in `slots`. A tree of
                   drafts is verified so
    scale, qk_l2norm, beta_rule  as in delta_rule
    gate           (A_log, dt_bias, lower_bound): the decay is made of g here, x = g + dt_bias. lower_bound 0:
                   -exp(A_log) softplus(x); negative: lower_bound * sigmoid(exp(A_log) x). A_log float32 [HV]; dt_bias
                   float32, [HV] or, if g is per channel, [HV, K], or None for 0
    out            where to write; like v, contiguous, in memory that no input has

    Returns o, [B, HV, V] or [B, T, HV, V], in the dtype of q. The state is float32 while it is worked on and is rounded
    to the pool's dtype after every token, so that T tokens in one call give the bits of T calls; T = 0 writes nothing.
    A slot that one sequence writes must not be another's; a slot that nobody writes may be read by many. ValueError:
    dtypes, shapes or devices that do not fit, options out of range, inputs that require grad (there is no backward:
    delta_rule has one); seen on CPU: slots past the pool or of two sequences, parents that are not earlier tokens or
    whose state is gone.

    Source: as delta_rule; the fused gates, Yang et al. 2024, arXiv:2412.06464 and Kimi Team 2025, arXiv:2510.26692.
    """
    try:
        a_log, dt_bias, lower_bound = _gate(gate)
        rule = _delta.option("delta_rule_step", "beta_rule", beta_rule, _delta.BETA_RULES)
        if torch.is_grad_enabled():
            _args.refuse_grad("delta_rule_step", q=q, k=k, v=v, state=state, slots=slots, beta=beta, g=g, erase=erase,
                              write=write, out_slots=out_slots, parents=parents,
                              **{"gate A_log": a_log, "gate dt_bias": dt_bias}, out=out)  # fmt: skip
        if scale is None:
            scale = k.shape[-1] ** -0.5 if k.dim() and k.shape[-1] else 1.0
        elif scale != scale:
            raise ValueError("delta_rule_step: scale is NaN")
        if out is None:
            out = torch.empty_like(v, memory_format=torch.contiguous_format)  # half the time of torch.empty
        _op(q, k, v, beta, g, erase, write, state, slots, out_slots, parents, a_log, dt_bias, lower_bound, scale,
            qk_l2norm, rule, out)  # fmt: skip
        _args.written(state, out)
        return out
    except Exception as e:
        raise refused(delta_rule_step, e, locals()) from None


def _gate(gate: Gate | None) -> tuple[Tensor | None, Tensor | None, float]:
    if gate is None:
        return None, None, 0.0
    if not isinstance(gate, (tuple, list)) or len(gate) != 3:
        raise ValueError("delta_rule_step: gate must be (A_log, dt_bias or None, lower_bound or 0.0)")
    if gate[0] is None:  # which the op takes for no gate
        raise TypeError("delta_rule_step: gate[0] must be a tensor, got None")
    return gate[0], gate[1], float(gate[2])


@torch.library.register_fake("kvkernels::delta_rule_step")
def _(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, erase: Tensor | None,
      write: Tensor | None, state: Tensor, slots: Tensor, out_slots: Tensor | None, parents: Tensor | None,
      A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float, scale: float, qk_l2norm: bool, beta_rule: int,
      out: Tensor) -> None:  # fmt: skip
    _args.same_device("delta_rule_step", q=q, k=k, v=v, beta=beta, g=g, erase=erase, write=write, state=state,
                      slots=slots, out_slots=out_slots, parents=parents, A_log=A_log, dt_bias=dt_bias,
                      out=out)  # fmt: skip


def decay(g: Tensor, gate: Gate, per_channel: bool, dtype: torch.dtype) -> Tensor:
    """What `gate` makes of g."""
    a_log, dt_bias, lower_bound = gate
    x = g.to(dtype) if dt_bias is None else g.to(dtype) + dt_bias.to(dtype)
    rate = a_log.to(dtype).exp()
    rate = rate[:, None] if per_channel else rate
    return lower_bound * (rate * x).sigmoid() if lower_bound else -rate * torch.nn.functional.softplus(x)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None = None,
    *,
    state: Tensor,
    slots: Tensor,
    out_slots: Tensor | None = None,
    parents: Tensor | None = None,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
    beta_rule: str = "raw",
    gate: Gate | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """o and the pool as the op leaves it: not in place, and in float64 without the rounding to the pool's dtype."""
    exact = dtype == torch.float64
    wide = torch.float64 if exact else torch.float32
    pool = state.to(wide)
    rule = _delta.Rule(k.shape[-1] ** -0.5 if scale is None else scale, qk_l2norm, beta_rule)
    if g is not None and gate is not None:
        g = decay(g, gate, g.dim() == v.dim(), wide)
    several = q.dim() == 4
    inputs = [x if x is None or several else x.unsqueeze(1) for x in (q, k, v, beta, g, erase, write)]
    B, T, HV, V = inputs[2].shape  # type: ignore[union-attr]
    o = torch.zeros(B, T, HV, V, dtype=dtype)
    targets = slots if out_slots is None else out_slots
    targets = targets.unsqueeze(1) if targets.dim() == 1 else targets
    for b in range(B):
        first = int(slots[b])
        if first < 0:
            continue
        after = [pool[first].clone()]
        for t in range(T):
            before = after[t if parents is None else int(parents[b, t]) + 1]
            token = [None if x is None else x[b, t : t + 1] for x in inputs]
            row, states = _delta.tokens(rule, token, before, dtype)
            assert row is not None
            o[b, t] = row[0].to(dtype)
            after.append(states[0] if exact else states[0].to(state.dtype).to(wide))
        for t, slot in enumerate(targets[b].tolist(), T - targets.shape[1]):
            if slot >= 0:
                pool[slot] = after[t + 1]
    return o if several else o[:, 0], pool if exact else pool.to(state.dtype)


def cases() -> list[dict[str, Any]]:
    base = {"B": 3, "H": 2, "HV": 4, "K": 64, "V": 32, "dtype": "bfloat16", "gate": "head", "l2norm": True}
    return [
        base,
        {**base, "dtype": "float32", "H": 1, "HV": 2, "K": 128, "V": 128, "gate": None, "beta": None},
        {**base, "state": "bfloat16", "gate": "channel", "gate_dtype": "bfloat16", "fused": 0.0, "bias": True},
        {**base, "dtype": "float32", "K": 60, "V": 100, "gate": "channel", "fused": -5.0, "bias": True, "strided":
         True},
        {**base, "dtype": "float16", "fused": 0.0, "beta_rule": "sigmoid", "padded": True},
        {**base, "dtype": "float32", "fused": -3.0, "bias": True, "beta_rule": "sigmoid2", "pool": "gaps"},
        {**base, "T": 3, "K": 16, "V": 48, "dtype": "float32", "erase": True, "write": True, "beta_rule": "kaczmarz"},
        {**base, "T": 2, "out": "last", "padded": True},
        {**base, "T": 4, "out": "each", "state": "bfloat16", "padded": True, "strided": True},
        {**base, "T": 5, "out": "each", "parents": (-1, 0, 0, 2, -1), "padded": True},
        {**base, "T": 4, "out": "each", "parents": (-1, 0, 1, 1), "gate": "channel", "dtype": "float32", "state":
         "bfloat16"},
        {**base, "T": 3, "out": "each", "unkept": (0,), "dtype": "float32"},
        {**base, "T": None, "out": "each", "unkept": (0,)},
        {**base, "B": 1, "H": 1, "HV": 1, "K": 256, "V": 256, "dtype": "float32"},
        {**base, "B": 1, "H": 1, "HV": 1, "K": 1, "V": 1, "dtype": "float32"},
        {**base, "B": 0},
        {**base, "T": 0},
    ]  # fmt: skip


def make(case: dict[str, Any], seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Keys of a case beside those of _delta.random_inputs:

    T            tokens, with that dim
    state        dtype of the pool, whose slots that are not read hold NaN; pool "gaps": something between slots
    fused, bias  a gate with this lower_bound; with dt_bias
    padded       the middle row is none, and holds NaN
    out          "last" or "each" token to slots of its own; unkept: "each" but these, the last to where it was read
    """
    gen = torch.Generator().manual_seed(seed)
    B, HV, K, V = (case[n] for n in ("B", "HV", "K", "V"))
    T = case.get("T")
    x = _delta.random_inputs(case, (B,) if T is None else (B, T), gen)
    num_slots = 2 + B * (1 + (T or 1))
    order = torch.randperm(num_slots, generator=gen).to(torch.int32)
    slots, rest = order[:B].clone(), order[B:]
    if case.get("padded"):
        slots[B // 2] = -1
        for t in x.values():
            if t is not None:
                t[B // 2] = torch.nan
    pool = torch.full((num_slots, 2 if case.get("pool") == "gaps" else 1, HV, K, V), torch.nan,
                      dtype=getattr(torch, case.get("state", "float32")))[:, 0]  # fmt: skip
    for slot in slots.tolist():
        if slot >= 0:
            pool[slot] = torch.randn(HV, K, V, generator=gen)
    options: dict[str, Any] = {"state": pool, "slots": slots, "erase": x["erase"], "write": x["write"]}
    if case.get("out") == "last":
        options["out_slots"] = rest[:B].clone()
    elif case.get("out"):
        options["out_slots"] = rest[: B * (T or 1)].view(B, -1).clone()
        if "unkept" in case:
            options["out_slots"][:, -1] = slots
            options["out_slots"][:, case["unkept"]] = -1
    if "parents" in case:
        options["parents"] = torch.tensor(case["parents"], dtype=torch.int32).repeat(B, 1)
    if "fused" in case:
        per_channel = (K,) if case["gate"] == "channel" else ()
        bias = torch.randn(HV, *per_channel, generator=gen) if case.get("bias") else None
        options["gate"] = (torch.randn(HV, generator=gen), bias, case["fused"])
    if "beta_rule" in case:
        options["beta_rule"] = case["beta_rule"]
    return (x["q"], x["k"], x["v"], x["beta"], x["g"]), {**options, "qk_l2norm": case.get("l2norm", False)}


def cost(case: dict[str, Any]) -> tuple[int, int]:
    T = 1 if case.get("T") is None else case["T"]
    states = case["B"] * (1 + (T if case.get("out") == "each" else 1)) if T else 0
    return _delta.cost(case, case["B"] * T, states, getattr(torch, case.get("state", "float32")).itemsize)
