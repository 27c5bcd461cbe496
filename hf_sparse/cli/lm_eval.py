"""hf-sparse lm-eval: lm-evaluation-harness on a model under a pattern, with proof that the pattern ran."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import glob
import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends import BACKENDS
from ..hf import SparseSettings, settings_to_json
from .options import add_pattern_options
from .spelling import PATTERN_HELP, read_patterns

if TYPE_CHECKING:
    from ..evaluate.lm_eval_model import SparseHFLM

MODEL = "hf-sparse"
PLAIN = ("hf", "hf-auto", "huggingface")  # lm_eval's own names of what ours extends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-evaluation-harness is not installed; run: pip install 'hf_sparse[lm-eval]'")
    from lm_eval._cli.run import Run

    class RunArguments(Run):
        """The arguments of `lm-eval run`, on a parser that is there already."""

        def __init__(self) -> None:
            self._parser = parser
            self._add_args()

    parser.epilog = (
        "All other options are those of `lm-eval run`. --model is hf-sparse, lm_eval's hf with a pattern; its "
        "--model_args also take pattern=NAME with the pattern's options (pretrained=X,pattern=longformer,window=512), "
        "attn_implementation=sparse_NAME, and peft=FOLDER, which brings its own pattern."
    )
    parser.add_argument(
        "--pattern",
        metavar="PATTERN",
        action="append",
        default=[],
        help=f"pattern to run (default: the one the model or adapter was saved with; full is dense): {PATTERN_HELP}; "
        "options that adapt to the length are resolved for the model's max_length".replace("%", "%%"),
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, help="what computes the attention (default: as saved, or auto)"
    )
    RunArguments()
    add_pattern_options(parser)


def run(args: argparse.Namespace) -> None:
    from lm_eval._cli.run import Run
    from lm_eval.utils import setup_logging

    patterns = read_patterns(args.pattern, args)
    if len(patterns) > 1:
        raise ValueError(
            f"lm-eval runs one pattern, got {len(patterns)} of --pattern; run it for each, or join them as in 'a|b'"
        )
    theirs, config = _their_arguments(args)
    theirs.model_args = _model_args(theirs, config)
    theirs.model = MODEL
    if patterns:
        _put_pattern(theirs.model_args, patterns[0])
    if args.backend:
        theirs.model_args["sparse_backend"] = args.backend
    output = theirs.output_path or config.get("output_path")
    before = _result_files(output)

    from ..evaluate.lm_eval_model import loaded_models

    setup_logging()
    with loaded_models() as models:
        Run._execute(theirs)
    (model,) = models
    # lm_eval reports from the first process, which without GPUs is the first on its machine
    if model.rank == 0 and os.environ.get("LOCAL_RANK", "0") == "0":
        print(_proof_text(model))
        if output:
            _write_proof(model, output, before)


def _their_arguments(args: argparse.Namespace) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Return the arguments that are lm_eval's, and what its --config file says, which they override."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    names = [field.name for field in dataclasses.fields(EvaluatorConfig)]
    given = {name: value for name, value in vars(args).items() if name in names}
    config: dict[str, Any] = {}
    if args.config:
        try:
            config = EvaluatorConfig.load_yaml_config(args.config)
        except TypeError as error:
            raise ValueError(f"--config {args.config}: {error}") from None
    for key in config:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "patterns go into model_args"
            raise ValueError(f"--config {args.config} has the unknown key {key!r}; {hint}")
    return argparse.Namespace(**given), config


def _model_args(theirs: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """Return the model's arguments; raise ValueError where they are of a model that is not ours, or name none."""
    from lm_eval.utils import simple_parse_args_string

    from ..hf.sources import check_source

    kind = theirs.model or config.get("model") or MODEL
    if kind not in (MODEL, *PLAIN):
        raise ValueError(f"patterns run in models of transformers, got --model {kind}; use --model {MODEL}")
    found = theirs.model_args or config.get("model_args") or {}
    found = dict(simple_parse_args_string(found) if isinstance(found, str) else found)
    if "pretrained" not in found:
        raise ValueError("no model is named; add --model_args pretrained=NAME, a hub id or folder")
    check_source(str(found["pretrained"]))
    return found


def _put_pattern(model_args: dict[str, Any], pattern: Any) -> None:
    if "pattern" in model_args:
        raise ValueError(
            f"--model_args has pattern={model_args['pattern']}, and there is --pattern {pattern} besides; leave one out"
        )
    chosen = pattern if isinstance(pattern, SparseSettings) else SparseSettings(pattern)
    # What lm_eval writes into its results; beside the path of a file, the proof in them says what it held.
    model_args["pattern"] = chosen.source or settings_to_json(chosen)


def _proof_text(model: SparseHFLM) -> str:
    counted = model.counted
    ran = ", ".join(f"{name} {count:,}" for name, count in counted.ran.items())
    lines = [
        f"pattern   {model.settings.pattern}",
        f"layers    {', '.join(map(str, sorted(counted.layers)))}",
        f"density   {counted.density:.3g} of the pairs of dense attention, as counted",
        f"ran       {counted.calls:,} attention calls: {ran}",
    ]
    if counted.pairs == counted.dense_pairs:
        lines.append("note      nothing was left out at these lengths: these are figures of dense attention")
    return "\n".join(lines)


def _result_files(output: str | None) -> set[Path]:
    """Return the files of results that are there; raise ValueError where lm_eval could not write any."""
    if output is None:
        return set()
    from ..evaluate.output_folder import check_output_folder

    path = Path(output)
    is_file = path.suffix == ".json"  # else a folder, in which each model has one
    folder = path.parent if is_file else path
    check_output_folder("--output_path", folder)
    return set(folder.glob(f"{glob.escape(path.stem)}_*.json" if is_file else "*/results_*.json"))


def _write_proof(model: SparseHFLM, output: str, before: set[Path]) -> None:
    """Write the proof beside the results that lm_eval has just written, under the same date."""
    from ..evaluate.output_folder import write_atomically

    new = sorted(_result_files(output) - before)
    if not new:  # lm_eval only logs what went wrong
        raise ValueError(f"lm_eval could not write its results to {output}; see the warning above")
    # not just sparse_attention.json: that file beside an adapter holds its pattern
    file = new[-1].with_name(f"sparse_attention_{new[-1].stem.rpartition('_')[2]}.json")
    content = {"results": new[-1].name, **model.proof()}
    write_atomically(file, (json.dumps(content, indent=2) + "\n").encode())
    print(f"written   {file}")
