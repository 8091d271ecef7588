"""calibrate_keys: centre and balance are what they are said to be, and they help on real keys."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import kvkernels as kk
from kvkernels.formats import decode_page, encode_page

pytestmark = pytest.mark.once

FIXTURE = Path(__file__).parent / "data" / "smollm2_kv.npz"


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_centre_is_the_mean_after_skip() -> None:
    k = rand(50, 2, 64) + torch.arange(64)
    k[:16] = 1e4
    transform = kk.calibrate_keys(k)
    torch.testing.assert_close(transform.centre, k[16:].mean(0))
    assert torch.equal(transform.balance, torch.ones(2, 64))
    assert transform.centre.dtype == transform.balance.dtype == torch.float32
    torch.testing.assert_close(kk.calibrate_keys(k, skip=0).centre, k.mean(0))


def test_skip_counts_in_every_sequence() -> None:
    k = rand(3, 50, 2, 64)
    torch.testing.assert_close(kk.calibrate_keys(k, skip=10).centre, k[:, 10:].mean((0, 1)))


def test_balance_is_of_centred_keys_and_the_whole_query_group() -> None:
    k, q = rand(2, 60, 2, 64) * 3 + 5, rand(40, 6, 64, seed=1) * torch.linspace(0.1, 4, 64)
    centre, balance = kk.calibrate_keys(k, q)
    for head in range(2):
        asked = q[:, head * 3 : head * 3 + 3].square().mean((0, 1))
        spread = (k[:, 16:, head] - centre[head]).square().mean((0, 1))
        torch.testing.assert_close(balance[head], (asked / spread) ** 0.25)


def test_balance_makes_queries_and_keys_alike() -> None:
    """The point of it: diag(t) k and diag(1/t) q have the same mean square in every channel."""
    k, q = rand(500, 1, 64) * torch.linspace(0.01, 10, 64), rand(500, 2, 64, seed=1) * torch.linspace(3, 0.2, 64)
    centre, balance = kk.calibrate_keys(k, q, skip=0)
    keys, queries = (k - centre) * balance, q / balance
    torch.testing.assert_close(keys.square().mean((0, 1)), queries.square().mean((0, 1)))


def test_balance_is_one_where_it_is_undefined() -> None:
    k, q = rand(50, 1, 64), rand(50, 1, 64, seed=1)
    k[:, :, 3], k[:, :, 4], q[:, :, 5] = 0.1, 0.0, 0.0
    balance = kk.calibrate_keys(k, q).balance
    assert balance[0, 3:6].tolist() == [1, 1, 1]
    assert balance.isfinite().all()
    assert (balance > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    k, q = rand(100, 2, 64).to(dtype), rand(100, 4, 64, seed=1).to(dtype)
    for got, expected in zip(kk.calibrate_keys(k, q), kk.calibrate_keys(k.double(), q.double())):
        assert torch.equal(got, expected)
        assert got.dtype == torch.float32


@pytest.mark.parametrize(
    ("k", "q", "skip", "message"),
    [
        (rand(16, 2, 64), None, 16, "more than skip = 16 tokens"),
        (rand(16, 64), None, 0, r"k must be \[T, heads, D\]"),
        (rand(16, 2, 64), rand(64), 0, r"q must be \[T, heads, D\]"),
        (rand(16, 2, 64), None, -1, "skip must be at least 0; got -1"),
        (rand(16, 2, 64), rand(4, 3, 64), 0, "Hq a multiple of 2"),
        (rand(16, 2, 64), rand(4, 2, 128), 0, r"q must be \[..., Hq, 64\]"),
        (rand(16, 2, 64).index_fill(0, torch.tensor([3]), float("nan")), None, 0, "NaN or Inf"),
    ],
)
def test_errors(k: Tensor, q: Tensor | None, skip: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kk.calibrate_keys(k, q, skip)


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match="floating point"):
        kk.calibrate_keys(torch.zeros(32, 2, 64, dtype=torch.int32))


@pytest.mark.parametrize("layer", [0, 15, 29])
def test_it_helps_on_real_keys(layer: int) -> None:
    """Attention of the last 128 queries over SmolLM2's own keys in 2 bits, the first 16 in 16 bits."""
    with np.load(FIXTURE) as data:
        k, v, q = (
            torch.from_numpy(data[f"l{layer}_{name}"]).double() for name in ("k_post", "v", "q_post_last128")
        )  # [heads, tokens, D]
    transform = kk.calibrate_keys(k[:, :384].transpose(0, 1), q.transpose(0, 1))

    def attend(keys: Tensor) -> Tensor:
        scores = q @ keys.repeat_interleave(3, 0).transpose(1, 2) / 8
        causal = torch.ones(128, 512).tril(384).bool()
        return torch.softmax(scores.masked_fill(~causal, -torch.inf), -1) @ v.repeat_interleave(3, 0)

    def error(transform: kk.KVTransform | None) -> float:
        fmt = kk.format("u2")
        coded, _ = decode_page(fmt, encode_page(fmt, k, v, transform), 512, 64, transform)
        coded[:, :16] = k[:, :16]
        exact = attend(k)
        return ((attend(coded.double()) - exact).norm() / exact.norm()).item()

    assert error(transform) < 0.8 * error(None)
