"""What delta_rule and delta_rule_step share: names of options, the recurrence that defines both, inputs for tests."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

BETA_RULES = {"raw": 0, "sigmoid": 1, "sigmoid2": 2, "kaczmarz": 3}  # BetaRule
L2NORM_EPS = KACZMARZ_EPS = 1e-6


def option(op: str, name: str, value: str, numbers: Mapping[str, int]) -> int:
    if value not in numbers:
        raise ValueError(f"{op}: {name} must be one of {', '.join(numbers)}; got {value!r}")
    return numbers[value]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype, inside autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class Rule(NamedTuple):
    """Options of the recurrence."""

    scale: float
    l2norm: bool
    beta_rule: str


def tokens(
    rule: Rule, inputs: Sequence[Tensor | None], state: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, list[Tensor]]:
    """T tokens of one sequence, one after the other. inputs: q, k [T, H, K], v [T, HV, V], beta, g, erase, write; state
    [HV, K, V] before them.

    Returns o and the state after each. In float64 all is; in float32 too; for a 16-bit dtype the state and sums are
    float32, and what is multiplied in a product with the state is rounded to the dtype.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(wide)

    q, k, v, beta, g, erase, write = inputs
    assert k is not None
    assert v is not None
    group = v.shape[1] // k.shape[1]
    k = k.to(wide)
    q = None if q is None else q.to(wide)
    if rule.l2norm:
        k = k * (k.square().sum(-1, keepdim=True) + L2NORM_EPS).rsqrt()
        q = None if q is None else q * (q.square().sum(-1, keepdim=True) + L2NORM_EPS).rsqrt()
    rate = torch.ones((*v.shape[:-1], 1), dtype=wide) if beta is None else beta.to(wide).unsqueeze(-1)
    if rule.beta_rule == "kaczmarz":
        rate = rate / (k.square().sum(-1, keepdim=True) + KACZMARZ_EPS).repeat_interleave(group, 1)
    elif rule.beta_rule != "raw":
        rate = rate.sigmoid() * (2 if rule.beta_rule == "sigmoid2" else 1)
    k = k.repeat_interleave(group, 1)
    e = rounded(rate * k if erase is None else rate * erase.to(wide) * k)
    w = rate * v.to(wide) if write is None else rate * write.to(wide) * v.to(wide)
    k = rounded(k)
    alpha = None if g is None else g.to(wide).exp()
    if alpha is not None:
        alpha = (alpha.unsqueeze(-1) if alpha.dim() == 2 else alpha).unsqueeze(-1)
    rows, states = [], []
    if q is not None:
        q = rounded(q).repeat_interleave(group, 1)
    state = state.to(wide)
    for t in range(len(v)):
        if alpha is not None:
            state = alpha[t] * state
        d = w[t] - torch.einsum("hkv,hk->hv", rounded(state), e[t])
        state = state + torch.einsum("hk,hv->hkv", k[t], rounded(d))
        states.append(state)
        if q is not None:
            rows.append(rule.scale * torch.einsum("hkv,hk->hv", rounded(state), q[t]))
    if q is None:
        return None, states
    return (torch.stack(rows) if rows else torch.zeros(v.shape, dtype=wide)), states


def random_inputs(case: dict[str, Any], shape: Sequence[int], gen: torch.Generator) -> dict[str, Tensor | None]:
    """q, k, v, beta, g, erase, write for shape = (B, T) or (B,), as the keys of a case say:

    H, HV, K, V, dtype
    gate       None (the default), "head" or "channel": decays between 0.4 and 1
    gate_dtype of beta, g, erase and write, float32 unless given
    l2norm     keys and queries are of length 1 unless the op divides
    beta       largest; 1 unless given. None: no beta
    erase, write  with such gates
    strided    tensors are cut from a larger one: NaN stands between their rows, and beta and g have their heads apart
    """
    H, HV, K, V = (case[n] for n in ("H", "HV", "K", "V"))
    dtype, gate_dtype = getattr(torch, case["dtype"]), getattr(torch, case.get("gate_dtype", "float32"))

    def place(x: Tensor, to: torch.dtype, row: bool = True) -> Tensor:
        x = x.to(to)
        if not case.get("strided"):
            return x
        if row:
            room = torch.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 4), math.nan, dtype=to)
            cut = room[..., :-1, :-4]
        else:
            cut = torch.full((x.shape[-1], *x.shape[:-1]), math.nan, dtype=to).movedim(0, -1)
        return cut.copy_(x)

    def randn(*size: int) -> Tensor:
        return torch.randn(*shape, *size, generator=gen)

    def rand(*size: int) -> Tensor:
        return torch.rand(*shape, *size, generator=gen)

    q, k = randn(H, K), randn(H, K) + 0.5  # keys have something in common
    rule = case.get("beta_rule", "raw")
    if not (case.get("l2norm") or rule == "kaczmarz"):
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    most = case.get("beta", 1)
    beta = None if most is None else randn(HV) if rule.startswith("sigmoid") else most * rand(HV)
    g = case.get("gate") and rand(HV, *([K] if case["gate"] == "channel" else [])).sub(1) * 0.9
    return {
        "q": place(q, dtype),
        "k": place(k, dtype),
        "v": place(randn(HV, V), dtype),
        "beta": None if beta is None else place(beta, gate_dtype, row=False),
        "g": None if g is None else place(g, gate_dtype, row=case["gate"] == "channel"),
        "erase": place(rand(HV, K), gate_dtype) if case.get("erase") else None,
        "write": place(rand(HV, V), gate_dtype) if case.get("write") else None,
    }


def cost(case: dict[str, Any], count: int, states: int, state_bytes: int) -> tuple[int, int]:
    """Of `count` tokens and `states` states read or written: 6 K V operations per token and value head, the products
    with the state, whatever else chunks add."""
    H, HV, K, V = (case[n] for n in ("H", "HV", "K", "V"))
    item = getattr(torch, case["dtype"]).itemsize
    gate_item = getattr(torch, case.get("gate_dtype", "float32")).itemsize
    gates = 1 + {None: 0, "head": 1, "channel": K}[case.get("gate")]
    gates += K * bool(case.get("erase")) + V * bool(case.get("write"))
    per_token = (2 * H * K + 2 * HV * V) * item + HV * gates * gate_item
    return count * per_token + states * HV * K * V * state_bytes, count * HV * 6 * K * V
