"""A tokenizer whose texts are their own tokens: "5 6 7" is 5, 6, 7."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_sparse.documents import Document


@dataclass(frozen=True)
class Numbers:
    """PAD 1, MASK 3 and the special tokens around a text; the words are 8 to 63."""

    bos_token_id: int | None = 2
    eos_token_id: int | None = None
    pad_token_id: int | None = 1
    mask_token_id: int | None = 3
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def all_special_ids(self):
        return [*range(8)]

    def get_vocab(self):
        return {str(number): number for number in range(64)}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [int(word) if word.isdigit() else 9 for word in text.split()]
        return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}


ENCODER = Numbers(bos_token_id=None, before=(4,), after=(5, 6))


def written(sizes: Sequence[int]) -> list[Document]:
    """Return documents of these numbers of tokens, no two of them equal in their first tokens."""
    return [
        Document(f"d{number}", " ".join(str(8 + (number * 17 + i * 7) % 56) for i in range(size)))
        for number, size in enumerate(sizes)
    ]
