"""A small KV cache for the models of Hugging Face transformers: Llama, Qwen, Mistral, Gemma, gpt-oss and their like.

    import kvkernels as kk

    kk.integrations.transformers.attach(model)  # once
    model.generate(**inputs, past_key_values=kk.integrations.transformers.KVCache(format="m31/u2.e5m3"))

attach() makes the model's attention read the pages of a KVCache: steps of up to 16 tokens through quant_attention,
longer ones, such as prompts, through torch's SDPA on their own keys and values, and on what the cache already held,
decoded once for that. With any other cache, or none, an attached model does what it did before, with SDPA. A model that
is not attached works with a KVCache too, but decodes all of it at every step, and says so.

`attn_implementation="kvkernels"` in from_pretrained does the same as attach(), once this module is imported.

Tested with transformers 5.23.
"""

import itertools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvkernels.formats import Format
from kvkernels.formats import format as parse_format
from kvkernels.integrations._model_pages import MAX_QUERIES, Layer, ModelPages, Step
from kvkernels.ops.quant_attention import quant_attention
from kvkernels.paged_kv import FORMAT_OF_DTYPE, KVTransform

NAME = "kvkernels"
QUERIES_AT_ONCE = 256  # scores of so many rows are in memory at a time

Model = TypeVar("Model")


def attach(model: Model) -> Model:
    """Switch the attention of a model, of its text decoder if it has others too. Returns the model.

    `model.set_attn_implementation("sdpa")` undoes it. ValueError: transformers cannot switch this model's attention, or
    pages cannot hold what it caches (multi-head latent attention), or it sees them in chunks (Llama 4).
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[attr-defined]
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(
            f"attach: {type(model).__name__} has multi-head latent attention (kv_lora_rank = {config.kv_lora_rank}) "
            f"in all layers: they cache latents, which pages of keys and values do not hold"
        )
    for layer in range(len(getattr(config, "layer_types", None) or ())):
        _refuse_chunks(f"attach: {type(model).__name__}: ", config, layer)
    if config is model.config:  # type: ignore[attr-defined]
        model.set_attn_implementation(NAME)  # type: ignore[attr-defined]
    else:
        names = [n for n in model.config.sub_configs if getattr(model.config, n, None) is config]  # type: ignore[attr-defined]
        model.set_attn_implementation(dict.fromkeys(names, NAME))  # type: ignore[attr-defined]
    if config._attn_implementation != NAME:
        raise ValueError(f"attach: transformers cannot switch the attention of {type(model).__name__}")
    return model


_Formats = Format | list[Format] | Callable[[int], str | Format]


@dataclass
class _NewLayer:
    """Makes the layer of a number."""

    formats: _Formats
    transforms: list[KVTransform | None] | None
    calibrate: bool

    def __call__(self, index: int) -> Layer:
        for name, given in (("format", self.formats), ("transforms", self.transforms)):
            if isinstance(given, list) and index >= len(given):
                raise ValueError(f"KVCache: {name} has {len(given)} entries, but the model a layer {index}")
        if isinstance(self.formats, Format):
            fmt = self.formats
        else:
            fmt = self.formats[index] if isinstance(self.formats, list) else parse_format(self.formats(index))
        return Layer(index, fmt, None if self.transforms is None else self.transforms[index], self.calibrate)


class KVCache(Cache):
    """Keys and values of all layers, packed as they age: `past_key_values=KVCache()`.

    format         of the middle of every layer: a name, a pair like "u3/u2", a Format (`preset`); or a list, one per
                   layer; or a function of the layer's number. "bf16" or "f16" packs nothing where it is the 16-bit
                   pages' own
    page_size      tokens per page
    sink_tokens, recent_tokens: first and last tokens that stay in 16 bits, as in kvkernels.KVCache
    dtype          of the 16-bit pages, bfloat16 or float16; None: the model's own, bfloat16 for float32 models
    calibrate      measure the basis of the keys (`calibrate_keys`) of each layer on the first text, just before its
                   first page is packed; it then stays, over reset() too
    transforms     KVTransforms to use instead, one per layer (None in the list: calibrate that layer); those of a cache
                   that has seen text are its `transforms`
    config         the model's, for models that also have linear attention or convolutions (Qwen3-Next, LFM2): their
                   states are kept as transformers' own caches keep them

    Takes what transformers' caches take: batches with padding (padding is not stored), beam search (sequences share
    pages), assisted generation (crop), several turns, sliding windows (pages that no query will see are given up),
    softcapped scores, attention sinks, reset(), copy.deepcopy and pickle. Packed formats need head dims of
    64, 128 or 256; the ValueError for others comes with the first keys.

    A step that fails before the first layer has stored it, for want of memory too, leaves the cache as it was; one that
    was broken off later asks for reset().

    Not differentiable: ValueError with gradients on. ValueError: masks that hide stored tokens from short steps;
    padding inside a sliding window; keys and values of two shapes (multi-head latent attention); chunked attention; two
    models of different shapes. UserWarning: keys that are packed before there are enough to calibrate them.
    """

    def __init__(
        self,
        format: str | Format | Sequence[str | Format] | Callable[[int], str | Format] = "m31/u2.e5m3",
        *,
        page_size: int = 64,
        sink_tokens: int = 64,
        recent_tokens: int = 256,
        dtype: torch.dtype | None = None,
        calibrate: bool = True,
        transforms: Sequence[KVTransform | None] | None = None,
        config: PreTrainedConfig | None = None,
    ):
        states = [] if config is None else DynamicCache(config=config).layers
        super().__init__(layers=[x if isinstance(x, LinearAttentionLayer) else DummyLayer() for x in states])
        if any(isinstance(x, LinearAttentionLayer) and isinstance(x, CacheLayerMixin) for x in states):
            raise ValueError("KVCache: layers with attention and linear attention side by side are not supported")
        if dtype is not None and dtype not in FORMAT_OF_DTYPE:
            raise TypeError(f"KVCache: dtype must be bfloat16, float16 or None; got {dtype}")
        for name, value, least in (("sink_tokens", sink_tokens, 0), ("recent_tokens", recent_tokens, 0)):
            if value < least:
                raise ValueError(f"KVCache: {name} must be at least {least}; got {value}")
        for i, transform in enumerate(transforms or ()):
            if transform is not None and not isinstance(transform, KVTransform):
                raise TypeError(
                    f"KVCache: transforms[{i}] must be a KVTransform or None; got {type(transform).__name__}"
                )
        formats: _Formats
        if isinstance(format, (str, Format)):
            formats = parse_format(format)
        else:
            formats = format if callable(format) else [parse_format(f) for f in format]
        given = None if transforms is None else list(transforms)
        self.pages = ModelPages(_NewLayer(formats, given, calibrate), page_size, sink_tokens, recent_tokens, dtype)
        self._warned = False
        self._register()

    def _register(self) -> None:
        number = next(_numbers)
        self.number = torch.tensor(number)
        _caches[number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copied or loaded, say of a prompt that several continuations share, it goes on by itself."""
        self.__dict__.update(state)
        self._register()

    @property
    def transforms(self) -> list[KVTransform | None]:
        """The basis of the keys of each layer, for another KVCache of the same model; None: not yet calibrated."""
        layers = self.pages.layers
        return [layers[i].transform if i in layers else None for i in range(max(layers, default=-1) + 1)]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use, a page that sequences share counted once."""
        return self.pages.nbytes

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of all pages, free ones too."""
        return self.pages.reserved_nbytes

    @property
    def bits_per_element(self) -> float:
        """Bits in use per number cached, at the current lengths: windows, scales, padding, unfilled places counted."""
        return self.pages.bits_per_element

    def __repr__(self) -> str:
        return f"KVCache({len(self)} layers, {self.pages.batch} sequences of {self.pages.columns} tokens)"

    def __len__(self) -> int:
        return len(self.pages.layers)

    # ---- what models call
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values [B, Hkv, T, D] of a layer. They enter the cache when attention is called with the result,
        because attention knows which of them are padding."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError("KVCache: keys require grad, but a cache has no backward; use torch.no_grad()")
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"KVCache: layer {layer_idx} caches keys of {list(key_states.shape)} and values of "
                f"{list(value_states.shape)}: pages hold keys and values of one shape, not those of multi-head latent "
                f"attention (MLA)"
            )
        if torch.compiler.is_compiling():
            _traced.put(self, layer_idx, key_states, value_states)
            # Of no use to attention that was not switched, which then cannot be traced.
            return key_states[..., :0], value_states[..., :0]
        return _New(self, self.pages.layer(layer_idx), key_states, value_states).handles()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a sequence, padding included."""
        return self.pages.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.pages.columns + query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.pages.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    # ---- what generate() calls
    def reset(self) -> None:
        """Forget all tokens, give back the memory. What was calibrated stays."""
        super().reset()
        self.pages.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._fork(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._fork([row for row in range(self.pages.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._fork(torch.arange(self.pages.batch)[indices.cpu()].tolist())

    def _fork(self, src: list[int]) -> None:
        if self.pages.columns:
            self.pages.fork(src)

    def crop(self, tokens_to_remove: int) -> None:
        """Take -tokens_to_remove tokens from the end of every sequence; layers with sliding windows can take back
        recent_tokens of them."""
        if tokens_to_remove > 0:
            raise ValueError(f"KVCache.crop: takes minus the number of tokens to remove; got {tokens_to_remove}")
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.pages.crop(-tokens_to_remove)

    @property
    def batch_size(self) -> int:
        return self.pages.batch or -1

    @property
    def is_compileable(self) -> bool:
        """Whether generate() should compile the forward pass by itself: no, it has static shapes in mind."""
        return False

    @property
    def is_initialized(self) -> bool:
        return self.pages.columns > 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        if not self.layers:
            raise ValueError("KVCache: this model has linear attention; pass config=model.config")
        state: Tensor | None = super().get_conv_state(layer_idx, state_idx)
        return state


class _New:
    """New keys and values of a layer, on their way from update() to attention."""

    def __init__(self, cache: KVCache, layer: Layer, k: Tensor, v: Tensor):
        self.cache, self.layer, self.k, self.v = cache, layer, k, v
        self.start = layer.columns
        self.all: tuple[Tensor, Tensor] | None = None  # keys and values of all columns, decoded

    def handles(self) -> tuple[Tensor, Tensor]:
        k, v = self.k.as_subclass(_Handle), self.v.as_subclass(_Handle)
        k.source = v.source = self
        k.side, v.side = 0, 1
        return k, v

    @property
    def appended(self) -> bool:
        """Layers that share keys and values call attention more than once for them."""
        return self.layer.columns > self.start

    def append(self, q: Tensor | None, tokens: Tensor | None, direct: bool, window: int | None) -> None:
        """Into the cache. If attention cannot read the pages, `all` is there."""
        pages = self.cache.pages
        with pages.step_of(self.layer, self.k, tokens, direct, window) as step:
            if not step.direct:
                self.all = self.k, self.v
                if step.start:
                    past = pages.past(self.layer, step, self.k.dtype)
                    self.all = torch.cat([past[0], self.k], 2), torch.cat([past[1], self.v], 2)
            pages.append(self.layer, step, q, self.k, self.v)

    def decoded(self) -> tuple[Tensor, Tensor]:
        """For attention that knows nothing of pages."""
        if not self.appended:
            if not self.cache._warned:
                self.cache._warned = True
                warnings.warn(
                    "KVCache: this model's attention does not read pages, so every step decodes the whole cache. "
                    "Call kvkernels.integrations.transformers.attach(model) first",
                    stacklevel=2,
                )
            self.append(None, None, False, None)
        assert self.all is not None
        return self.all


class _Handle(Tensor):
    """Keys or values as update() returns them: the new ones, which know their layer. Any torch function but those of
    `attention` gets all keys or values of the layer instead, decoded."""

    source: _New
    side: int

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(_Handle, lambda x: x.source.decoded()[x.side], (args, kwargs or {}))
        return func(*args, **kwargs)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function "kvkernels" of transformers' AttentionInterface. query [B, Hq, T, D], key and value what
    update() returned, attention_mask as of `sdpa_mask`: bool [B or 1, 1, T, columns] or None. Returns [B, T, Hq, D]."""
    traced = _traced.take() if torch.compiler.is_compiling() else None
    if traced is None and type(key) is not _Handle:
        return _sdpa(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux, kwargs)
    if dropout or kwargs.get("position_bias") is not None or kwargs.get("is_causal") is False:
        raise ValueError("KVCache: attention with dropout, position_bias or is_causal=False is not supported")
    layer = key.source.layer.index if traced is None else traced[1]  # type: ignore[attr-defined]
    _refuse_chunks("KVCache: ", getattr(module, "config", None), layer)
    if traced is not None:
        cache, layer, k, v = traced
        out = _compiled(cache.number, layer, query, k, v, attention_mask, scaling, sliding_window, softcap, s_aux)
    else:
        assert isinstance(key, _Handle)
        out = _attend(key.source, query, attention_mask, scaling, sliding_window, softcap, s_aux)
    return out, None


def _refuse_chunks(who: str, config: Any, layer: int) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[layer] == "chunked_attention":
        raise ValueError(
            f"{who}layer {layer} has chunked attention (attention_chunk_size = "
            f"{getattr(config, 'attention_chunk_size', None)}), which attention on pages does not know; a model that "
            f"is not attached may have a KVCache, and decodes all of it at every step"
        )


def _attend(
    new: _New,
    query: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """New tokens into the cache, then attention over all that it holds."""
    pages = new.cache.pages
    if not new.appended:
        tokens = None
        if mask is not None and new.start == pages.columns:  # the first layer of the step
            tokens = _tokens(mask, new.k, pages.columns)
        new.append(query, tokens, query.shape[2] <= MAX_QUERIES, window)
    if new.all is not None:
        heads = _Heads(query.shape[1] // new.k.shape[1])
        return _sdpa(heads, query, *new.all, mask, 0.0, scaling, softcap, s_aux, {})[0]
    group, layer_pages = new.layer.group, new.layer.pages
    assert layer_pages is not None
    if mask is not None and not group.checked:
        _check_mask(mask, group.step, group.paging.seq_lens, window)
        group.checked = True
    q = query.transpose(1, 2)
    if q.is_cuda and q.dtype == torch.float32:  # whose kernels take 16-bit queries
        q = q.to(layer_pages.dtype)
    out = quant_attention(
        q, layer_pages.kv, group.paging.page_table, group.paging.seq_lens, scale=scaling,
        window=(-1, -1) if window is None else (window - 1, 0), softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.detach().float(),
    )  # fmt: skip
    return out.to(query.dtype)


def _tokens(mask: Tensor, k: Tensor, columns: int) -> Tensor:
    """Which of the new columns are tokens, bool [B, T]: padding does not even see itself."""
    batch, _, T, _ = k.shape
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[-2:] != (T, columns + T):
        raise ValueError(
            f"KVCache: attention_mask must be bool [B, 1, {T}, {columns + T}], {columns} from the cache; got "
            f"{mask.dtype} {list(mask.shape)}"
        )
    return mask[:, 0].diagonal(columns, 1, 2).expand(batch, T)


def _check_mask(mask: Tensor, step: Step, seq_lens: Tensor, window: int | None) -> None:
    """Every query of a short step must see all stored tokens up to itself, or as many as the window has: attention on
    pages looks at no mask. Padding inside a window takes room in transformers' masks, and none in pages."""
    tokens = mask.new_ones(len(step.counts), step.columns) if step.tokens is None else step.tokens
    before = seq_lens - seq_lens.new_tensor(step.counts)
    expected = before[:, None] + tokens.cumsum(1)
    if window is not None:
        expected = expected.clamp(max=window)
    if bool(((mask[:, 0].sum(-1) != expected) & tokens).any()):
        raise ValueError(
            f"KVCache: attention_mask hides stored tokens, or shows later ones, in a step of {step.columns} tokens; "
            f"up to {MAX_QUERIES} tokens, it must be causal and show all"
            + ("" if window is None else f", and padding must not stand inside the sliding window of {window}")
        )


class _Heads(NamedTuple):
    """What `sdpa_attention_forward` asks of an attention module."""

    num_key_value_groups: int
    is_causal: bool = True


def _sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """[B, H, T, D] -> [B, T, H, D]"""
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
    # What torch's SDPA has not, some queries at a time.
    heads, T, columns = key.shape[1], query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if mask is None and T > 1:
        mask = torch.ones(1, 1, T, columns, dtype=torch.bool, device=query.device).tril(columns - T)
    grouped = query.unflatten(1, (heads, -1))
    k, v = key.unsqueeze(2).transpose(-1, -2), value.unsqueeze(2)
    outs = []
    for first in range(0, T, QUERIES_AT_ONCE):
        some = slice(first, first + QUERIES_AT_ONCE)
        scores = (grouped[..., some, :] @ k).float() * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:  # padding sees nothing: any finite number keeps it from becoming NaN
            scores = scores.masked_fill(~mask[:, :, None, some], torch.finfo(torch.float32).min)
        if s_aux is not None:
            sinks = s_aux.float().view(1, heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], -1)
        weights = torch.nn.functional.dropout(scores.softmax(-1)[..., :columns].to(v.dtype), dropout)
        outs.append(weights @ v)
    return torch.cat(outs, -2).flatten(1, 2).transpose(1, 2).contiguous(), None


# Under torch.compile all of the above is one opaque op per layer, which finds the cache by its number.

_caches: "weakref.WeakValueDictionary[int, KVCache]" = weakref.WeakValueDictionary()
_numbers = itertools.count()


class _Traced:
    """From update() to attention while a compiler traces both."""

    def __init__(self) -> None:
        self.new: tuple[KVCache, int, Tensor, Tensor] | None = None

    def put(self, cache: KVCache, layer: int, k: Tensor, v: Tensor) -> None:
        self.new = cache, layer, k, v

    def take(self) -> tuple[KVCache, int, Tensor, Tensor] | None:
        new, self.new = self.new, None
        return new


_traced = _Traced()


@torch.library.custom_op(
    "kvkernels::transformers_attention", mutates_args=("number",), tags=(torch.Tag.cudagraph_unsafe,)
)
def _compiled(
    number: Tensor,
    layer: int,
    query: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """number: int64 [] on the CPU. Declared as changed, because the cache is: compilers keep the order of calls."""
    cache = _caches[int(number)]
    new = _New(cache, cache.pages.layer(layer), k, v)
    return _attend(new, query, mask, scaling, window, softcap, s_aux).contiguous()


@_compiled.register_fake
def _(
    number: Tensor,
    layer: int,
    query: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], v.shape[3])


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
