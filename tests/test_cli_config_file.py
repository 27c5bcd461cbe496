"""Options of a command from a YAML file."""

import argparse
import json
import re

import pytest

from hf_sparse.cli import Parser, main
from hf_sparse.cli.config_file import add_config_argument, find_config
from hf_sparse.cli.options import add_pattern_options, given_options
from hf_sparse.patterns import registry


def parser():
    """A parser with an option of each kind."""
    made = Parser(prog="prog", allow_abbrev=False)
    add_config_argument(made)
    made.add_argument("model")
    made.add_argument("--pattern", action="append", default=[])
    made.add_argument("--text", nargs="+", action="extend")
    made.add_argument("--sizes", nargs="+", type=int, default=[1])
    made.add_argument("--length", type=int, default=7)
    made.add_argument("--rate", type=float)
    made.add_argument("--contexts", type=lambda text: tuple(map(int, text.split(","))))
    made.add_argument("--dtype", choices=("auto", "float32"), default="auto")
    made.add_argument("--max-new-tokens", type=int)
    made.add_argument("--quiet", action="store_true")
    made.add_argument("--bos", action=argparse.BooleanOptionalAction, default=True)
    add_pattern_options(made)
    return made


@pytest.fixture
def merged(tmp_path):
    """Parses a command line together with the text of a file."""

    def parse(text, *own):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        own = ["--config", str(path), *own]
        config = find_config(own, Parser(prog="prog", add_help=False, allow_abbrev=False))
        return parser().parse_args([*config.arguments(parser(), own), *own])

    return parse


def test_every_kind_of_option_is_read(merged):
    args = merged(
        """
        model: some/model   # a comment
        pattern: [strided, 'sliding_window|full']
        text:
          - -a.txt
          - b c.txt
        sizes: [2, -3]
        length: -4
        rate: 1e-4
        dtype: float32
        max_new_tokens: 5
        quiet: true
        bos: false
        """
    )
    assert (args.model, args.pattern, args.text) == (
        "some/model",
        ["strided", "sliding_window|full"],
        ["-a.txt", "b c.txt"],
    )
    assert (args.sizes, args.length, args.rate) == ([2, -3], -4, 1e-4)
    assert (args.dtype, args.max_new_tokens, args.quiet, args.bos) == ("float32", 5, True, False)


def test_what_the_file_leaves_out_keeps_its_default(merged):
    args = merged("model: m\nquiet: false\nbos: true\ntext: one.txt\nrate: 2")
    assert (args.pattern, args.length, args.quiet, args.bos, args.rate) == ([], 7, False, True, 2.0)
    assert args.text == ["one.txt"]


def test_the_command_line_replaces_what_the_file_says(merged):
    file = "model: m\npattern: [full]\ntext: [a, b]\nsizes: [1, 2]\nlength: 3\nbos: false\nwindow: 9"
    args = merged(
        file, "other", "--pattern", "strided", "--text", "c", "--sizes", "4", "--length", "7", "--bos"
    )
    assert (args.model, args.pattern, args.text, args.sizes, args.length, args.bos) == (
        *("other", ["strided"], ["c"], [4], 7, True),
    )
    assert given_options(args)["window"].text == "9"
    assert given_options(merged(file, "--window", "5"))["window"].text == "5"


def test_what_has_commas_may_be_a_list(merged):
    file = "model: m\ncontexts: [8, 16]\n"
    assert merged(file).contexts == merged("model: m\ncontexts: 8,16").contexts == (8, 16)
    assert merged(file, "--contexts", "4").contexts == (4,)
    with pytest.raises(ValueError, match=r"contexts must be one value, got \[8\]"):
        merged("model: m\ncontexts: [[8]]")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *(("16", "16"), ("0.5", "0.5"), ("true", "true"), ("null", "none"), ("none", "none"), ("-1", "-1")),
        *(("[256, null, 512]", "256,none,512"), ("[256]", "256,"), ("[]", ""), ("'256,512'", "256,512")),
        *(("[[1, 2], [3]]", "1,2;3"), ("[[1, 2]]", "1,2;")),
    ],
)
def test_options_of_patterns_are_spelled_as_on_the_command_line(merged, value, text):
    assert given_options(merged(f"model: m\nwindow: {value}"))["window"].text == text


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("lenght: 3", r"run\.yaml has the unknown option 'lenght'; did you mean 'length'\?"),
        ("zzz: 3", r"has the unknown option 'zzz'; see: prog --help"),
        ("config: other.yaml", r"has the unknown option 'config'"),
        ("help: true", r"has the unknown option 'help'"),
        ("no-bos: true", r"has the unknown option 'no-bos'"),
        ("length: many", r"run\.yaml: length must be a whole number, got 'many'"),
        ("length: 1.5", r"length must be a whole number, got 1\.5"),
        ("length: true", r"length must be a whole number, got True"),
        ("length: null", r"length must be a whole number, got None"),
        ("length: [1]", r"length must be a whole number, got \[1\]"),
        ("sizes: [1, x]", r"sizes must be a whole number, got 'x'"),
        ("rate: fast", r"rate must be a number, got 'fast'"),
        ("rate: [1]", r"rate must be a number, got \[1\]"),
        (
            "text: 2024",
            r"text must be a text \(in quotes, where YAML takes it for something else\), got 2024",
        ),
        ("text: {a: b}", r"text must be a text .*, got \{'a': 'b'\}"),
        ("text: []", r"text is an empty list; leave it out, or name at least one"),
        ("model: no", r"model must be a text .* got False"),
        ("dtype: int8", r"dtype must be one of auto, float32, got 'int8'"),
        ("quiet: 'yes'", r"quiet must be true or false, got 'yes'"),
        ("bos: 1", r"bos must be true or false, got 1"),
        ("window: {a: 1}", r"window must be a value, a list, or a list of lists, got \{'a': 1\}"),
        ("window: [[[1]]]", r"window must be a value, a list, or a list of lists, got \[\[1\]\]"),
        ("length: 1\n\nlength: 2", r"run\.yaml, line 3: length is given twice"),
        (
            "max-new-tokens: 1\nmax_new_tokens: 2",
            r"line 2: max_new_tokens is given twice; keep one, or .* a list",
        ),
        ("length: 1\n2: 3", r"line 2: '2' is no name of an option"),
        ("on: true", r"line 1: 'on' is no name of an option"),
        ("length: 1\n  rate: 2", r"run\.yaml is not YAML \(line 2: mapping values are not allowed here\)"),
        ("length: [1", r"is not YAML \(line 1: "),
        ("model: !!python/object:os.system x", r"is not YAML \(line 1: could not determine a constructor"),
        ("model: 2024-13-45", r"is no YAML that can be read \(month must be in 1\.\.12"),
        ("a: " + "[" * 500, r"is no YAML that can be read"),
        ("a: \x07", r"is no YAML that can be read"),
        (b"a: \xff", r"run\.yaml is not UTF-8"),
        ("", r"run\.yaml holds no options"),
        ("# nothing", r"run\.yaml holds no options"),
        ("[length, 3]", r"run\.yaml holds no options; write each on a line of its own, such as length: 4096"),
    ],
)
def test_mistakes_in_a_file(merged, file, expected):
    with pytest.raises(ValueError, match=expected):
        merged(file)


def test_a_mistake_is_one_even_where_the_command_line_replaces_it(merged):
    with pytest.raises(ValueError, match="length must be a whole number"):
        merged("length: many", "--length", "3")


def test_eval_takes_its_options_from_a_file(tiny_model_folder, texts, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    settings = {
        "model": str(tiny_model_folder),
        "pattern": ["sliding_window", "streaming_llm"],
        "window": 16,
        "text": texts,
        "length": 40,
        "quiet": True,
        "output": str(tmp_path / "out"),
    }
    path.write_text(json.dumps(settings))  # JSON is YAML
    assert main(["eval", "--config", str(path), "--length", "30"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "sliding_window(window=16)" in out and "streaming_llm(sinks=4, window=16)" in out
    assert "6 documents, 174 tokens scored" in out  # 29 of each
    assert (tmp_path / "out" / "results.json").exists()
    assert main(["eval", f"--config={path}", "--pattern", "full"]) == 2
    assert "full has no option --window" in capsys.readouterr().err


def test_a_plugin_of_the_file_brings_its_options(tiny_model_folder, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(registry, "_PATTERNS", dict(registry._PATTERNS))
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from dataclasses import dataclass\n"
        "import hf_sparse\n"
        "@hf_sparse.register_pattern('reaching')\n"
        "@dataclass(frozen=True)\n"
        "class Reaching(hf_sparse.Pattern):\n"
        "    reach: int = 2\n"
        "    def allows(self, context, head, query, key):\n"
        "        return query - key < self.reach\n"
    )
    path = tmp_path / "run.yaml"
    path.write_text(f"plugin: {plugin}\npattern: reaching\nreach: 3\nlength: 30\nquiet: yes\n")
    command = ["eval", str(tiny_model_folder), "--text", *texts, "--config", str(path)]
    assert main(command) == 0, capsys.readouterr().err
    assert "reaching(reach=3)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "--config", "absent.yaml"], r"absent\.yaml does not exist"),
        (["eval", "--config", "."], r"\. is a folder; name a text file in it"),
        (["eval", "m", "--config"], r"argument --config: expected one argument; see: hf-sparse eval --help"),
        (
            ["eval", "m", "--config", "FILE"],
            r"run\.yaml has the unknown option 'lenght'; did you mean 'length'\?",
        ),
        (["patterns", "--config", "FILE"], r"unrecognized arguments: --config"),
    ],
)
def test_mistakes_on_the_command_line(arguments, expected, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("lenght: 3\n")
    assert main([str(tmp_path / "run.yaml") if a == "FILE" else a for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hf-sparse: error: ") and err.count("\n") == 1
    assert re.search(expected, err)
