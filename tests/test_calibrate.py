"""calibrate_keys: centre and balance are what they are said to be, and they help on real keys. calibrate_channels."""

from pathlib import Path
from typing import Any

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
    centre, balance, _ = kk.calibrate_keys(k, q)
    for head in range(2):
        asked = q[:, head * 3 : head * 3 + 3].square().mean((0, 1))
        spread = (k[:, 16:, head] - centre[head]).square().mean((0, 1))
        torch.testing.assert_close(balance[head], (asked / spread) ** 0.25)


def test_balance_makes_queries_and_keys_alike() -> None:
    """The point of it: diag(t) k and diag(1/t) q have the same mean square in every channel."""
    k, q = rand(500, 1, 64) * torch.linspace(0.01, 10, 64), rand(500, 2, 64, seed=1) * torch.linspace(3, 0.2, 64)
    centre, balance, _ = kk.calibrate_keys(k, q, skip=0)
    keys, queries = (k - centre) * balance, q / balance
    torch.testing.assert_close(keys.square().mean((0, 1)), queries.square().mean((0, 1)))


def test_balance_is_one_where_it_is_undefined() -> None:
    k, q = rand(50, 1, 64), rand(50, 1, 64, seed=1)
    k[:, :, 3], k[:, :, 4], q[:, :, 5] = 0.1, 0.0, 0.0
    balance = kk.calibrate_keys(k, q).balance
    assert balance[0, 3:6].tolist() == [1, 1, 1]
    assert balance.isfinite().all()
    assert (balance > 0).all()


def test_order_is_by_the_variance_of_balanced_keys() -> None:
    k, q = rand(400, 2, 64) * torch.logspace(-2, 1, 64) + 3, rand(400, 4, 64, seed=1) * torch.logspace(2, -2, 64)
    centre, balance, order = kk.calibrate_keys(k, q)
    assert order is not None
    assert order.dtype == torch.int32
    spread = ((k[16:] - centre) * balance).square().mean(0)
    for head in range(2):
        assert sorted(order[head].tolist()) == list(range(64))
        assert (spread[head, order[head].long()].diff() <= 1e-6).all()
    assert order[0, 0] < order[0, -1]  # queries outweigh keys here
    assert kk.calibrate_keys(k).order[0, 0] > kk.calibrate_keys(k).order[0, -1]
    assert kk.calibrate_keys(torch.ones(20, 1, 64)).order.tolist() == [list(range(64))]  # equal ones as they come


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    k, q = rand(100, 2, 64).to(dtype), rand(100, 4, 64, seed=1).to(dtype)
    for got, expected in zip(kk.calibrate_keys(k, q), kk.calibrate_keys(k.double(), q.double())):
        assert torch.equal(got, expected)
        assert got.dtype in (torch.float32, torch.int32)


@pytest.mark.parametrize(
    ("k", "q", "skip", "message"),
    [
        (rand(16, 2, 64), None, 16, "more than skip = 16 tokens"),
        (rand(16, 64), None, 0, r"k must be \[T, heads, D\]"),
        (rand(16, 2, 64), rand(64), 0, r"q must be \[T, heads, D\]"),
        (rand(16, 2, 64), None, -1, "skip must be at least 0; got -1"),
        (rand(16, 2, 64), rand(4, 3, 64), 0, "Hq a multiple of 2"),
        (rand(16, 2, 64), rand(4, 2, 128), 0, r"q must be \[..., Hq, 64\]"),
        (rand(16, 2, 64).index_fill(0, torch.tensor([3]), float("nan")), None, 0, "k holds NaN or Inf"),
        (rand(16, 2, 64), rand(4, 2, 64).index_fill(0, torch.tensor([3]), float("nan")), 0, "q holds NaN or Inf"),
        (rand(16, 2, 64), rand(4, 2, 64).index_fill(2, torch.tensor([3]), float("inf")), 0, "q holds NaN or Inf"),
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
    """Attention of the last 128 queries over SmolLM2's own keys in 2 bits, the first 16 in 16 bits: centre and balance
    help, and the order of channels does once more."""
    with np.load(FIXTURE) as data:
        k, v, q = (
            torch.from_numpy(data[f"l{layer}_{name}"]).double() for name in ("k_post", "v", "q_post_last128")
        )  # [heads, tokens, D]
    transform = kk.calibrate_keys(k[:, :384].transpose(0, 1), q.transpose(0, 1))

    def attend(keys: Tensor) -> Tensor:
        scores = q @ keys.repeat_interleave(3, 0).transpose(1, 2) / 8
        causal = torch.ones(128, 512).tril(384).bool()
        return torch.softmax(scores.masked_fill(~causal, -torch.inf), -1) @ v.repeat_interleave(3, 0)

    def error(name: str, transform: kk.KVTransform | None) -> float:
        fmt = kk.format(name, "u2")
        coded, _ = decode_page(fmt, encode_page(fmt, k, v, transform), 512, 64, transform)
        coded[:, :16] = k[:, :16]
        exact = attend(k)
        return ((attend(coded.double()) - exact).norm() / exact.norm()).item()

    assert error("u2", transform) < 0.8 * error("u2", None)
    assert error("m42", transform) < 0.85 * error("m42", transform._replace(order=None))
    if layer:  # in the first layer channels differ little: 0.121 and 0.098
        assert error("m31", transform) < 0.9 * error("u2", transform)


def test_channels_are_those_of_largest_products() -> None:
    k, q = rand(40, 2, 64).abs() + 1, rand(3, 30, 6, 64, seed=1).abs() + 1
    k[:, 0, [3, 50]] *= 20
    k[:, 1, [7, 9]] *= 20
    assert kk.calibrate_channels(k, r=2).tolist() == [[3, 50], [7, 9]]
    q[:, :, 0, 9] *= 500  # a query head of KV head 0
    q[:, :, 3:, [7, 9]] /= 1000
    got = kk.calibrate_channels(k, q, r=3)
    assert got.dtype == torch.int32
    assert got[0].tolist() == [3, 9, 50]
    weight = k[:, 1].mean(0) * q[:, :, 3:].mean((0, 1, 2))
    assert got[1].tolist() == sorted(weight.topk(3).indices.tolist())
    assert 7 not in got[1]


def test_channels_by_default() -> None:
    assert kk.calibrate_channels(rand(2, 5, 1, 64)).shape == (1, 8)
    assert kk.calibrate_channels(rand(5, 3, 256)).shape == (3, 16)
    assert kk.calibrate_channels(torch.ones(5, 1, 64), r=3).tolist() == [[0, 1, 2]]  # of equal ones the lower


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(4, 2, 64, dtype=torch.int32)}, TypeError, "k must be floating point; got torch.int32"),
        (
            {"k": rand(4, 64)},
            ValueError,
            r"k must be \[T, heads, D\] or \[B, T, heads, D\], and not empty; got \[4, 64\]",
        ),
        ({"k": rand(0, 2, 64)}, ValueError, r"and not empty; got \[0, 2, 64\]"),
        ({"q": rand(4, 3, 64)}, ValueError, r"q must be \[..., Hq, 64\] with Hq a multiple of 2"),
        ({"q": rand(4, 2, 32)}, ValueError, r"q must be \[..., Hq, 64\]"),
        ({"r": 0}, ValueError, "r must be 1 to 64, k's head_dim; got 0"),
        ({"r": 65}, ValueError, "r must be 1 to 64, k's head_dim; got 65"),
        ({"k": rand(4, 2, 64) / 0}, ValueError, "k or q holds NaN or Inf"),
    ],
)
def test_channels_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"calibrate_channels: .*{message}"):
        kk.calibrate_channels(**{"k": rand(4, 2, 64), **change})
