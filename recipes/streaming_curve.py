"""Memory, time per token and loss of a text that is streamed through a model, sparse and dense, against its length.

    python recipes/streaming_curve.py [--tokens 200000] [--dense-tokens 16384] [--generate 200000]

The text is the held-out split of the standard library of this Python, its files in a seeded order, each after a
``<s>``, as one stream. Its last tenth repeats tokens 1,000 to 10,000, as often as it takes: what is read early and late
is then the same text, too far apart for any window. It goes through the model in chunks of 128 tokens, whose losses are
those of one token at a time. Every 1,000 tokens:

- memory: the bytes of the cache;
- time: of one step of a single token, the median of several on a copy of the cache, which leaves the stream as it is;
- loss: the mean of the last 1,000 tokens, nats per token.

Runs: streaming_llm with places in the cache and with absolute positions, a plain window of as many keys, and the dense
model for as long as is bearable. As some files are harder than others, a control reads the same text on a cache that
begins anew every 1,000 tokens: how a loss changes beside the control's comes from the length. At the end of a run steps
on its cache and on a copy of it from 2,000 tokens take turns, which machines that are slower at times cannot disturb.
With --generate
streaming_llm also writes N tokens with ``model.generate``, whose own bookkeeping grows with the text.

Writes JSON after each run, and at the end the plot.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from streaming_report import CONTROL, EARLY, FILLED, check_writable, save, summary
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, logging
from transformers.generation.streamers import BaseStreamer

import hf_sparse
from hf_sparse import SlidingWindow, StreamingLLM
from hf_sparse.documents import standard_library
from hf_sparse.evaluate.machine import describe_machine

ROOT = Path(__file__).resolve().parent
WARM_UP = 3  # steps before those that are timed
PAIRS = 200  # steps on either cache of which the ratio is told
MARKS = (2_000, 20_000, 200_000)  # tokens at which the time of generate is told


def main() -> int:
    args = parse()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_writable(args.results, args.plot)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        text = stream_of(tokenizer, args.tokens + WARM_UP + args.repeats + 1)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2

    streaming = StreamingLLM(args.sinks, args.window, "cache")
    window, absolute = SlidingWindow(args.sinks + args.window), StreamingLLM(args.sinks, args.window)
    patterns = {CONTROL: streaming, **{str(p): p for p in (streaming, window, absolute)}, "dense": None}
    record: dict[str, Any] = {
        "command": " ".join(("python", *sys.argv)),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": describe_machine(model.device),
        "model": Path(args.model).name,
        "settings": {key: value for key, value in vars(args).items() if isinstance(value, int)},
        "runs": {},
    }
    for name, pattern in patterns.items():
        length = args.tokens if pattern else min(args.dense_tokens, args.tokens)
        samples, ratio = stream(model, pattern, text, length, args, anew=name == CONTROL)
        control = record["runs"][CONTROL]["samples"] if name != CONTROL else None
        record["runs"][name] = {**summary(samples, control), "step_ratio": ratio, "samples": samples}
        save(record, args.results)
        print(f"\r{name}: {record['runs'][name] | {'samples': len(samples)}}")
    if args.generate:
        record["generate"] = time_generate(model, streaming, text[:2], args.generate)
    save(record, args.results, args.plot)
    return 0


def stream_of(tokenizer: Any, length: int) -> Tensor:
    """Return the first tokens ``[length]`` of the stream."""
    documents = standard_library("test")
    order = np.random.default_rng(0).permutation(len(documents))
    files = tokenizer([documents[i].text for i in order], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = list(chain.from_iterable(bos + file for file in files))
    if len(ids) < length:
        raise ValueError(
            f"the standard library's held-out files have {len(ids)} tokens but {length} are needed"
        )
    early, tenth = ids[EARLY[0] : EARLY[1]], length // 10
    if length - tenth > EARLY[1]:
        ids[length - tenth : length] = (early * (tenth // len(early) + 1))[:tenth]
    return torch.tensor(ids[:length])


@torch.inference_mode()
def stream(
    model: Any, pattern: Any, text: Tensor, length: int, args: argparse.Namespace, *, anew: bool
) -> tuple[list[dict[str, Any]], float | None]:
    """Read the first `length` tokens of the text, and return what was measured every ``args.every`` tokens.

    Also how long a step takes at the end over what it takes after FILLED tokens; None for a text no longer than that.

    anew: the cache forgets all after each.
    """
    if pattern is None:
        hf_sparse.unpatch_model(model)
    else:
        hf_sparse.patch_model(model, pattern)
    cache = DynamicCache(config=model.config) if pattern is None else hf_sparse.make_cache(model)
    samples: list[dict[str, Any]] = []
    filled = None
    for start in range(0, length, args.every):
        if anew:
            cache.reset()
        stop, losses = min(start + args.every, length), []
        for first in range(start, stop, args.chunk):
            last = min(first + args.chunk, stop)
            logits = model(text[None, first:last], past_key_values=cache).logits[0]
            losses.append(
                torch.nn.functional.cross_entropy(logits, text[first + 1 : last + 1], reduction="none")
            )
        steps = text[stop : stop + WARM_UP + args.repeats]
        sample = {
            "tokens": stop,
            "bytes": cache_bytes(cache),
            "step_seconds": step_seconds(model, cache, steps),
            "loss": float(torch.cat(losses).mean()),
        }
        samples.append(sample)
        progress(
            f"{pattern or 'dense'}: {stop:,} tokens, {sample['bytes'] / 2**20:.2f} MiB, "
            f"{1e3 * sample['step_seconds']:.1f} ms, {sample['loss']:.3f} nats/token"
        )
        if filled is None and stop >= FILLED:
            filled = copy.deepcopy(cache)
    return samples, None if filled is None else step_ratio(model, cache, filled, text[:PAIRS])


def step_ratio(model: Any, late: Any, early: Any, tokens: Tensor) -> float:
    """Return the time of a step of one token on a cache over that on another, medians of steps that take turns."""
    seconds: tuple[list[float], ...] = [], []
    for token in tokens:
        for cache, own in zip((late, early), seconds, strict=True):
            begin = time.perf_counter()
            model(token[None, None], past_key_values=cache)
            own.append(time.perf_counter() - begin)
    return median(seconds[0][WARM_UP:]) / median(seconds[1][WARM_UP:])


def step_seconds(model: Any, cache: Any, tokens: Tensor) -> float:
    """Return the median time of a step of one token, in seconds; the cache stays as it is."""
    own, seconds = copy.deepcopy(cache), []
    for token in tokens:
        begin = time.perf_counter()
        model(token[None, None], past_key_values=own)
        seconds.append(time.perf_counter() - begin)
    return median(seconds[WARM_UP:])


def cache_bytes(cache: Any) -> int:
    if isinstance(cache, DynamicCache):
        return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))
    return int(cache.nbytes)


class Clock(BaseStreamer):
    """Notes when each token of generate came."""

    def __init__(self, every: Callable[[int], None]) -> None:
        self.times: list[float] = []
        self.every = every

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) % 1000 == 0:
            self.every(len(self.times))

    def end(self) -> None:
        """Nothing is left to be told."""


def time_generate(model: Any, pattern: Any, prompt: Tensor, tokens: int) -> list[dict[str, float]]:
    """Return the milliseconds per token of `model.generate` at MARKS and at its end: medians of the tokens before."""
    hf_sparse.patch_model(model, pattern)
    model.generation_config.eos_token_id = None  # it shall not stop
    clock = Clock(lambda count: progress(f"generate: {count:,} tokens"))
    model.generate(
        prompt[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        streamer=clock,
    )
    found = []
    for mark in sorted({*(m for m in MARKS if m < tokens), tokens}):
        times = np.diff(clock.times[max(mark // 2, mark - 1000) : mark + 1])
        found.append({"tokens": mark, "milliseconds": 1e3 * float(np.median(times))})
        print(f"generate, {mark:,} tokens: {found[-1]['milliseconds']:.2f} ms per token")
    return found


def progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "tiny_base"), help="folder or hub id")
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens of the sparse runs")
    parser.add_argument("--dense-tokens", type=int, default=16_384, help="tokens of the dense run")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--window", type=int, default=1020)
    parser.add_argument("--every", type=int, default=1000, help="tokens between two samples")
    parser.add_argument("--chunk", type=int, default=128, help="tokens read at a time")
    parser.add_argument("--repeats", type=int, default=15, help="steps timed for a sample")
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help="also write N tokens with generate"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "streaming.json")
    parser.add_argument("--plot", type=Path, default=ROOT.parent / "docs" / "streaming.png")
    args = parser.parse_args()
    for name in ("tokens", "dense_tokens", "window", "every", "chunk", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be >= 1, got {getattr(args, name)}")
    for name in ("sinks", "generate"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} must be >= 0, got {getattr(args, name)}")
    if args.every > FILLED:
        parser.error(f"--every must be at most {FILLED}, got {args.every}")
    return args


if __name__ == "__main__":
    sys.exit(main())
