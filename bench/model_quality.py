"""Measurements on a real model with a packed cache: perplexity, agreement on generated tokens, retrieval.

A chunk's first tokens are prefilled in 16 bits and their keys and values packed; the rest is teacher-forced in blocks:
the newest block stays in 16 bits, everything older is read from the packed cache, four sinks in 16 bits apart.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kvkernels as kk
from bench import corpus, real_model
from bench.caches import BACKENDS, Cache, Model, Pages, PagesRead, Recoded, Rows, Transformers
from bench.recipes import SIMULATED

SINKS, PREFILL, FORCED, BLOCK = 4, 1024, 1024, 128
CHUNK = SINKS + PREFILL + FORCED + 1  # the last token is only predicted
CHUNKS_PER_TEXT = 12
SPREAD = [5 * i % 12 for i in range(12)]  # an order of 12 in which neighbours are far apart
CALIBRATION_CHUNKS = 4
GENERATED = 256
PASSKEY_TOKENS, PASSKEYS = 4096, 12
CONTEXT = 2048  # at which bits in all are given
FEW_ITEMS = 3  # what a row needs to be shown, and all that HQQ's cache gets: it takes minutes for one


class Recipe(NamedTuple):
    """A row of the table."""

    format: str
    calibrated: str = ""  # the basis of the keys: "text", on another text; "prompt", on the chunk's own first tokens
    page_size: int = 64
    read: bool = False  # through read_kv and torch's attention
    before_rope: bool = False  # keys are stored so, and RoPE applied to what was read
    backend: str = ""  # of transformers' QuantizedCache; format is then bits and axis
    first: str = ""  # the format of the first quarter of the layers, if another

    @property
    def title(self) -> str:
        notes = {"text": "", "prompt": ", calibrated on the prompt", "": ", not calibrated"}[self.calibrated]
        if self.backend:
            return f"transformers {self.backend}, {self.format}"
        if self.format in SIMULATED:
            return f"{self.format}, simulated"
        if self == BASE:
            return "16 bits, torch"
        if not kk.format(self.format).rotated_k:
            notes = f", pages of {self.page_size}" if kk.format(self.format).whole_pages else ""
        if self.first:
            notes = f", {self.first} in the first quarter of the layers{notes}"
        notes += ", before RoPE" if self.before_rope else ""
        return self.format + notes + (", read_kv and torch" if self.read else "")

    def of_layer(self, layer: int, layers: int) -> Recipe:
        return self._replace(format=self.first if self.first and layer < layers // 4 else self.format, first="")


BASE = Recipe("")


# keys and values of every row whose keys are calibrated on another text
TEXT = (
    *("u8", "u4", "u3", "u2", "u4/u2", "u3/u2", "u2.e5m3"),
    *(f"{k}/{v}.e5m3" for k in ("m42", "m31", "m21") for v in ("u2", "t1", "b1")),
    *("m31/t1", "u3/t1.e5m3", "u2/t1.e5m3", "u2/b1.e5m3", "t1.e5m3"),
)


# what the slower measurements have of it
SHORT_TEXT = ("u4", "u3/u2", "u2", *(f"{k}/{v}.e5m3" for k in ("m42", "m31") for v in ("u2", "t1", "b1")))


def recipes() -> list[Recipe]:
    """All others are compared with the first."""
    installed = [b for b, (_, needs) in BACKENDS.items() if importlib.util.find_spec(needs.split(".")[0])]
    return [
        BASE,
        Recipe("bf16"),
        *(Recipe("kivi2", page_size=size) for size in (32, 64, 128)),
        *(Recipe(name) for name in SIMULATED),
        *(Recipe(name, "text") for name in TEXT),
        *(Recipe("m31/b1.e5m3", "text", first=name) for name in ("m31/t1.e5m3", "m42/t1.e5m3")),
        *(Recipe(name, "prompt") for name in ("u2", "m31/u2.e5m3", "m31/t1.e5m3")),
        *(Recipe(name) for name in ("u4", "u3/u2", "u2", "m31/u2.e5m3")),
        Recipe("u2", "text", read=True),
        *(Recipe(name, "text", read=True, before_rope=True) for name in ("u2", "m31/u2.e5m3", "m31/t1.e5m3")),
        *(Recipe(f"{bits} bits, axis {axis}", backend="quanto") for bits in (4, 2) for axis in (0, -1)
          if "quanto" in installed),
        *(Recipe(f"{bits} bits, axis 1", backend="hqq") for bits in (4, 2) if "hqq" in installed),
    ]  # fmt: skip


def short_list() -> list[Recipe]:
    """For the slower measurements."""
    return [
        BASE,
        Recipe("kivi2", page_size=32),
        *(r for r in recipes() if r.calibrated == "text" and r.format in SHORT_TEXT and not r.first and not r.read),
        *(r for r in recipes() if r.backend == "quanto"),
    ]


class Found(NamedTuple):
    recipe: Recipe
    bits: tuple[float, float, float]  # of K, of V, in all
    wider: float | None  # bits of pages of heads of dim 128, where known
    values: list[float]  # per item that was measured
    base: list[float]  # of the same items in 16 bits

    @property
    def page_bits(self) -> float:
        return (self.bits[0] + self.bits[1]) / 2

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def worse(self) -> float:
        """Relative increase of the perplexity, where values are log-likelihoods."""
        return math.expm1(statistics.fmean(a - b for a, b in zip(self.values, self.base, strict=True)))

    @property
    def error(self) -> float:
        """Standard error of `worse`, from the spread of the differences."""
        differences = [a - b for a, b in zip(self.values, self.base, strict=True)]
        return statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.nan


Transforms = Sequence[kk.KVTransform | None]


def calibrate(texts: Sequence[list[Rows]]) -> list[kk.KVTransform]:
    """Of each layer, from what texts left in 16 bits."""
    return [
        kk.calibrate_keys(torch.stack([rows.k for rows in layer]), torch.stack([rows.q for rows in layer]))
        for layer in zip(*texts, strict=True)
    ]


class Bench:
    def __init__(self, folder: str | None) -> None:
        model, self.tokenizer = real_model.load(folder)
        self.model = Model(model)
        self._text: dict[bool, Transforms] = {}  # whether before RoPE

    def chunks(self, count: int) -> list[tuple[str, Tensor]]:
        """Names and token ids. The texts take turns, and neighbours in a text are far apart in the list."""
        texts = [corpus.chunks(self.tokenizer, source, CHUNKS_PER_TEXT, CHUNK) for source in corpus.SOURCES]
        named = [(f"{s.name} {i}", text[i]) for i in SPREAD for s, text in zip(corpus.SOURCES, texts, strict=True)]
        return named[:count]

    def transforms(self, recipe: Recipe, prompt: list[Rows]) -> Transforms:
        if recipe.calibrated == "prompt":
            return calibrate([prompt])
        if recipe.calibrated == "text":
            if recipe.before_rope not in self._text:
                texts = corpus.chunks(self.tokenizer, corpus.CALIBRATION, CALIBRATION_CHUNKS, CHUNK)
                rows = [self.model.prefill(ids)[0] for ids in texts]
                if recipe.before_rope:
                    rows = [[layer.turned_back(self.model.rope) for layer in text] for text in rows]
                self._text[recipe.before_rope] = calibrate(rows)
            return self._text[recipe.before_rope]
        return [None] * len(prompt)

    def caches(self, recipe: Recipe, prompt: list[Rows], max_tokens: int) -> list[Cache]:
        """What a prompt left in 16 bits, as the recipe stores it."""
        transforms = self.transforms(recipe, prompt)
        return [
            self.cache(recipe.of_layer(i, len(prompt)), rows, t, max_tokens)
            for i, (rows, t) in enumerate(zip(prompt, transforms, strict=True))
        ]

    def cache(self, recipe: Recipe, rows: Rows, transform: kk.KVTransform | None, max_tokens: int) -> Cache:
        """Of one layer."""
        if recipe == BASE:
            return rows.copy()
        if recipe.backend:
            bits, axis = recipe.format.split(" bits, axis ")
            return Transformers(rows.k, rows.v, recipe.backend, int(bits), int(axis), SINKS, BLOCK)
        sizes = recipe.page_size, SINKS, BLOCK, max_tokens
        if recipe.format in SIMULATED:
            sides = SIMULATED[recipe.format]
            keys, values = (side.make(self.model.kv_heads, recipe.page_size, self.model.rope) for side in sides)
            return Recoded(rows.k, rows.v, lambda k, v, position: (keys(k, position), values(v, position)), *sizes)
        if not recipe.read:
            return Pages(rows.k, rows.v, recipe.format, *sizes, transform)
        rope = self.model.rope if recipe.before_rope else None
        return PagesRead(rows.k, rows.v, recipe.format, *sizes, transform, rope=rope)

    def forced(self, recipe: Recipe, ids: Tensor, prompt: list[Rows], begin: int) -> Tensor:
        """Logits [N, vocabulary] of ids[begin:], when `prompt` holds the tokens before."""
        with self.model.using(self.caches(recipe, prompt, len(ids))):
            logits = [self.model.forward(ids[i : i + BLOCK], i) for i in range(begin, len(ids), BLOCK)]
        return torch.cat(logits)

    def bits(self, recipe: Recipe) -> tuple[float, float, float]:
        """Per element of K, of V, and of both at CONTEXT tokens, the sinks counted."""
        if recipe.backend:
            cache = self.cache(recipe, self.random_prompt(SINKS + PREFILL), None, PREFILL)
            assert isinstance(cache, Transformers)
            of_k = of_v = cache.bits
        else:
            of_k, of_v = self.side_bits(recipe, self.model.head_dim)
        return of_k, of_v, (of_k + of_v) / 2 * (1 - SINKS / CONTEXT) + 16 * SINKS / CONTEXT

    def side_bits(self, recipe: Recipe, head_dim: int) -> tuple[float, float]:
        """Per element of K and of V in pages of such heads, metadata counted, padding as part of V."""
        if recipe == BASE:
            return 16.0, 16.0
        if recipe.first:
            layers = self.model.layers
            each = [self.side_bits(recipe.of_layer(i, layers), head_dim) for i in range(layers)]
            return statistics.fmean(k for k, _ in each), statistics.fmean(v for _, v in each)
        size = recipe.page_size
        if recipe.format in SIMULATED:
            keys, values = SIMULATED[recipe.format]
            return keys.bits(head_dim, size), values.bits(head_dim, size)
        fmt = kk.format(recipe.format)
        of_k = 8 * fmt.v_offset(size, head_dim) / (size * head_dim)
        return of_k, 2 * fmt.bits_per_element(size, head_dim) - of_k

    def random_prompt(self, tokens: int) -> Rows:
        gen, rows = torch.Generator().manual_seed(0), Rows()
        rows.q, rows.k, rows.v = (
            torch.randn(tokens, heads, self.model.head_dim, generator=gen).bfloat16()
            for heads in (self.model.heads, self.model.kv_heads, self.model.kv_heads)
        )
        return rows

    def fingerprint(self, recipe: Recipe) -> str:
        """Of the bits that the recipe's kernels give; of what others give, their versions."""
        if recipe == BASE or recipe.backend:
            import transformers

            return f"torch {torch.__version__}, transformers {transformers.__version__}"
        if recipe.first:
            return " ".join(self.fingerprint(recipe.of_layer(i, 4)) for i in range(2))  # one of the first quarter
        prompt = self.random_prompt(SINKS + 3 * BLOCK)
        transform = calibrate([[prompt]])[0] if recipe.calibrated else None
        cache = self.cache(recipe, prompt, transform, 4 * BLOCK)
        out = cache.attend(*(x[:BLOCK] for x in (prompt.q, prompt.k, prompt.v)))
        return hashlib.sha256(out.float().numpy().tobytes()).hexdigest()[:16]

    def measure(self, what: Measurement, wanted: list[Recipe], count: int, kept: Path, new: bool) -> list[Found]:
        """All recipes item by item, so that a run that was cut off has pairs. new: measure what is not kept."""
        store: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
        done = {r: store.setdefault(f"{what.name} | {r.title} | {self.fingerprint(r)}", {}) for r in wanted}
        items = what.items(self, count)
        for i, (name, ids) in enumerate(items):
            missing = [r for r in wanted if name not in done[r] and (r.backend != "hqq" or i < FEW_ITEMS)]
            if not missing or not new:
                continue
            for recipe, value in what.run(self, ids, missing):
                done[recipe][name] = value
                print(f"{what.name}, {name:12} {recipe.title:45} {value:8.4f}", flush=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(store, indent=1))
            part.rename(kept)
        found = []
        for recipe in wanted:
            names = [name for name, _ in items if name in done[recipe]]
            if len(names) < min(count, FEW_ITEMS) or not names:
                continue
            values, base = ([done[r][name] for name in names] for r in (recipe, wanted[0]))
            wider = None if recipe.backend else statistics.fmean(self.side_bits(recipe, 128))
            found.append(Found(recipe, self.bits(recipe), wider, values, base))
        return found


Items = list[tuple[str, Tensor]]
Values = Iterator[tuple[Recipe, float]]


def likelihoods(bench: Bench, ids: Tensor, wanted: list[Recipe]) -> Values:
    """Mean negative log-likelihood of a chunk's forced tokens."""
    begin = SINKS + PREFILL
    prompt, _ = bench.model.prefill(ids[:begin])
    for recipe in wanted:
        logits = bench.forced(recipe, ids[:-1], prompt, begin)
        pairs = zip(logits.split(BLOCK), ids[begin + 1 :].split(BLOCK), strict=True)
        total = sum(F.cross_entropy(some.float(), right, reduction="sum").item() for some, right in pairs)
        yield recipe, total / FORCED


def agreement(bench: Bench, ids: Tensor, wanted: list[Recipe]) -> Values:
    """Share of the tokens generated with 16 bits that are also the likeliest with the recipe, given those before."""
    begin = SINKS + PREFILL
    prompt, logits = bench.model.prefill(ids[:begin])
    new = [int(logits.argmax())]
    with bench.model.using(bench.caches(BASE, prompt, CHUNK)):
        while len(new) <= GENERATED:
            logits = bench.model.forward(torch.tensor(new[-1:]), begin + len(new) - 1)
            new.append(int(logits[-1].argmax()))
    text = torch.cat([ids[:begin], torch.tensor(new)])
    for recipe in wanted:
        logits = bench.forced(recipe, text[:-1], prompt, begin)
        yield recipe, (logits.argmax(-1) == text[begin + 1 :]).float().mean().item()


def retrieval(bench: Bench, ids: Tensor, wanted: list[Recipe]) -> Values:
    """Whether a number told in a long text is given back to the last digit: 1 or 0. ids: the text, then the number."""

    def tokens(text: str) -> Tensor:
        return torch.tensor(bench.tokenizer(text, add_special_tokens=False).input_ids)

    text, (number, place) = ids[:-2], ids[-2:].tolist()
    key = tokens(str(number))
    task = tokens("There is an important pass key hidden in the text below. Find it and remember it.\n\n")
    told = [tokens("\n\nThe pass key is "), key, tokens(". Remember it. "), key, tokens(" is the pass key.\n\n")]
    asked = tokens("\n\nWhat is the pass key? The pass key is ")
    before = torch.cat([task, text[:place], *told, text[place:]])[: SINKS + PASSKEY_TOKENS]
    prompt, _ = bench.model.prefill(before)
    whole = torch.cat([before, asked, key])
    for recipe in wanted:
        logits = bench.forced(recipe, whole[:-1], prompt, len(before))
        yield recipe, float(torch.equal(logits[-len(key) :].argmax(-1), key))


def passkeys(bench: Bench, count: int) -> Items:
    """Texts, each with a number to be told and the place where, spread over the length of the text."""
    gen = torch.Generator().manual_seed(0)
    numbers = torch.randint(10_000, 100_000, (PASSKEYS,), generator=gen)
    texts = corpus.chunks(bench.tokenizer, corpus.SOURCES[0], PASSKEYS, PASSKEY_TOKENS)
    places = [int(PASSKEY_TOKENS * (i + 0.5) / PASSKEYS) for i in range(PASSKEYS)]
    items = [
        (f"at {place}", torch.cat([text, torch.tensor([int(number), place])]))
        for text, number, place in zip(texts, numbers, places, strict=True)
    ]
    return [items[i] for i in SPREAD][:count]


class Measurement(NamedTuple):
    name: str
    items: Callable[[Bench, int], Items]
    run: Callable[[Bench, Tensor, list[Recipe]], Values]


PERPLEXITY = Measurement("perplexity", Bench.chunks, likelihoods)
GREEDY = Measurement("greedy", Bench.chunks, agreement)
PASSKEY = Measurement("passkey", passkeys, retrieval)
