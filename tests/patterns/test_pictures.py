"""The pictures in the docstring of a pattern's module are the masks it computes."""

import re
import sys

import pytest
import torch

import hf_sparse
from hf_sparse import available_patterns
from hf_sparse.patterns import pattern_class


def pictures(cls):
    """Yield (pattern, label, mask) of every picture in the docstring of a pattern's module.

    A line with a pattern and a colon begins the pictures of that pattern. Behind its keys a picture names the head,
    layer and direction it shows, or nothing: ``key  0 1 2     layer 1, head 0 of 2``.
    """
    pattern, label, rows = None, None, []
    for line in [*sys.modules[cls.__module__].__doc__.splitlines(), ""]:
        if call := re.fullmatch(rf"({cls.__name__}\(.*\)):", line):
            pattern = eval(call[1], vars(hf_sparse))  # noqa: S307 - our own docstring
        elif header := re.fullmatch(r" +key +([\d ]+?)(?: {2,}(\D.*))?", line):
            label = header[2] or ""
        elif label is not None and re.match(r" +\d+ ", line):
            rows.append([cell == "x" for cell in re.findall(r"[x.]", line)])
        elif rows:
            yield pattern, label, torch.tensor(rows)
            label, rows = None, []


@pytest.mark.parametrize("name", available_patterns())
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
        assert torch.equal(mask[head], picture), f"{pattern} {label}"


@pytest.mark.parametrize("name", available_patterns())
def test_heads_that_differ_have_a_picture_each(name):
    for pattern, label, picture in pictures(pattern_class(name)):
        if "head" not in label and "layer" not in label and name != "random" and name != "bigbird":
            assert (pattern.mask(len(picture), heads=2).diff(dim=0) == 0).all(), (
                f"{pattern} draws one head only"
            )
