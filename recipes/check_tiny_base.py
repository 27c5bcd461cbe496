"""Measure what the tiny base must be able to do, on held-out files, and record it in its TRAINING.json.

    python recipes/check_tiny_base.py recipes/tiny_base

(a) long context pays: the loss of the tokens 1,024 to 2,047 of a window, with all of the window before them and with
    only the nearest 512 to 575, 256 to 511 or 256 to 319 tokens behind a fresh ``<s>``, the target tokens the same;
(b) it copies: the share of a span of 64 uniformly random tokens whose next token is the model's first guess where the
    span returns after 1,024 tokens of held-out text (the first token of the span has nothing to be guessed from);
(c) 8,192 tokens lie within what it was trained for: the loss by position, and the loss of the tokens from 2,048 on
    with everything before them against the nearest 2,047 tokens (at most 511 more) and ``<s>``.
"""

import argparse
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_sparse.documents import fingerprint, standard_library

CONTEXTS = ((512, 64), (256, 256), (256, 64))  # the fewest tokens that a target sees, and how many take turns
POSITIONS = (0, 256, 512, 1024, 2048, 4096, 8192)


def cut_windows(files: list[list[int]], bos: int, length: int, most: int) -> Tensor:
    """At most ``most`` windows ``[n, length]`` of one file each, spread evenly over the files, after a ``<s>``."""
    windows = [
        [bos, *ids[i : i + length - 1]] for ids in files for i in range(0, len(ids) - length + 2, length - 1)
    ]
    chosen = np.linspace(0, len(windows) - 1, min(most, len(windows))).round().astype(int)
    return torch.tensor([windows[index] for index in chosen])


@torch.inference_mode()
def losses_with_everything(model, window: Tensor) -> Tensor:
    """The loss of every token of ``window [length]`` but the first, ``[length - 1]``."""
    logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
    return nn.functional.cross_entropy(logits, window[1:], reduction="none")


@torch.inference_mode()
def losses_with_nearest(model, window: Tensor, first: int, context: int, stride: int) -> Tensor:
    """The loss of the tokens from ``first`` on, each from its nearest ``context`` to ``context + stride - 1``."""
    starts = range(first, len(window), stride)
    pieces = torch.stack([torch.cat((window[:1], window[s - context : s + stride])) for s in starts])
    found = []
    for some in pieces.split(max(1, 8192 // pieces.shape[1])):
        logits = model(input_ids=some[:, :-1], use_cache=False, logits_to_keep=stride).logits.float()
        found.append(
            nn.functional.cross_entropy(logits.flatten(0, 1), some[:, -stride:].flatten(), reduction="none")
        )
    return torch.cat(found)


@torch.inference_mode()
def copy_accuracy(model, windows: Tensor, distance: int, size: int, seed: int = 0) -> float:
    """The share of the tokens of a planted random span that are guessed right ``distance`` tokens later."""
    random = np.random.default_rng(seed)
    right = 0
    for window in windows:
        row = window.clone()
        span = torch.from_numpy(random.integers(3, model.config.vocab_size, size))
        end = len(row)
        row[end - size - distance : end - distance] = span
        row[end - size :] = span
        guess = model(input_ids=row[None, :-1], use_cache=False, logits_to_keep=size - 1).logits[0].argmax(-1)
        right += int((guess == row[-(size - 1) :]).sum())
    return right / (len(windows) * (size - 1))


def measure(folder: Path, windows: int, long_windows: int) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    documents = standard_library("test")
    files = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    found: dict = {"test_data": fingerprint(documents), "test_tokens": sum(map(len, files))}

    rows = cut_windows(files, bos, 2048, windows)
    full = torch.stack([losses_with_everything(model, row)[1023:] for row in rows])
    found["long_context"] = {"windows": len(rows), "loss_2048": float(full.mean())}
    for context, stride in CONTEXTS:
        near = torch.stack([losses_with_nearest(model, row, 1024, context, stride) for row in rows])
        gain = near.mean(1) - full.mean(1)
        found["long_context"][f"{context}_to_{context + stride - 1}"] = {
            "loss": float(near.mean()),
            "gain": float(gain.mean()),
            "standard_error": float(gain.std() / len(rows) ** 0.5),
        }
    long_rows = cut_windows(files, bos, 8192, long_windows)
    some = rows[:: max(1, len(rows) // 32)][:32]
    found["copy"] = {"span": 64, "windows": len(some)}
    found["copy"] |= {f"at_{d}": copy_accuracy(model, some, d, 64) for d in (256, 512, 1024, 1920)}
    found["copy"] |= {f"at_{d}": copy_accuracy(model, long_rows, d, 64) for d in (4096, 7936)}

    full = torch.stack([losses_with_everything(model, row) for row in long_rows])
    near = torch.stack([losses_with_nearest(model, row, 2048, 2047, 512) for row in long_rows])
    by_position = pairwise(POSITIONS)
    found["to_8192"] = {
        "windows": len(long_rows),
        "loss_by_position": {
            f"{a}-{b}": float(full[:, max(a - 1, 0) : b - 1].mean()) for a, b in by_position
        },
        "loss_from_2048": float(full[:, 2047:].mean()),
        "loss_from_2048_with_nearest_2047": float(near.mean()),
        "loss_from_4096": float(full[:, 4095:].mean()),
        "loss_from_4096_with_nearest_2047": float(near[:, 2048:].mean()),
    }
    gains = {name: g for name, g in found["long_context"].items() if isinstance(g, dict)}
    found["reached"] = {
        **{f"long_context_over_{c}": g["gain"] >= 0.12 for c, g in gains.items()},
        "copy": found["copy"]["at_1024"] >= 0.30,
        "to_8192": found["to_8192"]["loss_from_4096"] <= found["to_8192"]["loss_from_4096_with_nearest_2047"],
    }
    return json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 4))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--windows", type=int, default=64, help="windows of 2,048 tokens")
    parser.add_argument("--long-windows", type=int, default=12, help="windows of 8,192 tokens")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    found = measure(args.folder, args.windows, args.long_windows)
    print(json.dumps(found, indent=2))
    if not args.no_record:
        command = f"python recipes/check_tiny_base.py {args.folder.as_posix()}"
        if args.windows != 64 or args.long_windows != 12:
            command += f" --windows {args.windows} --long-windows {args.long_windows}"
        record = json.loads((args.folder / "TRAINING.json").read_text())
        record["measured"] = {"command": command} | found
        (args.folder / "TRAINING.json.new").write_text(json.dumps(record, indent=2) + "\n")
        os.replace(args.folder / "TRAINING.json.new", args.folder / "TRAINING.json")


if __name__ == "__main__":
    main()
