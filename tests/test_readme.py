"""The README is true: its first example prints what it says, and its pattern table is the registry."""

import re
import subprocess
import sys
from pathlib import Path

from hf_sparse import available_patterns

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_pattern_table_and_registry_agree():
    rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert len(rows) == len(set(rows)), "a pattern has two rows"
    assert set(rows) == set(available_patterns())


def test_the_first_example_prints_what_the_readme_shows():
    code, shown = re.search(r"```python\n(.*?)```\n```\n(.*?)```", README, flags=re.DOTALL).groups()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == shown.strip()
