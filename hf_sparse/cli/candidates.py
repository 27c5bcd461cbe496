"""A pattern with its own options in one word, as several are given side by side: ``sliding_window:window=128``."""

from __future__ import annotations

from ..hf.pattern_file import is_pattern_file
from ..patterns import Pattern, Union, get_pattern
from .named import split_options
from .options import Given, fields, read_options
from .spelling import check_known, read_file


def read_candidate(text: str) -> Pattern:
    """Return the pattern that ``name:option=value,...``, a union of such, or the path of a pattern file stands for.

    Raises:
        ValueError: an unknown pattern or option, a value that is none of the option, or a file that holds more or less
            than a pattern.
    """
    if is_pattern_file(text):
        settings = read_file(text)
        if settings.layers is not None or settings.backend != "auto":
            raise ValueError(
                f"the candidate {text} also names layers or a backend, which are no matter of a single unit; "
                "leave them out of the file"
            )
        return settings.pattern
    members = [_read_member(member) for member in text.split("|")]
    return Union.of(*members) if len(members) > 1 else members[0]


def _read_member(text: str) -> Pattern:
    name, options = split_options(text)
    check_known(name)
    for option in options:
        if option not in fields(name):
            get_pattern(name, **{option: None})  # refuses it
    given = {option: Given(option, value) for option, value in options.items()}
    return get_pattern(name, **read_options(name, given))
