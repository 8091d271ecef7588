"""The delta rule in Hugging Face transformers: Qwen3-Next, Qwen3.5, Olmo Hybrid, Kimi Linear and models like them.

    import kvkernels as kk
    kk.compat.transformers.patch()
    model = AutoModelForCausalLM.from_pretrained(...)   # before or after, on CPU or CUDA

Those models call module-level functions, whose plain-PyTorch versions are used where flash-linear-attention is not
installed. patch() puts kvkernels in their place: prompts and training go through the chunked kernels, gradients
included, cached tokens through the recurrent one. Packed sequences (cu_seq_lens_q) are kept apart. Nothing falls back:
what the kernels do not take (head dims above 256) is a ValueError.

Tested with transformers 5.23.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvkernels.ops.delta_rule import delta_rule


def _replacement(original: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """With the parameters that transformers' own versions have; what models pass beyond them is not read, as there."""
    names = list(inspect.signature(original).parameters)

    def gated_delta_rule(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        given = dict(zip(names, args), **kwargs)
        initial_state = given.get("initial_state")
        # Models hand over slices of a convolution's output, whose channels lie T apart.
        q, k, v, g = (
            x if x.stride(-1) == 1 else x.contiguous() for x in (given[n] for n in ("query", "key", "value", "g"))
        )
        if not q.dtype == k.dtype == v.dtype or q.dtype == torch.float64:
            q, k, v = q.float(), k.float(), v.float()
        beta, g = (x.float() if x.dtype == torch.float64 else x for x in (given["beta"], g))
        result: Any = delta_rule(
            q, k, v, beta, g,
            initial_state=None if initial_state is None else initial_state.float().contiguous(),
            output_final_state=bool(given.get("output_final_state", False)), cu_seqlens=given.get("cu_seqlens"),
            qk_l2norm=bool(given.get("use_qk_l2norm_in_kernel", False)), mode=mode,
        )  # fmt: skip
        o, state = result if isinstance(result, tuple) else (result, None)
        return o.to(given["query"].dtype), state

    return gated_delta_rule


_MODES = {
    "torch_chunk_gated_delta_rule": "chunk",
    "torch_recurrent_gated_delta_rule": "recurrent",
    "chunk_kimi_delta_attention": "chunk",
    "recurrent_kimi_delta_attention": "recurrent",
}
_DEFINITION = re.compile(rf"^def ({'|'.join(_MODES)})\(", re.MULTILINE)
_originals: dict[tuple[str, str], Callable[..., Any]] = {}


def patch(*models: str) -> list[str]:
    """Replace the delta rule of these models ("qwen3_next", ...), of all that have one unless told.

    Returns the names of what was replaced. Doing it again changes nothing. ValueError: a model that has no delta rule.
    """
    import transformers.models

    done = []
    for model in models or _with_a_delta_rule(Path(transformers.models.__path__[0])):
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
        found = [name for name in _MODES if hasattr(module, name)]
        if not found:
            raise ValueError(f"patch: transformers.models.{model} has none of {', '.join(_MODES)}")
        for name in found:
            key = module.__name__, name
            if key not in _originals:
                _originals[key] = getattr(module, name)
                setattr(module, name, _replacement(_originals[key], _MODES[name]))
            done.append(".".join(key))
    return done


def unpatch() -> None:
    """Put back what patch replaced."""
    while _originals:
        (module, name), original = _originals.popitem()
        setattr(importlib.import_module(module), name, original)


def _with_a_delta_rule(models: Path) -> list[str]:
    """Found in the text: importing every model of transformers would take minutes."""
    found = []
    for info in pkgutil.iter_modules([str(models)]):
        source = models / info.name / f"modeling_{info.name}.py"
        if source.exists() and _DEFINITION.search(source.read_text("utf-8")):
            found.append(info.name)
    return found
