"""The pictures in the docstring of a pattern's module are the masks it computes, or the distances of the pairs."""

import re
import sys

import pytest
import torch

import hf_sparse
from hf_sparse.patterns import pattern_class, static_patterns


def pictures(cls):
    """Yield (pattern, label, mask) of every picture in the docstring of a pattern's module.

    A line with a pattern and a colon begins the pictures of that pattern. Behind its keys a picture names the head,
    layer and direction it shows, or nothing: ``key  0 1 2     layer 1, head 0 of 2``. After a line that ends in "at
    these distances:" it has numbers, the distances, and is an int64 tensor, -1 where there is no pair.
    """
    pattern, label, rows, numbers = None, None, [], False
    for line in [*sys.modules[cls.__module__].__doc__.splitlines(), ""]:
        if call := re.fullmatch(rf"({cls.__name__}\(.*\))( scores .* at these distances)?:", line):
            pattern = eval(call[1], vars(hf_sparse))  # noqa: S307 - our own docstring
            numbers = call[2] is not None
        elif header := re.fullmatch(r" +key +([\d ]+?)(?: {2,}(\D.*))?", line):
            label = header[2] or ""
        elif label is not None and re.match(r" +\d+ ", line):
            cells = line.split()[1:]
            rows.append([-1 if c == "." else int(c) for c in cells] if numbers else [c == "x" for c in cells])
        elif rows:
            width = len(rows) if numbers else 0  # keys after the query are left out
            yield pattern, label, torch.tensor([row + [-1] * (width - len(row)) for row in rows])
            label, rows = None, []


@pytest.mark.parametrize("name", static_patterns())
def test_the_pictures_in_the_docstring_are_the_mask(name):
    drawn = list(pictures(pattern_class(name)))
    assert drawn, f"{name} has no picture"
    for pattern, label, picture in drawn:
        assert picture.shape == (len(picture), len(picture))
        assert re.fullmatch(r"(bidirectional|layer \d+)?(, )?(head \d+ of \d+)?", label), label
        head, heads = map(
            int, found.groups() if (found := re.search(r"head (\d+) of (\d+)", label)) else (0, 1)
        )
        layer = int(found[1]) if (found := re.search(r"layer (\d+)", label)) else 0
        mask = pattern.mask(len(picture), heads=heads, causal="bidirectional" not in label, layer=layer)
        if picture.dtype == torch.int64:
            n = torch.arange(len(picture))
            distances = pattern.places(layer).distance(n[:, None], n)
            assert torch.equal(torch.where(mask[head], distances, -1), picture), f"{pattern} distances"
        else:
            assert torch.equal(mask[head], picture), f"{pattern} {label}"


@pytest.mark.parametrize("name", static_patterns())
def test_heads_that_differ_have_a_picture_each(name):
    for pattern, label, picture in pictures(pattern_class(name)):
        if "head" not in label and "layer" not in label and name != "random" and name != "bigbird":
            assert (pattern.mask(len(picture), heads=2).diff(dim=0) == 0).all(), (
                f"{pattern} draws one head only"
            )
