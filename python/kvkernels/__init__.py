"""Attention over small KV caches: 1- to 8-bit pages in hand-written kernels for PyTorch.

    import kvkernels as kk

`kk.format` and `kk.formats` are functions. The package of the formats' definitions has the name of the latter, so take
a module from it as `from kvkernels.formats import u2`.
"""

__version__ = "0.1.0"  # pyproject.toml reads it here

from typing import TYPE_CHECKING

import torch

from kvkernels.calibrate import calibrate_channels, calibrate_keys
from kvkernels.formats import Format, format, formats  # the function, after the submodule that binds its name too
from kvkernels.offloaded import Offloaded, offload
from kvkernels.ops import OPS as _OPS
from kvkernels.paged_kv import KVTransform, PagedKV
from kvkernels.plan import Plan
from kvkernels.presets import preset
from kvkernels.summaries import PageSummaries

if TYPE_CHECKING:
    # For editors and type checkers; at run time ops/ is the list.
    from kvkernels.ops.delta_rule import delta_rule
    from kvkernels.ops.delta_rule_step import delta_rule_step
    from kvkernels.ops.flash_decode import flash_decode
    from kvkernels.ops.fwht import fwht
    from kvkernels.ops.gather_pages import gather_pages
    from kvkernels.ops.merge_states import merge_states
    from kvkernels.ops.pack_pages import pack_pages
    from kvkernels.ops.page_summaries import page_summaries
    from kvkernels.ops.plan_decode import plan_decode
    from kvkernels.ops.plan_prefix import plan_prefix
    from kvkernels.ops.prefix_attention import prefix_attention
    from kvkernels.ops.quant_attention import quant_attention
    from kvkernels.ops.read_kv import read_kv
    from kvkernels.ops.score_pages import score_pages
    from kvkernels.ops.score_tokens import score_tokens
    from kvkernels.ops.select_pages import select_pages
    from kvkernels.ops.select_tokens import select_tokens
    from kvkernels.ops.sparse_attention import sparse_attention
    from kvkernels.ops.tril_inverse import tril_inverse
    from kvkernels.ops.write_kv import write_kv
else:
    globals().update({name: getattr(module, name) for name, module in _OPS.items()})

from kvkernels import compat, integrations
from kvkernels.context import DeltaContext, delta_context
from kvkernels.info import info
from kvkernels.kv_cache import KVCache
from kvkernels.tier import TokenLayout, lay_tokens, tier_tokens

__all__ = [
    "DeltaContext", "Format", "KVCache", "KVTransform", "Offloaded", "PageSummaries", "PagedKV", "Plan", "TokenLayout",
    "calibrate_channels", "calibrate_keys", "compat", "delta_context", "delta_rule", "delta_rule_step", "flash_decode",
    "format", "formats", "fwht", "gather_pages", "info", "integrations", "lay_tokens", "merge_states", "offload",
    "pack_pages", "page_summaries", "plan_decode", "plan_prefix", "prefix_attention", "preset", "quant_attention",
    "read_kv", "score_pages", "score_tokens", "select_pages", "select_tokens", "sparse_attention", "tier_tokens",
    "tril_inverse", "write_kv",
]  # fmt: skip


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"]


# What torch.load may make anew from a file of weights: tensors with names.
torch.serialization.add_safe_globals(
    [DeltaContext, Format, KVTransform, Offloaded, PagedKV, PageSummaries, Plan, TokenLayout]
)
