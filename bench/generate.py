"""A real model writes from a 2-bit cache: `python -m bench.generate`. Memory and time of a decode step beside
transformers' own caches, 16-bit DynamicCache and 2-bit QuantizedCache (where optimum-quanto is installed).

A prompt, this repository's documents and a question, is read once and fills all caches with the same keys and values.
The answer is written after the beginning of the documents (so small a model cannot tell what thousands of tokens say,
in 16 bits neither). Then steps of one token run in turn, at the whole context and at a short one. "grows by" is the
difference of the two, what the context costs; the rest of a step is the model itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import build, real_model, report
from bench.race import in_turn
from kvkernels.integrations.transformers import KVCache, attach

SHORT = 32  # tokens
TOLD = 1000  # tokens before the answer
QUESTION = "\n\nIn one or two sentences: what is the text above about?"


class Together(KVCache):
    """Reads a prompt for other caches too: what reaches it reaches them."""

    others: tuple[Any, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        for cache in self.others:
            cache.update(key_states, value_states, layer_idx)
        return super().update(key_states, value_states, layer_idx)


def prompt(tokenizer: Any, tokens: int) -> Tensor:
    """[1, tokens]: documents, cut to fit, and a question, as a message of a user."""
    files = [build.ROOT / "README.md", *sorted((build.ROOT / "docs").glob("*.md"))]
    text = tokenizer("\n\n".join(path.read_text() for path in files))["input_ids"]

    def message(content: str) -> Any:
        chat = [{"role": "user", "content": content}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]

    around = len(message(QUESTION))
    body = (text * (tokens // len(text) + 1))[: tokens - around]
    return torch.tensor([message(tokenizer.decode(body) + QUESTION)])


def nbytes(cache: Any) -> int:
    """Of what a cache of transformers holds; quantised tensors are asked for their parts."""

    def size(x: object) -> int:
        if not isinstance(x, Tensor):
            return 0
        if type(x) is Tensor:
            return x.nbytes
        inner: list[str] = x.__tensor_flatten__()[0]  # type: ignore[attr-defined]  # of tensor subclasses
        return sum(size(getattr(x, name)) for name in inner)

    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(size(getattr(layer, name, None)) for layer in cache.layers for name in names)


def read(model: Any, ids: Tensor, format: str) -> tuple[Tensor, dict[str, Any]]:
    """The token after a prompt [1, T], and caches that hold the prompt, ours first."""
    from transformers import DynamicCache, QuantizedCache

    ours = Together(format)
    caches = {f"kvkernels, {format}": ours, "DynamicCache, 16 bits": DynamicCache(config=model.config)}
    if importlib.util.find_spec("optimum") is not None:
        caches["QuantizedCache, quanto 2 bits"] = QuantizedCache("quanto", model.config, nbits=2)
    ours.others = tuple(cache for cache in caches.values() if cache is not ours)
    token = step(model, ids, ours)
    ours.others = ()
    return token, caches


@torch.no_grad()
def step(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """The most likely next token, [1, 1]."""
    token: Tensor = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    return token


def measure(model: Any, token: Tensor, short: dict[str, Any], long: dict[str, Any], threads: int, budget: float) -> str:
    """A table of steps with each cache on a number of threads."""
    torch.set_num_threads(threads)
    runs: dict[str, Callable[[], object]] = {}
    for name in long:
        runs[f"{name}, short"] = partial(step, model, token, short[name])
        runs[name] = partial(step, model, token, long[name])
    times = in_turn(runs, min_rounds=5, max_rounds=25, budget=budget)
    few = {name: times[f"{name}, short"] for name in long}
    differences = {name: sorted(b - a for a, b in zip(few[name], times[name], strict=True)) for name in long}
    grown = {name: median(d) for name, d in differences.items()}
    ours = next(iter(long))
    own, quarter = differences[ours], len(differences[ours]) // 4
    told = grown[ours] > (own[-1 - quarter] - own[quarter]) / 2  # apart from the noise: half the quartiles' distance
    body = []
    for name, cache in long.items():
        held = cache.nbytes if isinstance(cache, KVCache) else nbytes(cache)
        numbers = 2 * cache.get_seq_length() * model.config.num_hidden_layers * model.config.num_key_value_heads
        ratio = median(b / a for a, b in zip(times[ours], times[name], strict=True))
        body.append(
            [
                name,
                f"{held / 1e6:.1f} MB",
                f"{8 * held / numbers / model.config.head_dim:.2f}",
                report.duration(median(few[name])),
                report.duration(median(times[name])),
                f"{1 / median(times[name]):.1f}",
                f"{ratio:.2f}",
                report.duration(max(grown[name], 0.0)),
                f"{grown[name] / grown[ours]:.1f}" if told else "",
            ]
        )
    context = long[ours].get_seq_length()
    head = [
        "cache",
        "memory",
        "bits/element",
        f"step at {SHORT}",
        f"step at {context}",
        "tokens/s",
        "x ours",
        "grows by",
        "x ours",
    ]
    return f"threads: {threads}\n" + report.table(head, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=8000, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--format", default="m31/u2.e5m3", help="of the packed pages (%(default)s)")
    parser.add_argument("--new", type=int, default=48, help="tokens to write (%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing per number of threads (%(default)s)")
    args = parser.parse_args()
    began = time.perf_counter()
    torch.set_num_threads(max(args.threads))
    model, tokenizer = real_model.load()
    attach(model)
    print(f"{real_model.NAME}, {build.cpu_name()}")
    told = prompt(tokenizer, min(TOLD, args.context))
    token, caches = read(model, told, args.format)
    for name in list(caches)[:2]:
        ids = torch.cat([told, token], 1)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=caches[name],
                             max_new_tokens=args.new, do_sample=False)  # fmt: skip
        print(f"\n{name}:\n  {tokenizer.decode(out[0, told.shape[1] :], skip_special_tokens=True)}", flush=True)
    ids, start = prompt(tokenizer, args.context), time.perf_counter()
    token, caches = read(model, ids, args.format)
    print(f"\n{ids.shape[1]} tokens read in {time.perf_counter() - start:.0f} s\n", flush=True)
    _, short = read(model, ids[:, :SHORT], args.format)
    for threads in args.threads:
        print(measure(model, token, short, caches, threads, args.seconds), flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
