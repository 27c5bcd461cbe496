"""Preparing a model for a pattern that gives tokens other places than their own, and the position ids of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..patterns.places import Place
from .hooks import mask_owner
from .positions import find_rotations, learned_positions, position_kind
from .rotary import Rotation
from .routing import attention_layers, is_causal
from .stored_settings import SparseSettings

_NAME = "_hf_sparse_positions"  # attribute of the model that makes the masks


@dataclass(eq=False)
class Positions:
    """How a patched model whose pattern has places is told them.

    rotations: for each attention layer what turns its queries and keys, None where it has no rotary embeddings.
    learned: the last place of a token where places are given and positions are learned; then nothing is turned.
    table: how many positions have been learned; None in a model without such a table.
    """

    rotations: dict[int, Rotation | None] = field(default_factory=dict)
    learned: int | None = None
    table: int | None = None

    @property
    def placed(self) -> bool:
        """True where tokens have other places than their own."""
        return bool(self.rotations) or self.learned is not None


def set_positions(model: PreTrainedModel, settings: SparseSettings) -> None:
    """Prepare the model for the places of its pattern, if that has any.

    Raises:
        ValueError: the model cannot see tokens at other places than their own, with the reason.
    """
    remove_positions(model)
    routed = attention_layers(model.config.get_text_config())
    found = {places for layer in routed if (places := settings.pattern_at(layer).places(layer)) is not None}
    table = learned_positions(model) if _may_have_table(model) else None
    if not found:
        vars(mask_owner(model))[_NAME] = Positions(table=table)
        return
    name, pattern = type(model).__name__, settings.pattern
    if not is_causal(model):
        raise ValueError(
            f"{pattern} gives far keys other distances, which is defined for causal models, and {name} is "
            f"bidirectional; choose a pattern without (streaming_llm: positions='absolute')"
        )
    if position_kind(model) == "learned":
        positions = Positions(learned=_learned(model, settings, routed, table), table=table)
    else:
        positions = Positions(find_rotations(model))
    vars(mask_owner(model))[_NAME] = positions


def positions_of(module: nn.Module) -> Positions | None:
    """Return what `set_positions` left on the model that makes the masks."""
    return vars(module).get(_NAME)


def remove_positions(model: PreTrainedModel) -> None:
    vars(mask_owner(model)).pop(_NAME, None)


def put_positions(model: PreTrainedModel, positions: Positions | None) -> None:
    """Put back what `positions_of` returned earlier."""
    remove_positions(model)
    if positions is not None:
        vars(mask_owner(model))[_NAME] = positions


def _learned(
    model: PreTrainedModel, settings: SparseSettings, routed: Sequence[int], size: int | None
) -> int:
    """Return the last place of a token in a model that has learned `size` positions."""
    name = type(model).__name__
    every = {settings.pattern_at(layer).places(layer) for layer in routed}
    places = next(iter(every)) if len(every) == 1 else None
    if places is None or places.key != Place() or places.query.most is None:
        raise ValueError(
            f"{name} adds learned positions to its embeddings, once for all layers, so {settings.pattern} cannot give "
            f"far keys other distances; use streaming_llm with positions='cache' in all layers, or no places"
        )
    if size is not None and places.query.most >= size:
        raise ValueError(
            f"sinks and window of {settings.pattern} are {places.query.most + 1} places but {name} has learned {size}; "
            f"make the window at least {places.query.most + 1 - size} smaller"
        )
    return places.query.most


def _may_have_table(model: PreTrainedModel) -> bool:
    """True where there is an embedding besides that of tokens: finding out what it holds costs a forward pass."""
    tokens = model.get_input_embeddings()
    return any(isinstance(m, nn.Embedding) and m is not tokens for m in mask_owner(model).modules())


def place_ids(positions: Positions, tokens: Tensor, base: int) -> Tensor:
    """Return the position ids of tokens at these positions of their sequences, int64 of the same shape."""
    if positions.learned is not None:
        return tokens.clamp(max=positions.learned)
    return tokens - base
