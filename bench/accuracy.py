"""What a packed cache costs a real language model: `python -m bench.accuracy [--results]`.

Perplexity of SmolLM2-135M on three texts. The first tokens of a chunk are prefilled in 16 bits and their keys and
values packed; the rest is teacher-forced in blocks: the newest block stays in 16 bits, everything older is read from
the packed cache, four sinks in 16 bits apart. The kernels are in the loop: what the model sees went through pack_pages
and quant_attention. Every row is paired with 16 bits chunk by chunk.

--greedy and --passkey measure agreement with 16 bits on generated tokens and retrieval of a number from a long text.
What was measured is kept in build/, and measured again when a format's kernels give other bits.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kvkernels as kk
from bench import build, corpus, real_model, report
from bench.caches import BACKENDS, Cache, Model, Pages, PagesRead, Recoded, Rows, Transformers
from bench.recipes import SIMULATED

SINKS, PREFILL, FORCED, BLOCK = 4, 1024, 1024, 128
CHUNK = SINKS + PREFILL + FORCED + 1  # the last token is only predicted
CHUNKS_PER_TEXT = 12
CALIBRATION_CHUNKS = 4
GENERATED = 256
PASSKEY_TOKENS, PASSKEYS = 4096, 12
CONTEXT = 2048  # at which bits in all are given
SLOW_CHUNKS = 6  # of HQQ's cache, which takes minutes for one
RESULTS = build.ROOT / "bench" / "results" / "accuracy.md"
KEPT = build.ROOT / "build" / "accuracy"


class Recipe(NamedTuple):
    """A row of the table."""

    format: str
    calibrated: str = ""  # the basis of the keys: "text", on another text; "prompt", on the chunk's own first tokens
    page_size: int = 64
    read: bool = False  # through read_kv and torch's attention
    backend: str = ""  # of transformers' QuantizedCache; format is then bits and axis

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
        return self.format + notes + (", read_kv and torch" if self.read else "")


BASE = Recipe("")


def recipes() -> list[Recipe]:
    """All others are compared with the first."""
    installed = [b for b, (_, needs) in BACKENDS.items() if importlib.util.find_spec(needs.split(".")[0])]
    return [
        BASE,
        *(Recipe(name) for name in ("bf16", "f16")),
        *(Recipe("kivi2", page_size=size) for size in (32, 64, 128)),
        *(Recipe(name) for name in SIMULATED),
        *(Recipe(name, "text") for name in ("u8", "u4", "u4/u2", "u3", "u3/u2", "u2")),
        *(Recipe(name, "prompt") for name in ("u3/u2", "u2")),
        *(Recipe(name) for name in ("u4", "u3/u2", "u2")),
        Recipe("u2", "text", read=True),
        *(Recipe(f"{bits} bits, axis {axis}", backend="quanto") for bits in (4, 2) for axis in (0, -1)
          if "quanto" in installed),
        *(Recipe(f"{bits} bits, axis 1", backend="hqq") for bits in (4, 2) if "hqq" in installed),
    ]  # fmt: skip


class Found(NamedTuple):
    recipe: Recipe
    bits: tuple[float, float, float]  # of K, of V, in all
    nll: list[float]  # per chunk
    base: list[float]  # of the same chunks in 16 bits

    @property
    def worse(self) -> float:
        """Relative increase of the perplexity."""
        return math.expm1(statistics.fmean(a - b for a, b in zip(self.nll, self.base, strict=True)))

    @property
    def error(self) -> float:
        """Standard error of `worse`: the spread of the differences over the chunks."""
        differences = [a - b for a, b in zip(self.nll, self.base, strict=True)]
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
        self._text: Transforms = ()

    def chunks(self) -> list[tuple[str, Tensor]]:
        """Names and token ids. The texts take turns, and neighbours in a text are far apart in the list."""
        order = [5 * i % CHUNKS_PER_TEXT for i in range(CHUNKS_PER_TEXT)]
        texts = [corpus.chunks(self.tokenizer, source, CHUNKS_PER_TEXT, CHUNK) for source in corpus.SOURCES]
        return [(f"{s.name} {i}", text[i]) for i in order for s, text in zip(corpus.SOURCES, texts, strict=True)]

    def transforms(self, recipe: Recipe, prompt: list[Rows]) -> Transforms:
        if recipe.calibrated == "prompt":
            return calibrate([prompt])
        if recipe.calibrated == "text":
            if not self._text:
                texts = corpus.chunks(self.tokenizer, corpus.CALIBRATION, CALIBRATION_CHUNKS, CHUNK)
                self._text = calibrate([self.model.prefill(ids)[0] for ids in texts])
            return self._text
        return [None] * len(prompt)

    def caches(self, recipe: Recipe, prompt: list[Rows], max_tokens: int) -> list[Cache]:
        """What a prompt left in 16 bits, as the recipe stores it."""
        transforms = self.transforms(recipe, prompt)
        return [self.cache(recipe, rows, t, max_tokens) for rows, t in zip(prompt, transforms, strict=True)]

    def cache(self, recipe: Recipe, rows: Rows, transform: kk.KVTransform | None, max_tokens: int) -> Cache:
        """Of one layer."""
        if recipe == BASE:
            return rows.copy()
        if recipe.backend:
            bits, axis = recipe.format.split(" bits, axis ")
            return Transformers(rows.k, rows.v, recipe.backend, int(bits), int(axis), BLOCK)
        sizes = recipe.page_size, SINKS, BLOCK, max_tokens
        if recipe.format in SIMULATED:
            sides = SIMULATED[recipe.format]
            keys, values = (side.make(self.model.kv_heads, recipe.page_size, self.model.rope) for side in sides)
            return Recoded(rows.k, rows.v, lambda k, v, position: (keys(k, position), values(v, position)), *sizes)
        kind = PagesRead if recipe.read else Pages
        return kind(rows.k, rows.v, recipe.format, *sizes, transform)

    def forced(self, recipe: Recipe, ids: Tensor, prompt: list[Rows], begin: int) -> Tensor:
        """Logits [N, vocabulary] of ids[begin:], when `prompt` holds the tokens before."""
        with self.model.using(self.caches(recipe, prompt, len(ids))):
            logits = [self.model.forward(ids[i : i + BLOCK], i) for i in range(begin, len(ids), BLOCK)]
        return torch.cat(logits)

    def nll(self, recipe: Recipe, ids: Tensor, prompt: list[Rows]) -> float:
        """Mean negative log-likelihood of the chunk's forced tokens."""
        logits = self.forced(recipe, ids[:-1], prompt, SINKS + PREFILL)
        return (
            sum(
                F.cross_entropy(part.float(), wanted, reduction="sum").item()
                for part, wanted in zip(logits.split(BLOCK), ids[SINKS + PREFILL + 1 :].split(BLOCK), strict=True)
            )
            / FORCED
        )

    def bits(self, recipe: Recipe) -> tuple[float, float, float]:
        """Per element of K, of V, and of both at CONTEXT tokens with sinks and padding. Transformers: of its prompt."""
        dim = self.model.head_dim
        if recipe == BASE:
            return 16.0, 16.0, 16.0
        if recipe.backend:
            cache = self.cache(recipe, self.random_prompt(PREFILL), None, PREFILL)
            assert isinstance(cache, Transformers)
            return (cache.bits,) * 3
        size, sink_share = recipe.page_size, SINKS / CONTEXT
        if recipe.format in SIMULATED:
            of_k, of_v = (side.bits(dim, size) for side in SIMULATED[recipe.format])
            return of_k, of_v, 16 * sink_share + (of_k + of_v) / 2 * (1 - sink_share)
        fmt = kk.format(recipe.format)
        of_k = 8 * fmt.v_offset(size, dim) / (size * dim)
        of_v = 8 * fmt.data_bytes(size, dim) / (size * dim) - of_k
        return of_k, of_v, 16 * sink_share + fmt.bits_per_element(size, dim) * (1 - sink_share)

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
        prompt = self.random_prompt(SINKS + 3 * BLOCK)
        transform = calibrate([[prompt]])[0] if recipe.calibrated else None
        cache = self.cache(recipe, prompt, transform, 4 * BLOCK)
        out = cache.attend(*(x[:BLOCK] for x in (prompt.q, prompt.k, prompt.v)))
        return hashlib.sha256(out.float().numpy().tobytes()).hexdigest()[:16]

    def perplexity(self, wanted: list[Recipe], count: int, kept: Path) -> list[Found]:
        """All recipes chunk by chunk, so that a run that was cut off has pairs."""
        store: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
        done = {r: store.setdefault(f"{r.title} | {self.fingerprint(r)}", {}) for r in wanted}
        chunks = self.chunks()[:count]
        for i, (name, ids) in enumerate(chunks):
            missing = [r for r in wanted if name not in done[r] and (r.backend != "hqq" or i < SLOW_CHUNKS)]
            if not missing:
                continue
            prompt, _ = self.model.prefill(ids[: SINKS + PREFILL])
            for recipe in missing:
                nll = done[recipe][name] = self.nll(recipe, ids, prompt)
                worse = 100 * math.expm1(nll - done[BASE][name])
                print(f"{name:12} {recipe.title:40} {math.exp(nll):8.3f} {worse:+8.2f} %", flush=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(store, indent=1))
            part.rename(kept)
        found = []
        for recipe in wanted:
            names = [name for name, _ in chunks if name in done[recipe]]
            of_chunks = [[done[r][name] for name in names] for r in (recipe, BASE)]
            found.append(Found(recipe, self.bits(recipe), *of_chunks))
        return found

    def greedy(self, wanted: list[Recipe], count: int) -> list[tuple[Recipe, int, int]]:
        """Of the tokens that 16 bits generate, how many are the likeliest after the same tokens; and of how many."""
        agreed = dict.fromkeys(wanted, 0)
        for _, ids in self.chunks()[:count]:
            prompt, logits = self.model.prefill(ids[: SINKS + PREFILL])
            new = [int(logits.argmax())]
            with self.model.using(self.caches(BASE, prompt, CHUNK)):
                while len(new) <= GENERATED:
                    start = SINKS + PREFILL + len(new) - 1
                    new.append(int(self.model.forward(torch.tensor(new[-1:]), start)[-1].argmax()))
            text = torch.cat([ids[: SINKS + PREFILL], torch.tensor(new)])
            for recipe in wanted:
                logits = self.forced(recipe, text[:-1], prompt, SINKS + PREFILL)
                agreed[recipe] += int((logits.argmax(-1) == text[SINKS + PREFILL + 1 :]).sum())
        return [(recipe, n, GENERATED * count) for recipe, n in agreed.items()]

    def passkey(self, wanted: list[Recipe], count: int) -> list[tuple[Recipe, int, int]]:
        """How many numbers, told somewhere in a text of PASSKEY_TOKENS, are given back to the last digit."""
        gen = torch.Generator().manual_seed(0)
        right = dict.fromkeys(wanted, 0)

        def tokens(text: str) -> Tensor:
            return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)

        texts = corpus.chunks(self.tokenizer, corpus.SOURCES[0], count, PASSKEY_TOKENS)
        for i, text in enumerate(texts):
            key = tokens(str(int(torch.randint(10_000, 100_000, (), generator=gen))))
            told = torch.cat([tokens("\n\nThe pass key is "), key, tokens(". Remember it.\n\n")])
            asked = tokens("\n\nWhat is the pass key? The pass key is ")
            place = int(len(text) * (i + 0.5) / count)
            before = torch.cat([text[:place], told, text[place:]])[: PASSKEY_TOKENS - len(asked) - len(key)]
            prompt, _ = self.model.prefill(before)
            whole = torch.cat([before, asked, key])
            for recipe in wanted:
                logits = self.forced(recipe, whole[:-1], prompt, len(before))
                right[recipe] += torch.equal(logits[-len(key) :].argmax(-1), key)
        return [(recipe, n, count) for recipe, n in right.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", help="only these formats, such as u2 or u3/u2")
    parser.add_argument("--model", help="a folder with another model; see bench/real_model.py")
    parser.add_argument("--chunks", type=int, default=3 * CHUNKS_PER_TEXT)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    wanted = [r for r in recipes() if not args.formats or r == BASE or r.format in args.formats]
    name = real_model.NAME if args.model is None else Path(args.model).name
    with torch.inference_mode():
        bench = Bench(args.model)
        found = bench.perplexity(wanted, args.chunks, KEPT / f"{name}.json")
    print(table(found))


def table(found: list[Found]) -> str:
    body = [
        [
            f.recipe.title,
            *(f"{b:.3f}" for b in f.bits),
            f"{math.exp(statistics.fmean(f.nll)):.3f}",
            f"{100 * f.worse:+.2f} %",
            f"{100 * f.error:.2f} %",
            str(len(f.nll)),
        ]
        for f in found
    ]
    return report.table(["cache", "K bits", "V bits", "in all", "perplexity", "over 16 bits", "+-", "chunks"], body)


if __name__ == "__main__":
    main()
