"""The catalogue of patterns by name."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .base import Pattern

P = TypeVar("P", bound=Pattern)
_PATTERNS: dict[str, type[Pattern]] = {}
# Transformers gives these a meaning of their own when they occur in the name of an attention implementation.
_RESERVED = ("flash", "sdpa", "flex", "paged", "eager")


def register_pattern(name: str) -> Callable[[type[P]], type[P]]:
    """Make a pattern class available as ``patch_model(model, pattern=name)``.

    Raises:
        ValueError: the name is taken, is not lower_case, or contains a word that transformers treats specially.
        TypeError: the class is not a frozen dataclass derived from `Pattern`.
    """

    def decorate(cls: type[P]) -> type[P]:
        if name in _PATTERNS:
            raise ValueError(f"pattern {name!r} is already {_PATTERNS[name].__qualname__}; pick another name")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "custom":
            raise ValueError(
                f"a pattern name is lower_case letters, digits and _ (and not 'custom'), got {name!r}"
            )
        if word := next((w for w in _RESERVED if w in name), None):
            raise ValueError(
                f"pattern name {name!r} contains {word!r}, which transformers treats specially; rename it"
            )
        # Looked up in the class itself: being a dataclass is inherited, its fields are not.
        if not (isinstance(cls, type) and issubclass(cls, Pattern) and "__dataclass_params__" in vars(cls)):
            raise TypeError(f"{cls!r} must be a @dataclass(frozen=True) that derives from hf_sparse.Pattern")
        cls.name = name
        _PATTERNS[name] = cls
        _announce(name)
        return cls

    return decorate


_listeners: list[Callable[[str], None]] = []


def on_register(listener: Callable[[str], None]) -> None:
    """Call `listener(name)` for every pattern registered so far and from now on."""
    _listeners.append(listener)
    for name in _PATTERNS:
        listener(name)


def _announce(name: str) -> None:
    for listener in _listeners:
        listener(name)


def forget_patterns(names: Iterable[str]) -> None:
    """Take names out of the catalogue again, where the file that registered them could not be loaded to its end."""
    for name in names:
        _PATTERNS.pop(name).name = ""


def available_patterns() -> list[str]:
    """Return the registered names in alphabetical order."""
    return sorted(_PATTERNS)


def static_patterns() -> list[str]:
    """Return the names of patterns that positions alone decide, in alphabetical order."""
    return [name for name in available_patterns() if not _PATTERNS[name].by_content]


def pattern_class(name: str) -> type[Pattern]:
    """Return the class registered under `name`; raise ValueError with the nearest name where there is none."""
    if name not in _PATTERNS:
        near = difflib.get_close_matches(str(name), _PATTERNS, n=1)
        own = " One of your own is known after hf_sparse.load_plugin('FILE.py')."
        hint = f" Did you mean {near[0]!r}?" if near else own
        raise ValueError(f"unknown pattern {name!r}.{hint} Available: {', '.join(available_patterns())}.")
    return _PATTERNS[name]


def get_pattern(pattern: str | Pattern, /, **options: Any) -> Pattern:
    """Return the pattern of that name with these options; a pattern object is returned as it is.

    Raises:
        ValueError: unknown name (the nearest one is suggested), unknown option, or a value the pattern refuses.
    """
    if isinstance(pattern, Pattern):
        if options:
            raise ValueError(
                f"options {', '.join(sorted(options))} go with a pattern name; {pattern} already has its own"
            )
        return _hashable(pattern)
    if not isinstance(pattern, str):
        raise ValueError(f"pattern must be a name or a Pattern object, got {type(pattern).__name__}")
    cls = pattern_class(pattern)
    known = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            has = f"its options are: {', '.join(known)}" if known else "it takes no options"
            raise ValueError(f"pattern {pattern!r} has no option {option!r}.{hint} ({has})")
    required = [
        f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing := [option for option in required if option not in options]:
        raise ValueError(f"pattern {pattern!r} needs a value for {', '.join(missing)}, which has no default")
    return _hashable(cls(**options))


def _hashable(pattern: P) -> P:
    """Return `pattern`; raise ValueError where no plan can be kept for it."""
    try:
        hash(pattern)
    except TypeError as error:
        raise ValueError(
            f"{pattern} cannot be hashed ({error}); let __post_init__ turn its lists and mappings into tuples"
        ) from None
    return pattern
