"""Attention over small KV caches: 1- to 8-bit pages in hand-written kernels for PyTorch.

    import kvkernels as kk

`kk.format` and `kk.formats` are functions. The package of the formats' definitions has the name of the latter, so take
a module from it as `from kvkernels.formats import u2`.
"""

from typing import TYPE_CHECKING

from kvkernels.calibrate import calibrate_channels as calibrate_channels
from kvkernels.calibrate import calibrate_keys as calibrate_keys
from kvkernels.formats import Format as Format
from kvkernels.formats import format as format
from kvkernels.formats import formats as formats  # after the import of the submodule, which binds this name too
from kvkernels.offloaded import Offloaded as Offloaded
from kvkernels.offloaded import offload as offload
from kvkernels.ops import OPS as _OPS
from kvkernels.paged_kv import KVTransform as KVTransform
from kvkernels.paged_kv import PagedKV as PagedKV
from kvkernels.plan import Plan as Plan
from kvkernels.presets import preset as preset
from kvkernels.summaries import PageSummaries as PageSummaries

if TYPE_CHECKING:
    # For editors and type checkers; at run time ops/ is the list.
    from kvkernels.ops.delta_rule import delta_rule as delta_rule
    from kvkernels.ops.delta_rule_step import delta_rule_step as delta_rule_step
    from kvkernels.ops.flash_decode import flash_decode as flash_decode
    from kvkernels.ops.fwht import fwht as fwht
    from kvkernels.ops.gather_pages import gather_pages as gather_pages
    from kvkernels.ops.merge_states import merge_states as merge_states
    from kvkernels.ops.pack_pages import pack_pages as pack_pages
    from kvkernels.ops.page_summaries import page_summaries as page_summaries
    from kvkernels.ops.plan_decode import plan_decode as plan_decode
    from kvkernels.ops.plan_prefix import plan_prefix as plan_prefix
    from kvkernels.ops.prefix_attention import prefix_attention as prefix_attention
    from kvkernels.ops.quant_attention import quant_attention as quant_attention
    from kvkernels.ops.read_kv import read_kv as read_kv
    from kvkernels.ops.score_pages import score_pages as score_pages
    from kvkernels.ops.score_tokens import score_tokens as score_tokens
    from kvkernels.ops.select_pages import select_pages as select_pages
    from kvkernels.ops.select_tokens import select_tokens as select_tokens
    from kvkernels.ops.sparse_attention import sparse_attention as sparse_attention
    from kvkernels.ops.tril_inverse import tril_inverse as tril_inverse
    from kvkernels.ops.write_kv import write_kv as write_kv
else:
    globals().update({name: getattr(module, name) for name, module in _OPS.items()})

from kvkernels import compat as compat
from kvkernels import integrations as integrations
from kvkernels.context import DeltaContext as DeltaContext
from kvkernels.context import delta_context as delta_context
from kvkernels.info import info as info
from kvkernels.kv_cache import KVCache as KVCache
from kvkernels.tier import TokenLayout as TokenLayout
from kvkernels.tier import lay_tokens as lay_tokens
from kvkernels.tier import tier_tokens as tier_tokens
