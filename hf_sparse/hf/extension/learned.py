"""Learned positions: a table of embeddings made longer by repeating it.

As the Longformer paper makes RoBERTa read 4,096 tokens (Beltagy et al., 2020, arXiv:2004.05150): but for the joints of
the copies, a token and its neighbours have positions that were learned as neighbours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..active import unwrap
from .rotary import rotary_modules


@dataclass(frozen=True, eq=False)
class PositionTable:
    """The embeddings of positions; the first `offset` rows are no positions of tokens (RoBERTa and OPT: 2)."""

    name: str
    module: nn.Embedding
    offset: int

    @property
    def learned(self) -> int:
        """Tokens it has positions for."""
        return self.module.num_embeddings - self.offset


def position_tables(model: Any) -> list[str]:
    """Return the names of the model's learned position embeddings, [] where it has none: for ``modules_to_save``."""
    table = find_table(unwrap(model))
    return [] if table is None else [table.name]


def find_table(model: PreTrainedModel) -> PositionTable | None:
    """Return the table of learned positions, None where the model has none, or not one alone.

    It is the one embedding that has a row more when transformers builds the model for one position more.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if rotary_modules(model) or not isinstance(positions, int) or model.config.is_encoder_decoder:
        return None
    names = {
        name.removesuffix(".weight"): shape for name, shape in _changes(model, positions + 1).shapes.items()
    }
    tables = [name for name in names if isinstance(_part(model, name), nn.Embedding)]
    if len(tables) != 1:
        return None
    module: Any = _part(model, tables[0])
    if names[tables[0]][0] != module.num_embeddings + 1 or "Sinus" in type(module).__name__:
        return None
    offset = getattr(module, "offset", None)
    if offset is None:
        offset = 0 if module.padding_idx is None else module.padding_idx + 1
    return PositionTable(tables[0], module, offset)


def repeat_table(model: PreTrainedModel, table: PositionTable, config: Any, length: int) -> None:
    """Make the table, and what goes with it, long enough for `length` tokens, and set the number in `config`.

    Row `offset + i` becomes a copy of row ``offset + i % learned``. The caller then gives the model that config.

    Raises:
        ValueError: the model holds something else for each position that cannot be made longer.
    """
    text = config.get_text_config()
    text.max_position_embeddings += length - table.learned
    changes = _changes(model, text.max_position_embeddings)
    longer: dict[str, Tensor] = {}
    for name, shape in changes.shapes.items():
        if name == f"{table.name}.weight":
            old = table.module.weight.detach()
            place = torch.arange(length, device=old.device) % table.learned + table.offset
            longer[name] = torch.cat((old[: table.offset], old[place]))
        else:
            longer[name] = _longer(name, shape, model)
    # Only now, when nothing can fail any more.
    for name, tensor in longer.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        trained = owner is table.module and table.module.weight.requires_grad
        setattr(owner, leaf, nn.Parameter(tensor, trained) if owner is table.module else tensor)
    for (path, leaf), number in changes.numbers.items():
        setattr(model.get_submodule(path), leaf, number)


def _longer(name: str, shape: torch.Size, model: PreTrainedModel) -> Tensor:
    """Return one of the model's tensors of ids, 0, 1, 2, ... or all 0, in its new shape."""
    old = _part(model, name)
    for values in (torch.arange, torch.zeros):
        if not old.is_floating_point() and torch.equal(old, values(old.shape[-1]).to(old).expand(old.shape)):
            return values(shape[-1]).to(old).expand(shape).contiguous()
    raise ValueError(
        f"{type(model).__name__} holds {name} for a fixed number of positions, which 'copy' cannot make longer; "
        "use a model such as BERT, RoBERTa, GPT-2 or OPT"
    )


@dataclass(frozen=True)
class _Changes:
    """What another number of positions changes in a model: tensors by name, numbers by module and attribute."""

    shapes: dict[str, torch.Size]
    numbers: dict[tuple[str, str], int]


def _changes(model: PreTrainedModel, positions: int) -> _Changes:
    """Return what is different, of all the model has, when transformers builds it for that many positions."""
    now, then = (
        _built_for(model, n) for n in (model.config.get_text_config().max_position_embeddings, positions)
    )
    own = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    shapes = {name: tensor.shape for name, tensor in _tensors(now) if name in own}
    modules = {path for path, _ in model.named_modules()}
    numbers = {(path, name): value for path, name, value in _numbers(now) if path in modules}
    return _Changes(
        {name: new.shape for name, new in _tensors(then) if shapes.get(name, new.shape) != new.shape},
        {(path, name): new for path, name, new in _numbers(then) if numbers.get((path, name), new) != new},
    )


def _built_for(model: PreTrainedModel, positions: int) -> PreTrainedModel:
    """Return the model, without weights, as transformers builds it for that many positions."""
    config = copy.deepcopy(model.config)
    config.get_text_config().max_position_embeddings = positions
    with torch.device("meta"):
        return type(model)(config)


def _part(model: nn.Module, name: str) -> Any:
    """Return the module, parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _numbers(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    """Yield module, name and value of whole numbers; an embedding keeps its rows, OPT its positions."""
    for path, module in model.named_modules():
        yield from ((path, name, value) for name, value in vars(module).items() if type(value) is int)
