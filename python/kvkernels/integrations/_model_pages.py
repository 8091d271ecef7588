"""The pages of all layers of a model: every layer has seen the same tokens, so one step is planned once for all."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from kvkernels.calibrate import calibrate_keys
from kvkernels.formats import Format
from kvkernels.kv_cache import LayerPages
from kvkernels.paged_kv import FORMAT_OF_DTYPE, KVTransform
from kvkernels.paging import Paging, lasting

MAX_QUERIES = 16  # of quant_attention
SINKS = 16  # tokens at the beginning whose keys are unlike all others: left out of the calibration
MIN_CALIBRATION = 64  # tokens; of fewer a mean says little
MAX_CALIBRATION = 4096  # tokens of a sequence: more change nothing and cost memory


class Step(NamedTuple):
    """New columns of all layers. A column is a token, or in some sequences padding, which is not stored."""

    start: int  # columns before them
    columns: int
    counts: list[int]  # of tokens in each sequence
    tokens: Tensor | None  # bool [B, columns]: the tokens among the columns; None: all
    order: Tensor | None  # int64 [B, columns]: the tokens first, as they come; None: they are
    direct: bool  # attention reads the pages: few queries, all padding before the tokens


class Group:
    """Layers whose tokens lie in the same places: those that pack and those that do not, by window and device."""

    def __init__(self, paging: Paging, step: Step):
        self.paging, self.step = paging, step
        self.plan = paging.append(step.counts, step.columns)
        self.past: list[Tensor] = []  # Paging.slots from before the step, if somebody has to read them
        self.packed = self.plan.packs  # whether pages were encoded, so that keys are calibrated
        self.checked = False  # whether the step's mask was looked at


class Layer:
    """One layer's pages, made when its first keys come."""

    def __init__(self, index: int, format: Format, transform: KVTransform | None, calibrate: bool):
        self.index, self.format, self.transform = index, format, transform
        self.calibrate = calibrate and format.rotated_k
        self.calibrated = transform is not None or not self.calibrate
        self.columns = 0
        self.pages: LayerPages | None = None
        self.group: Group
        self.square: Tensor | None = None  # mean square of the queries, [Hkv, D], until keys are calibrated
        self.num_queries = 0

    def reset(self) -> None:
        """All but the transform: calibrated once, it is a constant of the layer."""
        self.columns, self.pages, self.square, self.num_queries = 0, None, None, 0
        self.calibrated = self.transform is not None or not self.calibrate


class ModelPages:
    """Steps of all layers.

    layer  makes the layer of a number
    dtype  of the 16-bit pages; None: the keys' own, bfloat16 for those of 32 bits
    """

    def __init__(
        self,
        layer: Callable[[int], Layer],
        page_size: int,
        sink_tokens: int,
        recent_tokens: int,
        dtype: torch.dtype | None,
    ):
        self.page_size, self.sink_tokens, self.recent_tokens, self.dtype = page_size, sink_tokens, recent_tokens, dtype
        self.new_layer = layer
        self.layers: dict[int, Layer] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and give back the memory."""
        self.batch = self.columns = 0
        self.step: Step | None = None
        self.tokens: Tensor | None = None  # bool [B, columns]: the tokens among all columns so far; None: all
        self.groups: dict[tuple[bool, int | None, torch.device], Group] = {}
        for layer in self.layers.values():
            layer.reset()

    def layer(self, index: int) -> Layer:
        layer = self.layers.get(index)
        if layer is None:
            layer = self.layers[index] = self.new_layer(index)
        return layer

    @property
    def nbytes(self) -> int:
        """Bytes of the pages in use."""
        return sum(x.pages.nbytes(x.group.paging.pools) for x in self.layers.values() if x.pages is not None)

    @property
    def reserved_nbytes(self) -> int:
        """Bytes of all pages, free ones too."""
        return sum(x.pages.kv.nbytes for x in self.layers.values() if x.pages is not None)

    @property
    def bits_per_element(self) -> float:
        """Bits in use per number cached: windows, scales, padding and unfilled places counted."""
        numbers = 0
        for layer in self.layers.values():
            if layer.pages is not None:
                kv = layer.pages.kv
                numbers += 2 * kv.num_kv_heads * kv.head_dim * sum(layer.group.paging.lens)
        return self.nbytes * 8 / numbers if numbers else float("nan")

    @contextmanager
    def step_of(
        self, layer: Layer, k: Tensor, tokens: Tensor | None, direct: bool, window: int | None
    ) -> Iterator[Step]:
        """`begin`, and if what is done with the step fails before any layer has done it, there is no such step."""
        saved, own = {**vars(self), "groups": dict(self.groups)}, dict(vars(layer))
        group = None if layer.pages is None else layer.group
        shared = {} if group is None else dict(vars(group))
        try:
            yield self.begin(layer, k, tokens, direct, window)
        except BaseException:
            if self.step is not saved["step"] and layer.columns == own["columns"]:
                if group is not None:
                    if group.step is self.step:
                        group.paging.undo()
                    vars(group).update(shared)
                vars(self).update(saved)
                vars(layer).update(own)
            raise

    def begin(self, layer: Layer, k: Tensor, tokens: Tensor | None, direct: bool, window: int | None) -> Step:
        """The step that brings k [B, Hkv, T, D] to the layer: the one that other layers began, or a new one.

        tokens: bool [B, T], the columns that are not padding; only the first layer of a step is asked. None: all
        direct: attention can read the pages
        window: so many tokens up to itself a query of this layer sees; None: all
        """
        batch, columns = k.shape[0], k.shape[2]
        step = self.step
        if layer.pages is not None:
            kv = layer.pages.kv
            held, new = (kv.num_kv_heads, kv.head_dim, kv.device), (k.shape[1], k.shape[3], k.device)
            if new != held:
                raise ValueError(
                    "KVCache: layer {} holds keys of {} heads of {} channels on {}; got {} of {} on {}. A cache is for "
                    "one model; reset() empties it".format(layer.index, *held, *new)
                )
        if layer.columns == self.columns:
            step = self.step = self._new_step(batch, columns, tokens, direct)
            self.columns += columns
        elif step is None or layer.columns != step.start or columns != step.columns or batch != len(step.counts):
            raise ValueError(
                f"KVCache: layer {layer.index} has {layer.columns} tokens and gets {columns} for {batch} sequences, "
                f"where other layers have {self.columns} already: a forward pass was broken off, or was of another "
                f"batch or model; call reset()"
            )
        if layer.pages is None:
            self._make_pages(layer, step, k, window)
        group = layer.group
        if group.paging.attended != window:
            raise ValueError(f"KVCache: layer {layer.index} had window {group.paging.attended}; now it is {window}")
        if group.step is not step:
            group.past, group.checked = [], False
            if step.start and not (step.direct and group.packed):
                group.past = group.paging.slots(max(group.paging.lens))
            group.plan = group.paging.append(step.counts, columns)
            group.step = step
            # Of all layers now: if there is no memory for one, no other has done the step.
            for other in self.layers.values():
                if other.pages is not None and other.group is group:
                    other.pages.reserve(group.plan.num_pages)
            group.packed = group.packed or group.plan.packs
        return step

    def _new_step(self, batch: int, columns: int, tokens: Tensor | None, direct: bool) -> Step:
        if self.columns and batch != self.batch:
            raise ValueError(f"KVCache: holds {self.batch} sequences, got {batch}; reset() empties it")
        self.batch = batch
        counts, order = [columns] * batch, None
        if tokens is not None:
            counts = [int(n) for n in tokens.sum(1).tolist()]
            if min(counts) == columns:
                tokens = None
            else:
                order = tokens.logical_not().byte().sort(dim=1, stable=True).indices
                direct = direct and bool((tokens[:, 1:] >= tokens[:, :-1]).all())
        with lasting():
            if self.tokens is not None:
                new = self.tokens.new_ones(batch, columns) if tokens is None else tokens
                self.tokens = torch.cat([self.tokens, new], 1)
            elif tokens is not None:
                self.tokens = torch.cat([tokens.new_ones(batch, self.columns), tokens], 1)
        return Step(self.columns, columns, counts, tokens, order, direct and columns <= MAX_QUERIES)

    def _make_pages(self, layer: Layer, step: Step, k: Tensor, window: int | None) -> None:
        dtype = self.dtype or (k.dtype if k.dtype in FORMAT_OF_DTYPE else torch.bfloat16)
        heads, head_dim = k.shape[1], k.shape[3]
        if layer.transform is not None:
            parts = layer.transform._asdict().items()
            layer.transform = layer.transform._replace(**{n: x.to(k.device) for n, x in parts if x is not None})
        try:
            layer.pages = LayerPages(heads, head_dim, layer.format, self.page_size, dtype, k.device, layer.transform)
        except (TypeError, ValueError) as e:
            raise type(e)(f"KVCache: layer {layer.index}: {e}") from None
        key = (layer.pages.packs, window, k.device)
        if key not in self.groups:
            paging = Paging(k.shape[0], self.page_size, self.sink_tokens, self.recent_tokens, packs=key[0],
                            attended=window, device=k.device)  # fmt: skip
            self.groups[key] = Group(paging, step)
        layer.group = self.groups[key]

    def append(self, layer: Layer, step: Step, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        """Write k, v [B, Hkv, T, D] of the step; q [B, Hq, T, D] of the same tokens serves to calibrate the keys."""
        assert layer.pages is not None
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if not layer.calibrated:
            self._calibrate(layer, layer.pages, step, q, k)
        if step.order is not None:
            index = step.order[:, :, None, None].expand(k.shape)
            k, v = k.gather(1, index), v.gather(1, index)
        layer.pages.append(k, v, layer.group.plan)
        layer.columns += step.columns

    def past(self, layer: Layer, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the columns before a step that is not direct, [B, Hkv, start, D]; padding and what no
        query sees is zero. To be called before the layer's append."""
        assert layer.pages is not None
        slots = layer.group.past
        if self.tokens is not None:
            before = self.tokens[:, : step.start]
            token = (before.cumsum(1) - 1).clamp_(min=0)
            slots = [s.gather(1, token).where(before, -1) for s in slots]
        k, v = layer.pages.read(slots, dtype)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _calibrate(self, layer: Layer, pages: LayerPages, step: Step, q: Tensor | None, k: Tensor) -> None:
        """Centre and balance of the keys, once, before the first of them are packed: from all keys so far and the
        queries of the first steps."""
        heads = k.shape[2]
        if q is not None and layer.num_queries < MIN_CALIBRATION:
            queries = q.transpose(1, 2)
            queries = queries.flatten(0, 1) if step.tokens is None else queries[step.tokens]
            queries = queries[:: -(-len(queries) // MAX_CALIBRATION)].float()
            square = queries.unflatten(1, (heads, -1)).square().mean((0, 2))
            old, new = layer.num_queries, len(queries)
            layer.num_queries = old + new
            layer.square = square if layer.square is None else (layer.square * old + square * new) / (old + new)
        if not layer.group.plan.packs:
            return
        layer.calibrated = True
        paging = layer.group.paging
        before = paging.seq_lens - paging.seq_lens.new_tensor(step.counts)
        there = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if step.tokens is None else step.tokens
        keys = k[there & (before[:, None] + there.cumsum(1) > SINKS)].float()
        if step.start:
            stored = torch.stack(layer.group.past).amax(0) >= 0
            stored[:, :SINKS] = False
            keys = torch.cat([pages.read(layer.group.past, torch.float32)[0][stored], keys])
        keys = keys[:: max(-(-len(keys) // MAX_CALIBRATION), 1)]
        if len(keys) >= MIN_CALIBRATION:
            with lasting():
                typical = None if layer.square is None else layer.square.sqrt()[None]
                layer.transform = calibrate_keys(keys, typical, skip=0)
            pages.kv = pages.kv._replace(transform=layer.transform)
        else:
            warnings.warn(
                f"KVCache: keys of layer {layer.index} are packed after {len(keys)} tokens, too few to calibrate them "
                f"(at least {MIN_CALIBRATION}, without {SINKS} sinks); pass transforms, or more recent_tokens",
                stacklevel=2,
            )

    def fork(self, src: Sequence[int]) -> None:
        """Sequence i becomes what sequence src[i] is. No page is copied."""
        self._check_between_steps()
        for group in self.groups.values():
            group.paging.fork(src)
        if self.tokens is not None:
            self.tokens = self.tokens[torch.tensor(src, device=self.tokens.device)]
        self.batch = len(src)

    def crop(self, columns: int) -> None:
        """Take columns from the end of every sequence."""
        self._check_between_steps()
        if not 0 <= columns <= self.columns:
            raise ValueError(f"KVCache.crop: has {self.columns} tokens; {columns} cannot be taken back")
        counts = [columns] * self.batch
        if self.tokens is not None:
            counts = self.tokens[:, self.columns - columns :].sum(1).tolist()
        # Those that may refuse come first.
        for group in sorted(self.groups.values(), key=lambda group: group.paging.attended is None):
            num_pages, pairs = group.paging.crop(counts)
            for layer in self.layers.values():
                if layer.pages is not None and layer.group is group:
                    layer.pages.unpack(num_pages, pairs)
        self.columns -= columns
        if self.tokens is not None:
            self.tokens = self.tokens[:, : self.columns]
        for layer in self.layers.values():
            layer.columns = self.columns
        if not self.columns:  # another batch may follow
            self.reset()

    def _check_between_steps(self) -> None:
        behind = [x.index for x in self.layers.values() if x.columns != self.columns]
        if behind:
            raise ValueError(f"KVCache: layers {behind} lack tokens: a forward pass was broken off; call reset()")
