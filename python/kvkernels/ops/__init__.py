"""One module per op, and the folder is the list: a function of the module's name, and beside it

reference(...)   the same in plain PyTorch, float64 unless told: the definition, and the truth of the tests
cases()          sizes to test and measure; make(case, seed) -> (args, kwargs) builds the inputs
cost(case)       (bytes that must be read or written, floating-point operations)
DTYPES, FORMATS  what it takes (FORMATS: () for ops without pages); CUDA_DTYPES where CUDA takes fewer
IN_PLACE         keyword arguments it changes; the reference returns them, as they should be, after its result

and the fake kernel (torch.library.register_fake) that torch.compile needs.
"""

import importlib
import pkgutil
from types import ModuleType

from kvkernels import _library  # noqa: F401  the ops must be registered before a module binds them


def _discover() -> dict[str, ModuleType]:
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


OPS: dict[str, ModuleType] = _discover()
