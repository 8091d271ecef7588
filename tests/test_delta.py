"""The delta rule: ways to compute the same thing agree, bits depend on the sequence alone, errors and gradients are as
good as those of the recurrence, states of a pool go where they should. Its ops are tests/test_contract.py's too."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import CPU, not_emulated, on_cpu_only
from conftest import assert_as_good_as, tensors_of, to_device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvkernels as kk
from kvkernels.ops import OPS

Case = dict[str, Any]
RULE, STEP = OPS["delta_rule"], OPS["delta_rule_step"]
BASE: Case = {"B": 2, "T": 70, "H": 1, "HV": 2, "K": 32, "V": 32, "dtype": "float32", "gate": "head"}
GATES = [None, "head", "channel"]
INPUTS = ("q", "k", "v", "beta", "g", "erase", "write", "initial_state")


def inputs(seed: int = 0, **case: Any) -> Case:
    """All arguments of delta_rule by name."""
    args, options = RULE.make({**BASE, **case}, seed)
    return {**dict(zip(INPUTS, args)), **options}


def rows(x: Case, keep: Any) -> Case:
    """Of the tensors [B, T, ...], x[keep]."""
    return {n: t[keep] if isinstance(t, Tensor) and n in INPUTS[:7] else t for n, t in x.items()}


def rmse(x: Tensor, exact: Tensor) -> float:
    """Of the whole, relative."""
    assert x.shape == exact.shape
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def agree(x: Any, y: Any, bound: float = 2e-6) -> None:
    for mine, other in zip(tensors_of(x), tensors_of(y)):
        assert rmse(mine, other) < bound


def equal(x: Any, y: Any) -> None:
    for mine, other in zip(tensors_of(x), tensors_of(y), strict=True):
        assert torch.equal(mine, other)


# ---- the same in other ways


def step_all(x: Case, at_once: int) -> tuple[Tensor, Tensor]:
    """delta_rule by steps of some tokens."""
    B, T, HV, V = x["v"].shape
    state = torch.zeros(B, HV, x["k"].shape[-1], V)
    if "initial_state" in x:
        state.copy_(x["initial_state"])
    slots = torch.arange(B, dtype=torch.int32)
    options = {n: x[n] for n in ("qk_l2norm", "beta_rule") if n in x}
    o = []
    for t in range(0, T, at_once):
        tokens = {n: x[n][:, t : t + at_once] for n in INPUTS[:7] if x[n] is not None}
        tokens = {"beta": None, **({n: v[:, 0] for n, v in tokens.items()} if at_once == 1 else tokens)}
        got = kk.delta_rule_step(**tokens, state=state, slots=slots, **options)
        o.append(got.unsqueeze(1) if at_once == 1 else got)
    return torch.cat(o, 1), state


@pytest.mark.parametrize("gate", GATES)
def test_chunks_tokens_and_steps_agree(gate: str | None) -> None:
    x = inputs(gate=gate, initial_state=True, T=37, erase=gate == "channel", beta_rule="sigmoid2")
    tokens = kk.delta_rule(**x, mode="recurrent")
    for chunk_size in (16, 32, 64):
        agree(kk.delta_rule(**x, chunk_size=chunk_size), tokens)
    for at_once in (1, 5):
        equal(step_all(x, at_once), tokens)


@pytest.mark.parametrize("gate", GATES)
def test_a_prompt_in_two_parts(gate: str | None) -> None:
    x = inputs(gate=gate, initial_state=True, chunk_size=16)
    whole = kk.delta_rule(**x)
    for cut in (32, 21):
        first, state = kk.delta_rule(**rows(x, (slice(None), slice(cut))))
        rest, last = kk.delta_rule(**{**rows(x, (slice(None), slice(cut, None))), "initial_state": state})
        check = equal if cut % 16 == 0 else agree
        check((torch.cat((first, rest), 1), last), whole)


def test_rules_that_contain_others() -> None:
    x = inputs(gate=None, beta=2)
    zero = torch.zeros(*x["v"].shape[:3])
    plain = kk.delta_rule(**x)
    agree(kk.delta_rule(**{**x, "g": zero}), plain)
    agree(kk.delta_rule(**{**x, "g": zero[..., None].repeat(1, 1, 1, 32)}), plain)
    x = inputs(gate="head")
    per_head = kk.delta_rule(**x)
    agree(kk.delta_rule(**{**x, "g": x["g"][..., None].repeat(1, 1, 1, 32)}), per_head)
    gates = x["beta"][..., None].repeat(1, 1, 1, 32)
    agree(kk.delta_rule(**{**x, "beta": None, "erase": gates, "write": gates}), per_head)
    agree(kk.delta_rule(**{**x, "beta": x["beta"].logit(), "beta_rule": "sigmoid"}), per_head)
    same_heads = {n: x[n].repeat_interleave(2, 2) for n in ("q", "k")}
    equal(kk.delta_rule(**{**x, **same_heads}), per_head)


# ---- bits


BITS = [
    {"gate": gate, "dtype": dtype, "K": 60, "V": 96, "l2norm": True}
    for gate, dtype in ((None, "float32"), ("head", "bfloat16"), ("channel", "bfloat16"), ("channel", "float32"))
]


@pytest.mark.parametrize("case", BITS, ids=lambda c: f"{c['gate']}-{c['dtype']}")
@pytest.mark.parametrize("mode", ["chunk", "recurrent"])
def test_bits_depend_on_the_sequence_alone(case: Case, mode: str, threads: Callable[[int], None]) -> None:
    x = inputs(**case, T=40, mode=mode, initial_state=True)
    o, state = kk.delta_rule(**x)
    B, T = o.shape[:2]
    threads(2 if CPU else 1)
    equal(kk.delta_rule(**x), (o, state))
    for b in range(B):  # alone
        one = slice(b, b + 1)
        equal(kk.delta_rule(**{**rows(x, one), "initial_state": x["initial_state"][one]}), (o[one], state[one]))
    threads(1)
    for cut in (1, 17, 33):  # what follows changes nothing
        equal(kk.delta_rule(**rows(x, (slice(None), slice(cut))))[0], o[:, :cut])
    for columns in (slice(0, 40), slice(40, 96)):  # of V
        some = {**x, "v": x["v"][..., columns], "initial_state": x["initial_state"][..., columns].contiguous()}
        equal(kk.delta_rule(**some), (o[..., columns], state[..., columns]))
    # In one row, behind other sequences, before tokens of nobody.
    lens = (0, 7, T, T)
    packed = rows(x, 0)
    for name, t in rows(x, slice(None)).items():
        if name in INPUTS[:7] and t is not None:
            room = torch.full((1, sum(lens) + 3, *t.shape[2:]), math.nan, dtype=t.dtype)
            room[0, :7], room[0, 7 : 7 + T], room[0, 7 + T : -3] = t[0, 3:10], t[0], t[1]
            packed[name] = room
    packed["cu_seqlens"] = torch.tensor((0, *lens)).cumsum(0)
    packed["initial_state"] = x["initial_state"][torch.tensor([1, 1, 0, 1])]
    got, states = kk.delta_rule(**packed)
    equal(got[0, 7:-3], o.flatten(0, 1))
    equal(states[2:], state)
    equal(states[0], x["initial_state"][1])
    assert (got[0, -3:] == 0).all()
    threads(2 if CPU else 1)
    equal(kk.delta_rule(**packed), (got, states))


@pytest.mark.parametrize("gate", GATES)
def test_long_sequences_on_threads(gate: str | None, threads: Callable[[int], None]) -> None:
    """More chunks than are formed at a time, fewer key heads than threads, and a short sequence beside them."""
    x = inputs(gate=gate, B=1, lens=(300, 20, 500), HV=3, V=96, initial_state=True, chunk_size=16, checkpoint_every=32)
    threads(1)
    one = kk.delta_rule(**x)
    for n in (2, 3) if CPU else (1,):
        threads(n)
        equal(kk.delta_rule(**x), one)


# ---- errors


def hard_keys(kind: str, shape: tuple[int, ...], gen: torch.Generator) -> Tensor:
    if kind == "positive":
        k = torch.rand(shape, generator=gen)
    else:  # near-repeated
        k = torch.randn((*shape[:1], 1, *shape[2:]), generator=gen) + 0.05 * torch.randn(shape, generator=gen)
    return torch.nn.functional.normalize(k, dim=-1)


# Of o and of the state, relative, of all numbers together. The CUDA kernels multiply on tensor cores: for 16-bit inputs
# with a state of 10 mantissa bits, for float32 with three products of such numbers. CPUs with VNNI multiply bf16 inputs
# without gates per channel with a state in whole numbers of 13 bits or more; to others they are float32.
ROUNDS = not CPU or kk.info()["isa"] == "avx512vnni"
BOUNDS = {"float32": (1e-6, 1e-6) if CPU else (2e-6, 2e-6), "bfloat16": (2.5e-3, 1e-3 if ROUNDS else 1e-6)}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("keys", ["positive", "near-repeated"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_errors_of_hard_keys(gate: str | None, keys: str, dtype: str) -> None:
    """Those for which powers of L explode, with beta up to 2."""
    x = inputs(gate=gate, B=1, T=300 if CPU else 130, K=128, V=128 if CPU else 32, HV=1, beta=2, dtype=dtype)
    gen = torch.Generator().manual_seed(0)
    for name in ("k", "q"):
        x[name] = hard_keys(keys, x[name].shape, gen).to(x[name].dtype)
    bounds = (2.5e-3, 1e-6) if CPU and dtype == "bfloat16" and gate == "channel" else BOUNDS[dtype]
    for got, exact, bound in zip(kk.delta_rule(**x), RULE.reference(**x), bounds):
        assert rmse(got, exact) < bound


@on_cpu_only
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("kind", ["equal", "one channel", "few large", "large and small"])
def test_sums_of_whole_numbers(kind: str, chunk_size: int) -> None:
    """Those of most magnitude that there can be do not overflow, and none is lost beside larger ones."""
    x = inputs(gate=None, B=1, T=75, K=256, HV=1, dtype="bfloat16", beta_rule="kaczmarz", chunk_size=chunk_size)
    x["beta"] = torch.ones_like(x["beta"])
    k = torch.ones(75, 256)
    if kind == "one channel":
        k[:, :3] = 0
        k[:, 4:] = 0
    if kind == "few large":
        k[:, ::64] = 200
    if kind == "large and small":
        k = torch.randn(75, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-15, 15, 75)[:, None]
        x["q"] = torch.randn(x["q"].shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    else:
        x["v"], x["q"] = torch.ones_like(x["v"]), k[None, :, None].to(torch.bfloat16)
    x["k"] = k[None, :, None].to(torch.bfloat16)
    for got, exact, bound in zip(kk.delta_rule(**x), RULE.reference(**x), (2.5e-3, 1e-3)):
        assert rmse(got, exact) < bound


@on_cpu_only
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_so(dtype: str, bad: float) -> None:
    """In its column of v, from its token on; and everywhere from a key on."""
    x = inputs(B=1, dtype=dtype)
    o, _ = kk.delta_rule(**x)
    v, k = x["v"].clone(), x["k"].clone()
    v[0, 40, 1, 5] = bad
    k[0, 40, 0, 7] = bad
    got, last = kk.delta_rule(**{**x, "v": v})
    hit = torch.zeros_like(o, dtype=torch.bool)
    hit[0, 40:, 1, 5] = True
    equal(got.isfinite(), ~hit)
    equal(got[~hit], o[~hit])
    assert not last[0, 1, :, 5].isfinite().any()
    got, last = kk.delta_rule(**{**x, "k": k})
    equal(got[0, :40], o[0, :40])
    assert not got[0, 40:].isfinite().any()
    assert not last.isfinite().any()


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_gates_of_all_strengths(gate: str) -> None:
    """None is lost beside one that forgets everything, nothing overflows, and gradients are numbers."""
    x = inputs(gate=gate, B=1, initial_state=True)
    x.pop("output_final_state")
    strengths = torch.tensor([0.0, -1e-4, -5.0, -20.0, -1e4, -math.inf])
    gen = torch.Generator().manual_seed(0)
    for weights in ((6.0, 2.0, 2.0, 1.0, 0.3, 0.1), (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)):
        x["g"] = strengths[torch.multinomial(torch.tensor(weights), x["g"].numel(), True, generator=gen)].view(
            x["g"].shape
        )
        check_gradients(x)


@pytest.mark.parametrize(
    ("method", "bound"),
    [("substitution", 1e-6), ("blocked", 1e-6), ("blocked_bf16x3", 6e-5), ("blocked_tf32", 4e-3)],
)
@pytest.mark.parametrize("keys", ["positive", "near-repeated"])
def test_errors_of_inverses(method: str, bound: float, keys: str) -> None:
    gen = torch.Generator().manual_seed(0)
    k = hard_keys(keys, (8, 64, 1, 128), gen).squeeze(2)
    a = (1 + torch.rand(8, 64, 1, generator=gen)) * (k @ k.mT)
    assert rmse(kk.tril_inverse(a, method=method), OPS["tril_inverse"].reference(a)) < bound


def test_gradient_of_the_inverse() -> None:
    a = torch.randn(2, 3, 20, 20) / 4
    weight = torch.randn(2, 3, 20, 20)
    mine, exact = a.clone().requires_grad_(), a.double().requires_grad_()
    (kk.tril_inverse(mine) * weight).sum().backward()
    (OPS["tril_inverse"].reference(exact) * weight).sum().backward()
    assert mine.grad is not None
    assert exact.grad is not None
    assert rmse(mine.grad, exact.grad) < 2e-6
    assert (mine.grad.triu() == 0).all()


# ---- gradients


def gradients(function: Callable[..., Any], x: Case, of: tuple[str, ...], use: tuple[int, ...]) -> list[Tensor]:
    """Of a weighted sum of the results `use`, with respect to the inputs `of`."""
    leaves = {n: x[n].detach().clone().requires_grad_() for n in of}
    results = tensors_of(function(**{**x, **leaves}))
    gen = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, generator=gen, dtype=torch.float64) for r in results]
    loss = torch.stack([(results[i].double() * weights[i]).sum() for i in use]).sum()
    if not loss.requires_grad:  # a recurrence of no tokens
        return [torch.zeros_like(t) for t in leaves.values()]
    return list(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True))


def check_gradients(x: Case, of: tuple[str, ...] | None = None, use: tuple[int, ...] = (0,)) -> None:
    of = of or tuple(n for n in INPUTS if x.get(n) is not None)
    got = gradients(kk.delta_rule, x, of, use)
    wide = {n: t.double() if n in of else t for n, t in x.items()}
    exact = gradients(RULE.reference, wide, of, use)
    plain = gradients(lambda **a: RULE.reference(**a, dtype=x["q"].dtype), x, of, use)
    for name, mine, near, truth in zip(of, got, plain, exact):
        assert mine.dtype == x[name].dtype
        assert_as_good_as(mine, near, truth, f"gradient of {name}", tiny=3e-6)


GRADIENTS: list[Case] = [
    {"gate": None, "beta": 2},
    {"gate": "head", "initial_state": True, "H": 2, "HV": 4, "T": 40},
    {"gate": "channel", "initial_state": True},
    {"gate": "channel", "erase": True, "write": True, "beta": None, "K": 16, "V": 48, "l2norm": True},
    {"gate": "head", "erase": True, "beta_rule": "sigmoid", "T": 33, "l2norm": True},
    {"gate": None, "write": True, "beta_rule": "kaczmarz"},
    {"gate": "head", "beta_rule": "kaczmarz", "l2norm": True, "T": 20},
    {"gate": "channel", "beta_rule": "sigmoid2", "K": 60, "V": 100, "B": 1, "T": 37, "strided": True, "l2norm": True},
    {"gate": "head", "K": 128, "V": 128, "HV": 1, "B": 1, "dtype": "bfloat16", "gate_dtype": "bfloat16", "T": 40},
    {"gate": "channel", "K": 64, "V": 32, "B": 1, "dtype": "bfloat16", "initial_state": True, "l2norm": True, "T": 50},
    {"gate": "head", "dtype": "float16", "mode": "recurrent", "chunk_size": 16},
    *({"gate": g, "B": 1, "lens": (0, 21, 1, 0, 33), "tail": 5, "initial_state": True} for g in GATES[1:]),
    *({"gate": g, "T": 69, "checkpoint_every": 32, "chunk_size": 16, "initial_state": True} for g in GATES[1:]),
    {"gate": "head", "chunk_size": 64, "T": 130, "B": 1, "K": 16, "V": 16, "HV": 1},
    {"gate": "head", "T": 0, "initial_state": True},
]


@pytest.mark.parametrize("case", GRADIENTS, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_gradients(case: Case) -> None:
    x = inputs(**case)
    x.setdefault("output_final_state", True)
    check_gradients(x, use=(0, 1))


@pytest.mark.parametrize("gate", GATES)
def test_gradients_from_kept_states(gate: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in long sequences, of which some states are kept."""
    monkeypatch.setattr(RULE, "KEPT_EVERY", 64)
    x = inputs(gate=gate, B=1, lens=(0, 130, 3, 64), tail=9, initial_state=True, chunk_size=32)
    check_gradients(x, use=(0, 1))


@on_cpu_only  # the length at which it cuts what lies between two states, and all that there is
@pytest.mark.parametrize("gate", GATES[1:])
def test_gradients_between_states_far_apart(gate: str) -> None:
    x = inputs(gate=gate, B=1, T=540, HV=1, K=16, V=16, checkpoint_every=1024)
    check_gradients(x, use=(0, 1))


def test_what_belongs_to_no_sequence_is_not_read() -> None:
    """Nor is the gradient of its results, which are zeros whatever the inputs are."""
    x = inputs(B=1, lens=(5, 20), tail=40, initial_state=True)
    of = tuple(n for n in INPUTS if x.get(n) is not None)
    leaves = {n: x[n].detach().requires_grad_() for n in of}
    o, _ = kk.delta_rule(**{**x, **leaves})
    d = torch.ones_like(o)
    d[:, 25:] = math.nan
    for name, grad in zip(of, torch.autograd.grad(o, list(leaves.values()), d), strict=True):
        assert grad.isfinite().all(), name
        if name != "initial_state":
            assert (grad[:, 25:] == 0).all(), name


def test_gradients_of_some_inputs_and_results() -> None:
    x = inputs(initial_state=True, erase=True, T=20)
    for of in (("q",), ("beta", "initial_state"), ("erase", "v")):
        check_gradients(x, of)
    check_gradients(x, ("k", "g", "v"), use=(1,))
    x["output_final_state"] = False
    check_gradients(x)
    x = inputs(T=20, lens=(0, 0), B=1, tail=20, initial_state=True)
    check_gradients(x, use=(0, 1))


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_states_without_queries(gate: str) -> None:
    x = inputs(gate=gate, initial_state=True, T=40, checkpoint_every=16)
    _, state, kept = kk.delta_rule(**x)
    x["q"] = None
    o, mine, mine_kept = RULE._delta_rule(**x)
    assert o is None
    equal((mine, mine_kept), (state, kept))
    of = ("k", "v", "beta", "g", "initial_state")
    got = gradients(lambda **a: RULE._delta_rule(**a)[1], x, of, (0,))
    exact = gradients(
        lambda **a: RULE.reference(**a)[0], {n: t.double() if n in of else t for n, t in x.items()}, of, (0,)
    )
    agree(got, exact)


@pytest.mark.parametrize("gate", GATES)
def test_bits_of_gradients(gate: str | None, threads: Callable[[int], None]) -> None:
    x = inputs(gate=gate, T=24, V=48, initial_state=True, chunk_size=16)
    of = tuple(n for n in INPUTS if x.get(n) is not None)

    def run(x: Case, d: Tensor) -> list[Tensor]:
        leaves = {n: x[n].detach().requires_grad_() for n in of}
        o, _ = kk.delta_rule(**{**x, **leaves})
        return list(torch.autograd.grad(o, list(leaves.values()), d))

    d = torch.randn(x["v"].shape)
    whole = run(x, d)
    threads(2 if CPU else 1)
    equal(run(x, d), whole)
    for b in range(2):
        one = {**rows(x, slice(b, b + 1)), "initial_state": x["initial_state"][b : b + 1]}
        equal(run(one, d[b : b + 1]), [t[b : b + 1] for t in whole])


def test_no_second_derivative() -> None:
    x = inputs(T=5)
    x["k"].requires_grad_()
    (grad,) = torch.autograd.grad(kk.delta_rule(**x)[0].sum(), x["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="delta_rule: there is no second derivative"):
        grad.sum().backward()


def test_checkpoints_have_no_gradient() -> None:
    x = inputs(T=40, checkpoint_every=16)
    x["k"].requires_grad_()
    o, state, kept = kk.delta_rule(**x)
    assert o.requires_grad
    assert state.requires_grad
    assert not kept.requires_grad


# ---- states of a pool


def step_inputs(seed: int = 0, **case: Any) -> Case:
    args, options = STEP.make(
        {"B": 3, "H": 1, "HV": 2, "K": 32, "V": 32, "dtype": "float32", "gate": "head", **case}, seed
    )
    return {**dict(zip(INPUTS, args)), **options}


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_tree_of_drafts(state: str, gate: str) -> None:
    """Every token of a tree has the bits it has in a call for its branch alone."""
    T = 6
    parents = (-1, 0, 0, 2, 1, -1)
    x = step_inputs(T=T, out="each", state=state, gate=gate, parents=parents)
    before = x["state"].clone()
    o = kk.delta_rule_step(**x)
    after = x["state"]
    for t in range(T):
        branch = [t]
        while parents[branch[0]] >= 0:
            branch.insert(0, parents[branch[0]])
        alone = rows(x, (slice(None), branch))
        alone.update(state=before.clone(), parents=None, out_slots=x["out_slots"][:, branch].contiguous())
        equal(kk.delta_rule_step(**alone), o[:, branch])
        for slot in x["out_slots"][:, t].tolist():
            equal(alone["state"][slot], after[slot])


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_rejected_drafts_are_undone(state: str) -> None:
    """Verify four tokens, keep two, go on from the second's slot: as if the others had never been."""
    x = step_inputs(T=4, out="each", state=state)
    before = x["state"].clone()
    o = kk.delta_rule_step(**x)
    accepted = x["out_slots"][:, 1].contiguous()
    following = step_inputs(1, T=3)
    tokens = {n: following[n] for n in INPUTS[:7] if n in following}
    got = kk.delta_rule_step(**tokens, state=x["state"], slots=accepted)
    honest = {n: x[n][:, :2] for n in ("q", "k", "v", "beta", "g")}
    equal(kk.delta_rule_step(**honest, state=before, slots=x["slots"]), o[:, :2])
    equal(kk.delta_rule_step(**tokens, state=before, slots=x["slots"]), got)
    equal(before[x["slots"].long()], x["state"][accepted.long()])


def test_many_sequences_read_one_state() -> None:
    """A prompt that several answers share."""
    x = step_inputs(out="last")
    x["slots"] = x["slots"][:1].repeat(3)
    o = kk.delta_rule_step(**x)
    alone = {n: x[n][1:2] for n in ("q", "k", "v", "beta", "g", "slots", "out_slots")}
    equal(kk.delta_rule_step(**alone, state=x["state"].clone()), o[1:2])


# ---- ragged shapes


@settings(max_examples=25 if CPU else 8, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(data=st.data())
def test_ragged(data: st.DataObject) -> None:
    def pick(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    lens = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    case = {
        "H": pick(1, 2), "HV": 2, "K": data.draw(st.integers(1, 48)), "V": data.draw(st.integers(1, 48)), "B": 1,
        "gate": pick(*GATES), "dtype": pick("float32", "bfloat16", "float16"), "gate_dtype": pick("float32", "float16"),
        "erase": pick(False, True), "write": pick(False, True), "beta_rule": pick("raw", "sigmoid2", "kaczmarz"),
        "lens": lens, "tail": pick(0, 3), "initial_state": pick(False, True), "l2norm": pick(False, True),
        "chunk_size": pick(None, 16, 32), "checkpoint_every": pick(0, 32), "strided": pick(False, True),
    }  # fmt: skip
    x = inputs(data.draw(st.integers(0, 3)), **case)
    exact = RULE.reference(**x)
    plain = RULE.reference(**x, dtype=x["q"].dtype)
    for mode in ("chunk", "recurrent"):
        for got, near, truth in zip(kk.delta_rule(**x, mode=mode), plain, exact, strict=True):
            assert_as_good_as(got, near, truth, mode)
    check_gradients(x, use=(0, 1))


# ---- torch


@pytest.mark.once
@pytest.mark.traced
@pytest.mark.parametrize("case", [{"gate": "head", "T": 37, "initial_state": True},
                                  {"gate": "channel", "erase": True, "B": 1, "lens": (30, 7)}])  # fmt: skip
def test_compiles_with_its_gradient(case: Case) -> None:
    torch.compiler.reset()
    x = to_device(inputs(**case))
    of = tuple(n for n in INPUTS if x.get(n) is not None)

    def loss(*leaves: Tensor) -> Tensor:
        o, state = kk.delta_rule(**{**x, **dict(zip(of, leaves))})  # type: ignore[misc]
        return 2 * o.sum() + state.square().sum()

    leaves = [x[n].detach().requires_grad_() for n in of]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mine, truth in zip(torch.autograd.grad(compiled(*leaves), leaves), eager, strict=True):
        torch.testing.assert_close(mine, truth)


@pytest.mark.once
@pytest.mark.traced
def test_opcheck_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, tuple[Any, ...]] = {}
    for module, name in ((RULE, "_op"), (RULE, "_backward_op"), (OPS["tril_inverse"], "_op")):
        real = getattr(module, name)

        def record(*flat: Any, real: Any = real) -> Any:
            calls[real.name()] = flat
            return real(*flat)

        monkeypatch.setattr(module, name, record)
    x = to_device(inputs(T=33, erase=True, initial_state=True))
    x["k"].requires_grad_()
    x["g"].requires_grad_()
    kk.delta_rule(**x)[0].sum().backward()
    kk.tril_inverse(torch.zeros(2, 20, 20, device=x["k"].device, requires_grad=True))
    assert len(calls) == 3
    for name, flat in calls.items():
        torch.library.opcheck(getattr(torch.ops.kvkernels, name.partition("::")[2]).default, flat)


@not_emulated
def test_inference_mode_and_streams_of_tokens() -> None:
    """No graph is kept where none is wanted."""
    x = inputs(T=20)
    x["k"].requires_grad_()
    with torch.inference_mode():
        assert not kk.delta_rule(**x)[0].requires_grad
    with torch.no_grad():
        assert not kk.delta_rule(**x)[0].requires_grad
    assert kk.delta_rule(**x)[0].requires_grad
