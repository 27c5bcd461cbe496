"""Patterns of a user's own, from a Python file outside the package."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path

from .registry import available_patterns, forget_patterns, pattern_class


def load_plugin(path: str | Path) -> list[str]:
    """Import a file that registers patterns, once, and return their names.

    The file is any Python module with ``@hf_sparse.register_pattern("mine")`` on its pattern classes. Loading it again,
    or after its module was imported in another way, changes nothing.

    Raises:
        ValueError: the file is missing, is not a .py file, raises when imported (a name that is taken included), or
            registers no pattern.
    """
    file = Path(path).expanduser().resolve()
    if file.suffix != ".py":
        raise ValueError(f"a plugin is a .py file that registers patterns, got {str(path)!r}")
    if not file.is_file():
        raise ValueError(f"there is no plugin file {str(path)!r}; check the path, from {Path.cwd()}")
    if names := _registered_by(file):
        return names
    # The module keeps the same name in every process, so that what is pickled in one is found in another.
    name = f"hf_sparse_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = set(available_patterns())
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # Half a plugin would make a second try fail on its own names.
        forget_patterns(set(available_patterns()) - before)
        del sys.modules[name]
        where = f" on line {line}" if (line := _line_in(file, error)) else ""
        what = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"plugin {str(path)!r} raises {type(error).__name__}{where}: {what}") from error
    names = sorted(set(available_patterns()) - before)
    if not names:
        del sys.modules[name]
        raise ValueError(
            f"plugin {str(path)!r} registers no pattern; decorate one with @hf_sparse.register_pattern('a_name')"
        )
    return names


def _registered_by(file: Path) -> list[str]:
    """Return the names of the patterns whose classes come from this file."""

    def source(name: str) -> str | None:
        return getattr(sys.modules.get(pattern_class(name).__module__), "__file__", None)

    return [name for name in available_patterns() if (at := source(name)) and Path(at).resolve() == file]


def _line_in(file: Path, error: BaseException) -> int | None:
    """Return the last line of the file that the error passed through; None where it did not."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    return lines[-1] if lines else None
