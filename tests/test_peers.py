"""lse as other libraries return it, against ours: docs/attention.md has the table."""

import math

import pytest
import torch
from backends import CPU, Q_DTYPE
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

import kvkernels as kk

B, L, HQ, HKV, D, PAGE = 2, 48, 4, 2, 64, 16
CLOSE = {"rtol": 1e-4, "atol": 1e-4} if CPU else {"rtol": 1e-2, "atol": 1e-2}


@pytest.fixture
def call() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q [B, HQ, D], caches with the tokens of both sequences, block_table, seq_lens."""
    gen = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, B * L // PAGE, PAGE, HKV, D, generator=gen).bfloat16()
    q = torch.randn(B, HQ, D, generator=gen).to(Q_DTYPE)
    table = torch.arange(B * L // PAGE, dtype=torch.int32).view(B, -1)
    return q, k, v, table, torch.full((B,), L, dtype=torch.int32)


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As torch and flash-attn see them: [B, H, tokens, D], one query, KV heads repeated, float32."""
    k, v = (x.float().view(B, L, HKV, D).transpose(1, 2).repeat_interleave(HQ // HKV, 1) for x in (k, v))
    return q.float()[:, :, None], k, v


def scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, L] float64"""
    a, b, _ = dense(q, k, v)
    return (a.double() @ b.double().transpose(-1, -2))[:, :, 0] / math.sqrt(D)


def test_torch_sdpa(call: tuple[Tensor, ...]) -> None:
    q, k, v, table, lens = call
    out, lse = kk.flash_decode(q, k, v, table, lens, return_lse=True)
    theirs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*dense(q, k, v))
    torch.testing.assert_close(out.float(), theirs[0][:, :, 0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse[:, None].transpose(1, 2), theirs[1], **CLOSE)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention(call: tuple[Tensor, ...]) -> None:
    q, k, v, table, lens = call
    out, lse = kk.flash_decode(q, k, v, table, lens, return_lse=True)
    theirs, aux = flex_attention(*dense(q, k, v), return_aux=AuxRequest(lse=True))
    torch.testing.assert_close(out.float(), theirs[:, :, 0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse[:, None].transpose(1, 2), aux.lse, **CLOSE)


def test_flashinfer_counts_in_bits(call: tuple[Tensor, ...]) -> None:
    """log2 of the sum of exp2(score * log2 e), [tokens, H]."""
    q, k, v, table, lens = call
    _, lse = kk.flash_decode(q, k, v, table, lens, return_lse=True)
    bits = scores(q, k, v) / math.log(2)
    theirs = torch.exp2(bits - bits.amax(-1, keepdim=True)).sum(-1).log2() + bits.amax(-1)
    torch.testing.assert_close((lse / math.log(2)).double(), theirs, **CLOSE)
    merged = kk.merge_states([q, q], [(theirs * math.log(2)).float(), lse - math.inf])
    torch.testing.assert_close(merged[1], lse, **CLOSE)


def test_flash_attn_has_plus_infinity_where_nothing_is_seen(call: tuple[Tensor, ...]) -> None:
    """[B, H, Tq], natural; +inf for a row without keys, which as a weight would be all there is."""
    q, k, v, table, lens = call
    lens = torch.tensor([L, 0], dtype=torch.int32)
    out, lse = kk.flash_decode(q[:, None], k, v, table, lens, return_lse=True)
    theirs = scores(q, k, v).logsumexp(-1)[:, :, None]
    theirs[1] = math.inf
    ours = lse.transpose(1, 2)
    torch.testing.assert_close(torch.where(ours == -math.inf, math.inf, ours).double(), theirs, **CLOSE)
    # theirs, as merge_states wants it
    back = torch.where(theirs == math.inf, -math.inf, theirs).float().transpose(1, 2)
    merged = kk.merge_states([out, out], [back, back])
    assert torch.equal(merged[0][1], torch.zeros_like(out[1]))
    assert (merged[1][1] == -math.inf).all()


def test_flash_mla_keeps_sinks_out_of_lse(call: tuple[Tensor, ...]) -> None:
    """Its sink scales the output only; ours is in lse too, so that merging needs no more than (out, lse)."""
    q, k, v, table, lens = call
    sinks = torch.tensor([1.0, -2.0, 0.5, 4.0])
    out, lse = kk.flash_decode(q, k, v, table, lens, sinks=sinks, return_lse=True)
    theirs = scores(q, k, v).logsumexp(-1)
    torch.testing.assert_close(lse.double(), torch.logaddexp(theirs, sinks.double()), **CLOSE)
    bare, bare_lse = kk.flash_decode(q, k, v, table, lens, return_lse=True)
    torch.testing.assert_close(bare_lse.double(), theirs, **CLOSE)
    torch.testing.assert_close(out.double(), bare.double() * torch.exp(theirs - lse.double())[..., None], rtol=2e-2,
                               atol=2e-2)  # fmt: skip


def test_an_empty_sequence(call: tuple[Tensor, ...]) -> None:
    q, k, v, table, lens = call
    out, lse = kk.flash_decode(q, k, v, table, lens * 0, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -math.inf).all()


def test_adaptive_parallel_encoding(call: tuple[Tensor, ...]) -> None:
    """Contexts at temperature T whose weight has the factor S, and the rest, in one softmax written out."""
    q, k, v, table, lens = call
    T, S, split = 0.8, 0.7, 2 * PAGE
    table_rest = table[:, 2:]
    contexts = kk.flash_decode(q, k, v, table, lens * 0 + split, scale=1 / (T * math.sqrt(D)), return_lse=True)
    rest = kk.flash_decode(q, k, v, table_rest, lens - split, return_lse=True)
    out, _ = kk.merge_states(*zip(contexts, rest), scale=torch.tensor([S, 1.0]), temperature=torch.tensor([T, 1.0]))
    s, values = scores(q, k, v), dense(q, k, v)[2].double()
    sharp = torch.exp(s[..., :split] / T)
    weight = torch.cat((sharp * sharp.sum(-1, keepdim=True) ** (S * T - 1), torch.exp(s[..., split:])), -1)
    want = ((weight / weight.sum(-1, keepdim=True))[:, :, None] @ values)[:, :, 0]
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)
