"""Training rows for the tiny base: one file per row where a file is long enough, and planted repeats to copy from.

A row is ``[length + 1]`` token ids: inputs are all but the last, targets all but the first, and a target of -100 is
not learned. Every row starts with ``<s>``.
"""

from pathlib import PurePosixPath

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_sparse.documents import Document

IGNORED = -100


def train_tokenizer(documents: list[Document], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds no special tokens by itself and decodes to exactly what it encoded."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


class Rows:
    """An endless, seeded and resumable stream of rows cut from whole files.

    Long files are cut into consecutive chunks, from a start that moves with every pass, so that the cuts fall
    elsewhere each time. What is shorter than a row is joined with other files of the same folder, each after its own
    ``<s>``. A pass over the files is shuffled; its order follows from (seed, length, pass) alone.
    """

    def __init__(self, documents: list[Document], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        encoded = tokenizer([document.text for document in documents], verbose=False)["input_ids"]
        self.files = [np.array(ids, dtype=np.int16) for ids in encoded]
        self.folders = [str(PurePosixPath(document.name).parent) for document in documents]
        self.bos, self.seed, self.vocab_size = tokenizer.bos_token_id, seed, len(tokenizer)
        self.length, self.cycle, self.taken = 0, 0, 0
        self.rng = np.random.default_rng(seed)

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.files)

    def state(self) -> dict:
        """Where the stream stands, as JSON: hand it to ``restore`` to go on with the very next row."""
        return {
            "length": self.length,
            "cycle": self.cycle,
            "taken": self.taken,
            "rng": self.rng.bit_generator.state,
        }

    def restore(self, state: dict) -> None:
        self.length, self.cycle, self.taken = state["length"], state["cycle"], state["taken"]
        self.rng.bit_generator.state = state["rng"]
        self.cut = self._cut_rows()

    def take(self, count: int, length: int) -> np.ndarray:
        """The next rows of text, ``[count, length + 1]`` int64."""
        if length != self.length:
            self.length, self.cycle, self.taken = length, self.cycle + 1, 0
            self.cut = self._cut_rows()
        rows = []
        while len(rows) < count:
            if self.taken == len(self.cut):
                self.cycle, self.taken = self.cycle + 1, 0
                self.cut = self._cut_rows()
            rows.append(self.cut[self.taken])
            self.taken += 1
        return np.stack(rows).astype(np.int64)

    def _cut_rows(self) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, self.length, self.cycle))
        rows: list[np.ndarray] = []
        rests: dict[str, list[np.ndarray]] = {}
        for index in rng.permutation(len(self.files)):
            ids, folder = self.files[index], self.folders[index]
            start = int(rng.integers(0, self.length)) if len(ids) > 2 * self.length else 0
            if start:
                rests.setdefault(folder, []).append(ids[:start])
            for begin in range(start, len(ids), self.length):
                chunk = ids[begin : begin + self.length]
                if len(chunk) == self.length:
                    rows.append(np.concatenate(([self.bos], chunk)))
                else:
                    rests.setdefault(folder, []).append(chunk)
        joined: list[np.ndarray] = []
        for folder in sorted(rests, key=lambda name: (name.split("/")[0], name)):
            for rest in rests[folder]:
                joined += [np.array([self.bos]), rest]
        stream = np.concatenate(joined)
        for begin in range(0, len(stream) - self.length, self.length):
            rows.append(np.concatenate(([self.bos], stream[begin : begin + self.length])))
        return [rows[index].astype(np.int16) for index in rng.permutation(len(rows))]


def plant_repeats(
    rows: np.ndarray, share: float, cycles: float, rng: np.random.Generator, vocab_size: int
) -> np.ndarray:
    """Targets for ``rows``, of which a share got, in place, tokens that return later in the row.

    Of these rows, a share of ``cycles`` repeats one short random span over and over in a part of the row: with many
    copies in sight, looking up "what followed this token before" is learned quickly. The others get pairs (see
    ``_plant_pairs``), the hard case. What cannot be predicted is ignored: the first copy of a random span, the first
    token of any copy that text precedes, and the first token of the text that follows.
    """
    targets = rows[:, 1:].copy()
    for index in np.flatnonzero(rng.random(len(rows)) < share):
        plant = _plant_cycle if rng.random() < cycles else _plant_pairs
        plant(rows[index], targets[index], rng, vocab_size)
    return targets


def _plant_cycle(row: np.ndarray, target: np.ndarray, rng: np.random.Generator, vocab_size: int) -> None:
    room = min(len(row) - 2, 2048)
    period = _log_uniform(rng, 8, 96)
    size = int(rng.integers(min(4 * period, room), room + 1))
    begin = int(rng.integers(1, len(row) - size))
    row[begin : begin + size] = np.resize(rng.integers(3, vocab_size, period), size)
    target[begin - 1 : begin + size] = row[begin : begin + size + 1]
    target[begin - 1 : begin + period] = IGNORED
    target[begin + size - 1] = IGNORED


def _plant_pairs(row: np.ndarray, target: np.ndarray, rng: np.random.Generator, vocab_size: int) -> None:
    """Spans of 16 to 128 tokens, random (two of three) or text of the row, that return at a random distance.

    The distance is log-uniform or uniform up to the row length. Pairs are added until about half of the row belongs
    to one.
    """
    length = len(row) - 1
    free = np.ones(length + 1, dtype=bool)
    free[[0, -1]] = False
    for _ in range(length // 144 + 1):
        size = _log_uniform(rng, 16, 128)
        near, far = size + 1, length - size - 2
        distance = int(rng.integers(near, far)) if rng.random() < 0.4 else _log_uniform(rng, near, far)
        first = int(rng.integers(1, length - distance - size + 1))
        second = first + distance
        made_up = rng.random() < 0.67
        if not free[second : second + size + 1].all() or (
            made_up and not free[first : first + size + 1].all()
        ):
            continue
        if made_up:
            row[first : first + size] = rng.integers(3, vocab_size, size)
            free[first : first + size + 1] = False
            target[first - 1 : first + size] = IGNORED
        row[second : second + size] = row[first : first + size]
        free[second : second + size + 1] = False
        target[second - 1 : second + size - 1] = row[second : second + size]
        target[[second - 1, second + size - 1]] = IGNORED


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(np.log(low), np.log(high))))
