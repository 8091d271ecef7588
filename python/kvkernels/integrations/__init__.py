"""kvkernels inside other libraries.

kk.integrations.transformers   a KV cache for the models of Hugging Face transformers, and their attention on it
"""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Imported when asked for: it needs the library it is for.
    if name == "transformers":
        return importlib.import_module("kvkernels.integrations.transformers")
    raise AttributeError(f"module 'kvkernels.integrations' has no attribute {name!r}")
