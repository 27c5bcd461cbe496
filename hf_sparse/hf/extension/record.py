"""What is kept of an extension: its method and length, in the model's config and beside an adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..active import unwrap

ROTARY_METHODS = ("linear", "dynamic", "ntk", "yarn")
LEARNED_METHODS = ("copy",)
METHODS = (*ROTARY_METHODS, *LEARNED_METHODS)
KEY = "position_extension"  # in the text model's config
EXTENSION = "extension"  # beside an adapter, next to the pattern


@dataclass(frozen=True)
class Extension:
    """How a model was made to read `length` tokens."""

    method: str
    length: int

    def __str__(self) -> str:
        return f"extended to {self.length} tokens by {self.method!r}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def extension_from_json(saved: Any, where: str) -> Extension:
    """Return the extension that was saved in `where`; raise ValueError for what `Extension.to_json` does not write."""
    if (
        not isinstance(saved, dict)
        or saved.keys() != {"method", "length"}
        or saved["method"] not in METHODS
        or type(saved["length"]) is not int
        or saved["length"] < 1
    ):
        raise ValueError(
            f"{where} holds no usable extension of positions, got {str(saved)[:80]}; it needs a method "
            f"({', '.join(METHODS)}) and a length in tokens, update hf_sparse or save it again"
        )
    return Extension(**saved)


def extension_of(model: Any) -> Extension | None:
    """Return how the model was extended, None where it was not."""
    base = unwrap(model)
    saved = getattr(base.config.get_text_config(), KEY, None)
    return None if saved is None else extension_from_json(saved, f"the config of {type(base).__name__}")


def readable_tokens(model: Any) -> int | None:
    """Return how many tokens a model was trained, or extended, to read at once; None where its config does not say."""
    base = unwrap(model)
    if (extension := extension_of(base)) is not None:
        return extension.length
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    for name, module in base.named_modules():  # RoBERTa begins to count behind the padding's position
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.num_embeddings - module.padding_idx - 1)
    return positions
