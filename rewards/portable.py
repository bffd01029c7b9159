"""Functions that travel to another process by name: (module, qualified name), or (file, name) for a reward file.

What cannot travel (lambdas, functions inside functions, functions of the script that runs) is refused with the remedy,
in the process that sends, before anything runs. This file runs nothing in another process: pool.py does.

Usage: `pickle.loads(pack(function))` gives the function in any process that has the same modules and files.
"""

import hashlib
import importlib
import importlib.util
import io
import pickle
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

_FILE_MODULE = "reward_file_"
_REMEDY = "define it with `def` at the top level of an importable module or of a file loaded as file.py:function"


def import_file(path: Path) -> ModuleType:
    """Run a file as a module named after its path and content, so that equal file names in two folders do not meet."""
    module = _new_module(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    try:
        assert module.__spec__ and module.__spec__.loader
        module.__spec__.loader.exec_module(module)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _new_module(path: Path) -> ModuleType:
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(_FILE_MODULE + digest, path)
    assert spec, f"no loader for {path}"
    return importlib.util.module_from_spec(spec)


def pack(thing: object) -> bytes:
    """Pickle `thing`, functions and classes within by name. Raises ValueError where a part of it cannot travel."""
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"{thing!r:.200} cannot be sent to a worker process: {error}; {_REMEDY}") from None
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    """Names functions instead of comparing them with what the module holds under that name: `@reward` changes that."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType) and obj is not _resolve:
            return _resolve, _address(obj)
        if isinstance(obj, type) and obj.__module__.startswith(_FILE_MODULE):
            return _resolve, _address(obj)
        return NotImplemented


def _address(thing: FunctionType | type) -> tuple[str, str, str | None]:
    """(module, qualified name, file where the module is a reward file)."""
    module_name, name = thing.__module__, thing.__qualname__
    if "<" in name:
        kind = "a lambda" if name.endswith("<lambda>") else "defined inside a function"
        raise ValueError(f"{name} of {module_name} is {kind} and cannot be sent to a worker process; {_REMEDY}")
    module = sys.modules.get(module_name)
    if module is None or module_name == "__main__":
        where = "the script that runs" if module_name == "__main__" else f"{module_name}, which is not loaded"
        raise ValueError(f"{name} belongs to {where} and cannot be sent to a worker process; {_REMEDY}")
    return module_name, name, module.__file__ if module_name.startswith(_FILE_MODULE) else None


def _resolve(module_name: str, name: str, file: str | None) -> Any:
    """Find a function by its address, in the process that receives it."""
    module = sys.modules.get(module_name)
    if module is None and file is None:
        module = importlib.import_module(module_name)
    elif module is None:
        assert file is not None
        if _new_module(Path(file)).__name__ != module_name:  # the name holds the content's digest
            raise ValueError(f"{file} has changed since the run loaded it; restore it, or start the run again")
        module = import_file(Path(file))
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found
