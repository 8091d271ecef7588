"""Measure keys and queries: the basis in which rotated formats store keys, and the channels that tell keys apart."""

import torch
from torch import Tensor

from kvkernels.paged_kv import KVTransform


def calibrate_keys(k: Tensor, q: Tensor | None = None, skip: int = 16) -> KVTransform:
    """Centre, balance and channel order of a layer's keys, for `PagedKV(transform=...)`.

    k:    [T, Hkv, D] or [B, T, Hkv, D], any float dtype, after RoPE, as they enter the cache
    q:    [T', Hq, D] or [B', T', Hq, D] after RoPE, Hq a multiple of Hkv, any tokens of the layer; None: balance 1
    skip: the first tokens of every sequence, left out of the keys: attention sinks have keys unlike all others and stay
          in 16 bits

    Returns [Hkv, D] each, on k's device:
      centre  = mean of the keys over the tokens
      balance = (E q^2 / E (k - centre)^2)^(1/4) per channel, q over all query heads of the KV head; 1 where a channel
                is constant or never asked for; float32, as centre
      order   = the channels by descending variance of the balanced keys, equal ones as they come; int32
    Raises ValueError if no token is left, if a shape does not fit, or if q or the keys after `skip` hold NaN or Inf.

    Centring takes away what is the same in every key (a bias, slow RoPE channels), which a rotation would smear over
    all channels; balancing gives the channels in which queries are large a finer grid; the order is for formats whose
    channels have different bits. Attention undoes all of it on the query side at no cost per token. Calibrated once on
    any text, the result serves as a constant of the layer: in a simulation with keys and values in 2 bits, perplexity
    was as good as with each prompt's own centre and balance on models of 135M and 1.5B parameters; on the latter it was
    163 without the two, 17.0 with, 16.6 in 16 bits.
    Source: channel balancing as in Yang et al. 2024, arXiv:2402.18096 (MiKV), here on mean squares and after centring;
    rotation of keys as in Su et al. 2025, arXiv:2501.16383 (RotateKV); the combination measured for this library.
    """
    for name, x in (("k", k), ("q", q)):
        if x is None:
            continue
        if not x.is_floating_point():
            raise TypeError(f"calibrate_keys: {name} must be floating point; got {x.dtype}")
        if x.dim() not in (3, 4):
            raise ValueError(f"calibrate_keys: {name} must be [T, heads, D] or [B, T, heads, D]; got {list(x.shape)}")
    if skip < 0:
        raise ValueError(f"calibrate_keys: skip must be at least 0; got {skip}")
    tokens, heads, head_dim = k.shape[-3:]
    if tokens <= skip or k.numel() == 0:
        raise ValueError(f"calibrate_keys: k must have more than skip = {skip} tokens; got {list(k.shape)}")

    keys = k.detach()[..., skip:, :, :].reshape(-1, heads, head_dim).double()
    if not keys.isfinite().all():
        raise ValueError("calibrate_keys: k holds NaN or Inf; pass only the tokens that were written")
    centre = keys.mean(0)
    balance = torch.ones_like(centre)
    spread = (keys - centre).square().mean(0)
    if q is not None:
        if q.shape[-1] != head_dim or q.shape[-2] % heads or q.numel() == 0:
            raise ValueError(
                f"calibrate_keys: q must be [..., Hq, {head_dim}] with Hq a multiple of {heads}, from k's heads and "
                f"head_dim, and not empty; got {list(q.shape)}"
            )
        queries = q.detach().to(keys).reshape(-1, heads, q.shape[-2] // heads, head_dim)
        if not queries.isfinite().all():
            raise ValueError("calibrate_keys: q holds NaN or Inf; pass only the tokens that are there")
        ratio = queries.square().mean((0, 2)) / spread
        # A constant channel leaves the rounding of its mean, not zero; 2^-40 is below what fp32 keys can tell apart.
        usable = (spread > 2.0**-40 * keys.square().mean(0)) & ratio.isfinite() & (ratio > 0)
        balance = torch.where(usable, ratio, 1.0) ** 0.25
    order = (spread.sqrt() * balance).sort(dim=1, descending=True, stable=True).indices
    return KVTransform(centre.float(), balance.float(), order.int())


def calibrate_channels(k: Tensor, q: Tensor | None = None, r: int | None = None) -> Tensor:
    """The channels of each KV head that say most about q.k, for `page_summaries(kind="channels")`.

    k:  [T, Hkv, D] or [B, T, Hkv, D], any float dtype, after RoPE, as they enter the cache; any tokens of the layer
    q:  [T', Hq, D] or [B', T', Hq, D] after RoPE, Hq a multiple of Hkv; None: keys alone decide
    r:  how many channels, 1 to D; None: D / 16, but at least 8

    Returns int32 [Hkv, r] on k's device, ascending: the channels of largest mean |q| * mean |k|, q over all query heads
    of the KV head; of equal ones the lower. Raises ValueError for an empty k or q, a shape or r that does not fit, NaN
    or Inf.

    Source: Yang et al. 2024, arXiv:2408.07092 (Double Sparsity), its offline calibration by |q k|.
    """
    for name, x in (("k", k), ("q", q)):
        if x is None:
            continue
        if not x.is_floating_point():
            raise TypeError(f"calibrate_channels: {name} must be floating point; got {x.dtype}")
        if x.dim() not in (3, 4) or x.numel() == 0:
            raise ValueError(
                f"calibrate_channels: {name} must be [T, heads, D] or [B, T, heads, D], and not empty; "
                f"got {list(x.shape)}"
            )
    heads, head_dim = k.shape[-2:]
    r = max(8, head_dim // 16) if r is None else r
    if not 1 <= r <= head_dim:
        raise ValueError(f"calibrate_channels: r must be 1 to {head_dim}, k's head_dim; got {r}")
    weight = k.detach().double().abs().reshape(-1, heads, head_dim).mean(0)
    if q is not None:
        if q.shape[-1] != head_dim or q.shape[-2] % heads:
            raise ValueError(
                f"calibrate_channels: q must be [..., Hq, {head_dim}] with Hq a multiple of {heads}, from k's heads "
                f"and head_dim; got {list(q.shape)}"
            )
        queries = q.detach().to(weight).abs().reshape(-1, heads, q.shape[-2] // heads, head_dim)
        weight = weight * queries.mean((0, 2))
    if not weight.isfinite().all():
        raise ValueError("calibrate_channels: k or q holds NaN or Inf; pass only the tokens that were written")
    best = weight.sort(dim=1, descending=True, stable=True).indices[:, :r]
    return best.sort(dim=1).values.int()
