"""The README's pattern table and the registry name the same patterns."""

import re
from pathlib import Path

from hf_sparse import available_patterns

README = Path(__file__).resolve().parents[1] / "README.md"


def test_pattern_table_and_registry_agree():
    rows = re.findall(r"^\| `(\w+)` \|", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == len(set(rows)), "a pattern has two rows"
    assert set(rows) == set(available_patterns())
