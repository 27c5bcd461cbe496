"""A user's own file of patterns is loaded once; what is wrong with it is said in one sentence."""

import sys
import textwrap

import pytest
import torch

from hf_sparse import available_patterns, get_pattern, load_plugin
from hf_sparse.patterns.registry import forget_patterns

MINE = """
    from __future__ import annotations
    from dataclasses import dataclass
    import hf_sparse

    @hf_sparse.register_pattern("{name}")
    @dataclass(frozen=True)
    class Mine(hf_sparse.Pattern):
        step: int = 2

        def allows(self, context, head, query, key):
            return (query - key) % self.step == 0
"""


@pytest.fixture(autouse=True)
def only_for_this_test():
    patterns, modules = set(available_patterns()), set(sys.modules)
    yield
    forget_patterns(set(available_patterns()) - patterns)
    for name in [name for name in sys.modules if name.startswith("hf_sparse_plugin_")]:
        if name not in modules:
            del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    def written(text, name="my_patterns.py", pattern="mine"):
        (tmp_path / name).write_text(textwrap.dedent(text).replace("{name}", pattern), encoding="utf-8")
        return tmp_path / name

    return written


def test_a_file_of_patterns_is_loaded_once(write):
    path = write(MINE)
    assert load_plugin(str(path)) == ["mine"]
    assert torch.equal(get_pattern("mine", step=3).mask(9), get_pattern("strided", stride=3).mask(9))
    cls = type(get_pattern("mine"))
    assert load_plugin(path) == load_plugin(path.parent / "." / path.name) == ["mine"]
    assert type(get_pattern("mine")) is cls and sys.modules[cls.__module__].Mine is cls


def test_a_file_that_was_imported_in_another_way_is_left_alone(write, monkeypatch):
    path = write(MINE, "imported_patterns.py")
    monkeypatch.syspath_prepend(path.parent)
    import imported_patterns

    assert load_plugin(path) == ["mine"] and type(get_pattern("mine")) is imported_patterns.Mine
    del sys.modules["imported_patterns"]


def test_two_files_of_the_same_name_are_two_plugins(write, tmp_path):
    (tmp_path / "other").mkdir()
    write(MINE)
    write(MINE, "other/my_patterns.py", "mine_too")
    assert load_plugin(tmp_path / "my_patterns.py") == ["mine"]
    assert load_plugin(tmp_path / "other" / "my_patterns.py") == ["mine_too"]


def test_a_plugin_that_fails_leaves_nothing_behind(write):
    path = write(MINE + "\n    raise OSError('no disk')\n")
    with pytest.raises(ValueError, match=r"my_patterns.py' raises OSError on line 14: no disk"):
        load_plugin(path)
    assert "mine" not in available_patterns()
    write(MINE)
    assert load_plugin(path) == ["mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "registers no pattern; decorate one with @hf_sparse.register_pattern"),
        ("x = 1\nx = = 2\n", "raises SyntaxError on line 2: invalid syntax"),
        ("import math\n\nmath.sqrt(-1)\n", "raises ValueError on line 3: "),
        ("import no_such_module\n", "raises ModuleNotFoundError on line 1: No module named 'no_such_module'"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_said(write, text, message):
    with pytest.raises(ValueError, match=r"^plugin '.*my_patterns.py' " + message):
        load_plugin(write(text))


def test_taken_names_and_what_is_no_file_are_refused(write, tmp_path):
    with pytest.raises(
        ValueError, match=r"raises ValueError on line \d+: pattern 'full' is already Full; pick"
    ):
        load_plugin(write(MINE, pattern="full"))
    assert type(get_pattern("full")).__name__ == "Full"
    with pytest.raises(ValueError, match=r"there is no plugin file '.*absent.py'; check the path, from /"):
        load_plugin(tmp_path / "absent.py")
    with pytest.raises(ValueError, match=r"a plugin is a .py file that registers patterns, got '.*my.txt'"):
        load_plugin(write(MINE, "my.txt"))
