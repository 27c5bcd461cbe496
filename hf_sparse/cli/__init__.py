"""The command line: hf-sparse adapt, analyze, calibrate, compare, eval, generate, lm-eval, merge, patterns, ..."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .config_file import ConfigFile

# Each command is a module with add_arguments(parser) and run(args), imported when it is asked for.
COMMANDS = {
    "adapt": "train a LoRA adapter that recovers what a pattern costs, and save it with the pattern",
    "analyze": "measure how much attention mass each pattern keeps in every head, and say which one each head wants",
    "calibrate": "measure which layers and heads need the distance, give the rest a window, and write the pattern",
    "compare": "hold results of evaluations against each other, with intervals where they scored the same tokens",
    "eval": "measure the perplexity of a model, dense and with sparse patterns, on the same tokens",
    "generate": "stream what a model writes after a prompt, or talk with it, in bounded memory",
    "lm-eval": "run lm-evaluation-harness on a model under a pattern, and prove that the pattern ran",
    "merge": "write a whole model with an adapter in its weights, which keeps the pattern",
    "patterns": "list the patterns with their options",
    "probe": "ask a model for what lies far back in long texts, dense and with sparse patterns, on the same samples",
    "show": "draw what a pattern lets each token see, and say what it costs",
}

WITH_CONFIG = {
    "adapt",
    "calibrate",
    "eval",
    "probe",
}  # commands that also read their options from --config FILE.yaml


class Parser(argparse.ArgumentParser):
    """Reports a mistake as a ValueError, so that every mistake ends the same way."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].lower()}{message[1:]}; see: {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 after a mistake (one sentence on stderr), 130 on Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parsed = _parse(arguments)
        _module(parsed.command).run(parsed)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("hf-sparse: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `hf-sparse patterns | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__)
    except RuntimeError as error:  # PyTorch's way to say that memory is out, on CUDA and CPU
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return _fail("out of memory; use a smaller --length, --dtype bfloat16, or a smaller model.")
    return 0


def _fail(message: str) -> int:
    print(f"hf-sparse: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command and its options, those of its --config file included."""
    plugins = _plugin_parser()
    command = next((argument for argument in arguments if argument in COMMANDS), "")
    start = arguments.index(command) + 1 if command in WITH_CONFIG else len(arguments)
    own = arguments[start:]
    config, from_file = _find_config(command, own), []
    if config:
        from_file = config.plugins(plugins, arguments)
    _load_plugins(plugins.parse_known_args([*from_file, *arguments])[0].plugin)
    parser, parsers = _parser(arguments, plugins)
    if config:
        from_file = config.arguments(parsers[command], own)
    parsed, unknown = parser.parse_known_args([*arguments[:start], *from_file, *own])
    if unknown:
        _refuse(unknown, parsed)
    return parsed


def _find_config(command: str, own: list[str]) -> ConfigFile | None:
    if not any(argument.split("=")[0] == "--config" for argument in own):
        return None
    from .config_file import find_config

    return find_config(own, Parser(prog=f"hf-sparse {command}", add_help=False, allow_abbrev=False))


def _refuse(unknown: Sequence[str], parsed: argparse.Namespace) -> NoReturn:
    """Raise ValueError for arguments nobody knows: where a pattern is unknown too, they may be its options."""
    from .spelling import check_names

    check_names(parsed)
    raise ValueError(f"unrecognized arguments: {' '.join(unknown)}; see: hf-sparse {parsed.command} --help")


def _plugin_parser() -> Parser:
    """Return a parser of --plugin alone: the files are loaded first, as their patterns bring options."""
    parser = Parser(prog="hf-sparse", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--plugin",
        metavar="FILE.py",
        action="append",
        default=[],
        help="Python file with patterns of your own, may be repeated; only name files you trust: they are run",
    )
    return parser


def _load_plugins(files: Sequence[str]) -> None:
    if files:
        from ..patterns import load_plugin

        for file in dict.fromkeys(map(os.path.realpath, files)):
            load_plugin(file)


def _parser(arguments: Sequence[str], plugins: Parser) -> tuple[Parser, dict[str, Parser]]:
    """Return the whole parser and that of each command."""
    parser = Parser(
        prog="hf-sparse",
        description="Sparse attention patterns for Hugging Face models.",
        parents=[plugins],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", parents=[plugins]
        )
        command.allow_abbrev = False
        if name in arguments:  # the others stay unread: their options may need slow imports
            if name in WITH_CONFIG:
                from .config_file import add_config_argument

                add_config_argument(command)
            _module(name).add_arguments(command)
    return parser, commands.choices


def _module(command: str) -> Any:
    return importlib.import_module(f".{command.replace('-', '_')}", __name__)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from .. import __version__

        print(f"hf-sparse {__version__}")
        parser.exit()
