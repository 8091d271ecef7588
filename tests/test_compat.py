"""Other libraries' calls: fla's signatures, and the models of transformers."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kvkernels as kk
from kvkernels.compat import fla
from kvkernels.ops import OPS

REQUIRED = inspect.Parameter.empty
# Positional parameters of fla-core 0.6.0, and the keywords that it takes beyond them.
FLA: dict[str, tuple[str, set[str]]] = {
    "chunk_gated_delta_rule": (
        "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_beta_sigmoid_in_kernel "
        "allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu chunk_indices cp_context",
        {"use_gate_in_kernel", "A_log", "dt_bias", "chunk_size"},
    ),
    "fused_recurrent_gated_delta_rule": (
        "q k v g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel A_log "
        "dt_bias use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens",
        set(),
    ),
    "chunk_kda": (
        "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_gate_in_kernel "
        "use_beta_sigmoid_in_kernel allow_neg_eigval safe_gate lower_bound disable_recompute "
        "return_intermediate_states state_v_first cu_seqlens cu_seqlens_cpu cp_context use_graph max_num_seqs",
        {"A_log", "dt_bias", "chunk_size"},
    ),
    "fused_recurrent_kda": (
        "q k v g beta A_log dt_bias scale initial_state output_final_state use_qk_l2norm_in_kernel "
        "use_gate_in_kernel use_beta_sigmoid_in_kernel allow_neg_eigval lower_bound state_v_first cu_seqlens",
        set(),
    ),
    "chunk_delta_rule": (
        "q k v beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens cu_seqlens_cpu",
        {"chunk_size"},
    ),
    "fused_recurrent_delta_rule": (
        "q k v beta scale initial_state output_final_state use_qk_l2norm_in_kernel cu_seqlens",
        set(),
    ),
}


@pytest.mark.parametrize("name", FLA)
def test_signatures_are_those_of_fla(name: str) -> None:
    positional, keywords = FLA[name]
    parameters = inspect.signature(getattr(fla, name)).parameters
    assert [p.name for p in parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD] == positional.split()
    assert {p.name for p in parameters.values() if p.kind == p.KEYWORD_ONLY} == keywords


def ratio(got: Tensor, truth: Tensor) -> float:
    """fla's measure: RMSE of the error over RMS of the truth."""
    return float((got.double() - truth.double()).pow(2).mean().sqrt() / truth.double().pow(2).mean().sqrt())


def inputs(B: int = 2, T: int = 75, H: int = 2, HV: int = 4, K: int = 32, V: int = 40) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)
    return {
        "q": torch.rand(B, T, H, K, generator=gen),
        "k": torch.rand(B, T, H, K, generator=gen),
        "v": torch.randn(B, T, HV, V, generator=gen),
        "g": torch.randn(B, T, HV, generator=gen),
        "gk": torch.randn(B, T, HV, K, generator=gen),
        "beta": torch.randn(B, T, HV, generator=gen),
        "A_log": torch.randn(HV, generator=gen),
        "dt_bias": torch.randn(HV, generator=gen),
        "dt_bias_k": torch.randn(HV * K, generator=gen),
        "h0": torch.randn(B, HV, K, V, generator=gen),
    }


def truth(x: dict[str, Tensor], g: Tensor | None, beta: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return OPS["delta_rule"].reference(
        x["q"], x["k"], x["v"], beta, g, initial_state=x["h0"], output_final_state=True, qk_l2norm=True, **options
    )


def test_fla_gated_delta_rule() -> None:
    x = inputs()
    gate = -x["A_log"].exp() * F.softplus(x["g"] + x["dt_bias"])
    o, ht = truth(x, gate, 2 * x["beta"].sigmoid())
    options: dict[str, Any] = {
        "output_final_state": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
        "allow_neg_eigval": True, "use_gate_in_kernel": True, "A_log": x["A_log"], "dt_bias": x["dt_bias"],
    }  # fmt: skip
    for function in (fla.chunk_gated_delta_rule, fla.fused_recurrent_gated_delta_rule):
        got, state = function(x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], initial_state=x["h0"], **options)
        assert ratio(got, o) < 1e-5
        assert ratio(state, ht) < 1e-5
        turned = function(
            x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], initial_state=x["h0"].transpose(-1, -2).contiguous(),
            state_v_first=True, **options,
        )  # fmt: skip
        assert torch.equal(turned[0], got)
        assert torch.equal(turned[1], state.transpose(-1, -2))
    assert fla.chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"])[1] is None


def test_fla_recurrent_takes_both_gates() -> None:
    x = inputs()
    g, gk, beta = -x["g"].exp(), -x["gk"].exp(), x["beta"].sigmoid()
    o, _ = truth(x, g[..., None] + gk, beta)
    got, _ = fla.fused_recurrent_gated_delta_rule(
        x["q"], x["k"], x["v"], g, gk, beta=beta, initial_state=x["h0"], use_qk_l2norm_in_kernel=True
    )
    assert ratio(got, o) < 1e-5


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("packed", [False, True])
def test_fla_kda(lower_bound: float | None, packed: bool) -> None:
    x = inputs()
    raw = x["gk"] + x["dt_bias_k"].view(4, 32)
    rate = x["A_log"].exp()[:, None]
    gate = -rate * F.softplus(raw) if lower_bound is None else lower_bound * torch.sigmoid(rate * raw)
    cuts = None
    if packed:
        x = {n: t.flatten(0, 1).unsqueeze(0) if t.dim() > 2 and n != "h0" else t for n, t in x.items()}
        gate, cuts = gate.flatten(0, 1).unsqueeze(0), torch.tensor([0, 75, 150])
    beta = x["beta"].sigmoid()
    o, ht = truth(x, gate, beta, cu_seqlens=cuts)
    gated: dict[str, Any] = {"use_gate_in_kernel": True, "A_log": x["A_log"], "dt_bias": x["dt_bias_k"],
                             "lower_bound": lower_bound, "use_qk_l2norm_in_kernel": True, "initial_state": x["h0"],
                             "output_final_state": True, "cu_seqlens": cuts}  # fmt: skip
    args = (x["q"], x["k"], x["v"], x["gk"], beta)
    *got, states = fla.chunk_kda(*args, **gated, return_intermediate_states=True, chunk_size=32)
    for result in (got, fla.fused_recurrent_kda(*args, **gated)):
        assert ratio(result[0], o) < 1e-5
        assert result[1] is not None
        assert ratio(result[1], ht) < 1e-5
    # T = 75 has chunks from 0, 32 and 64
    assert states.shape == ((1, 6, 4, 32, 40) if packed else (2, 3, 4, 32, 40))
    assert states.dtype == torch.bfloat16
    by_sequence = states.view(2, 3, 4, 32, 40)
    assert torch.equal(by_sequence[:, 0], x["h0"].bfloat16())
    head = {n: t[:, :64] for n, t in x.items() if n in ("q", "k", "v")} | {"h0": x["h0"][:1]}
    _, after = truth(head, gate[:, :64], beta[:, :64]) if packed else (None, None)
    if after is not None:
        assert ratio(by_sequence[:1, 2], after) < 4e-3


def test_fla_delta_rule_and_its_gradients() -> None:
    x = inputs()
    beta = x["beta"].sigmoid()
    o, ht = truth(x, None, beta)
    leaves = [x[n].clone().requires_grad_() for n in ("q", "k", "v")] + [beta.clone().requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    (OPS["delta_rule"].reference(*exact, None, qk_l2norm=True)[0] ** 2).sum().backward()
    for function in (fla.chunk_delta_rule, fla.fused_recurrent_delta_rule):
        got, state = function(
            x["q"], x["k"], x["v"], beta,
            initial_state=x["h0"], output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        assert ratio(got, o) < 1e-5
        assert ratio(state, ht) < 1e-5
        for t in leaves:
            t.grad = None
        (function(*leaves, use_qk_l2norm_in_kernel=True)[0] ** 2).sum().backward()
        for mine, true in zip(leaves, exact):
            assert mine.grad is not None
            assert true.grad is not None
            assert ratio(mine.grad, true.grad) < 1e-4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: fla.chunk_kda(x["q"], x["k"], x["v"], x["gk"], x["beta"], cp_context=1), "cp_context"),
        (lambda x: fla.fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], gv=x["v"]), "gv, a gate over"),
        (lambda x: fla.fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], beta=x["v"]), "beta must be"),
        (lambda x: fla.chunk_kda(x["q"], x["k"], x["v"], x["gk"], x["beta"], use_gate_in_kernel=True), "A_log"),
        (lambda x: fla.chunk_kda(x["q"], x["k"], x["v"], x["gk"], x["beta"], allow_neg_eigval=True), "use_beta_sig"),
    ],
)  # fmt: skip
def test_fla_refuses(call: Callable[[dict[str, Tensor]], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(inputs())


transformers = pytest.importorskip("transformers", "5.23")


@pytest.fixture
def patched() -> Iterator[Callable[..., list[str]]]:
    yield kk.compat.transformers.patch
    kk.compat.transformers.unpatch()


@pytest.mark.once
@pytest.mark.parametrize("model", ["qwen3_next", "kimi_linear"])
def test_transformers_functions(model: str, patched: Callable[..., list[str]]) -> None:
    """Their own plain-PyTorch versions are the truth, in forward and backward."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    names = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
    if model == "qwen3_next":
        names = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    theirs = [getattr(module, n) for n in names]
    patched(model)
    ours = [getattr(module, n) for n in names]
    x = inputs(H=4)
    gate = -F.softplus(x["gk"] if "kimi" in model else x["g"])
    for new, old in zip(ours, theirs):
        assert new is not old
        results, grads = [], []
        for function in (new, old):
            leaves = [t.clone().requires_grad_() for t in (x["q"], x["k"], x["v"], gate, x["beta"].sigmoid())]
            o, state = function(
                *leaves[:3], g=leaves[3], beta=leaves[4], initial_state=x["h0"], output_final_state=True,
                use_qk_l2norm_in_kernel=True, cu_seqlens=None,
            )  # fmt: skip
            (o * x["v"]).sum().backward()
            results.append((o, state))
            grads.append([t.grad for t in leaves])
        for a, b in zip((*results[0], *grads[0]), (*results[1], *grads[1])):
            assert ratio(a, b) < 2e-5


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=24, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.once
def test_transformers_model(patched: Callable[..., list[str]]) -> None:
    """Forward, gradients, and cached decode of a Qwen3-Next with random weights."""
    model = tiny()
    tokens = torch.randint(97, (2, 70), generator=torch.Generator().manual_seed(1))

    def forward_and_gradients() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        out = model(tokens, labels=tokens)
        out.loss.backward()
        return out.logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    logits, grads = forward_and_gradients()
    names = patched()
    assert "transformers.models.qwen3_next.modeling_qwen3_next.torch_chunk_gated_delta_rule" in names
    got, got_grads = forward_and_gradients()
    assert not torch.equal(got, logits)  # the kernels ran
    assert ratio(got, logits) < 1e-4
    assert len(got_grads) == len(grads)
    for a, b in zip(got_grads, grads):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-7
    with torch.no_grad():
        step = model(tokens[:, :60], use_cache=True)
        for t in range(60, 70):
            step = model(tokens[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
            assert ratio(step.logits[:, 0], logits[:, t]) < 1e-4
        generated = model.generate(tokens[:, :60], max_new_tokens=8, do_sample=False, pad_token_id=0)
        kk.compat.transformers.unpatch()
        assert torch.equal(generated, model.generate(tokens[:, :60], max_new_tokens=8, do_sample=False, pad_token_id=0))
        assert torch.equal(model(tokens).logits, logits)


@pytest.mark.once
def test_transformers_packed_sequences_stay_apart(patched: Callable[..., list[str]]) -> None:
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    x = inputs(B=1)
    cuts = torch.tensor([0, 40, 75], dtype=torch.int32)
    args = [x[n] for n in ("q", "k", "v")]
    gates = {"g": -x["g"].exp(), "beta": x["beta"].sigmoid()}
    with pytest.raises(ValueError, match="packed sequences"):
        module.torch_chunk_gated_delta_rule(*args, **gates, cu_seqlens=cuts)
    patched("qwen3_next")
    o, _ = module.torch_chunk_gated_delta_rule(*args, **gates, cu_seqlens=cuts)
    for begin, end in ((0, 40), (40, 75)):
        alone, _ = module.torch_chunk_gated_delta_rule(
            *(t[:, begin:end] for t in args), **{n: t[:, begin:end] for n, t in gates.items()}
        )
        assert torch.equal(o[:, begin:end], alone)


@pytest.mark.once
def test_transformers_takes_mixed_dtypes(patched: Callable[..., list[str]]) -> None:
    """As its own functions, which work in float32 whatever comes and answer in the query's dtype."""
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    theirs = module.torch_chunk_gated_delta_rule
    patched("qwen3_next")
    x = inputs()
    args = x["q"].bfloat16(), x["k"].double(), x["v"].bfloat16()
    gates = {"g": -x["g"].exp().double(), "beta": x["beta"].sigmoid()}
    (got, _), (truth, _) = (f(*args, **gates) for f in (module.torch_chunk_gated_delta_rule, theirs))
    assert got.dtype == truth.dtype == torch.bfloat16
    assert ratio(got, truth) < 1e-3


@pytest.mark.once
def test_transformers_names_models_without_a_delta_rule(patched: Callable[..., list[str]]) -> None:
    with pytest.raises(ValueError, match=r"transformers\.models\.llama has none of"):
        patched("llama")
