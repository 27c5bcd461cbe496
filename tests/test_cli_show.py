"""hf-sparse show, and PATTERN however it is spelled: pictures and counts equal a loop over the definition."""

import itertools
import json
import re
import sys

import pytest

from hf_sparse.cli import main
from hf_sparse.hf.stored_settings import SparseSettings, settings_to_json
from hf_sparse.patterns import PerHead, PerLayer, get_pattern, pattern_to_json

WINDOW, STRIDED = get_pattern("sliding_window", window=3), get_pattern("strided", stride=4)


def show(capsys, *arguments):
    assert main(["show", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def drawn(text):
    """Return the pictures in a text, each a list of rows of True and False."""
    grids = []
    for line in text.splitlines():
        if re.match("key +0", line):
            grids += [[] for _ in line.split("key")[1:]]
        elif rows := re.findall(r"\d+ +((?:[x.] )*[x.])(?= |$)", line):
            for grid, row in zip(grids[-len(rows) :], rows, strict=True):
                grid.append([cell == "x" for cell in row.split()])
    return grids


def brute(n, allows, causal=True):
    return [[q == k or ((k <= q or not causal) and allows(q, k)) for k in range(n)] for q in range(n)]


def count(grid):
    return sum(map(sum, grid))


def costs(text):
    """Return the rows of the table, by length."""
    rows = [re.split(r" {2,}", line.strip()) for line in text.split("one layer: ")[1].splitlines()]
    return {int(row[0].replace(",", "")): row[1:] for row in rows if len(row) == 6 and row[0] != "tokens"}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_picture_and_counts_are_those_of_the_definition(causal, capsys):
    def allows(q, k):
        return abs(q - k) < 5 or k == 2 or (q == 2 and not causal)

    options = ["--window", 5, "--global-tokens", 2, "--heads", 4, "--kv-heads", 2, "--head-dim", 16]
    flags = [] if causal else ["--bidirectional"]
    text = show(capsys, "longformer", *options, "--length", 13, "--lengths", "7,40", *flags)
    (grid,) = drawn(text)
    assert grid == brute(13, allows, causal)
    dense = 91 if causal else 169
    assert f": {count(grid)} of {dense} pairs, density {count(grid) / dense:.1%} at 13 tokens" in text
    for n, (density, pairs, flops, step, limit) in costs(text).items():
        grid = brute(n, allows, causal)
        dense = n * (n + 1) // 2 if causal else n * n
        assert int(pairs) == count(grid)
        assert density == f"{100 * count(grid) / dense:.3g}%" and limit == f"{dense / count(grid):.2f}x"
        assert float(flops.split()[0]) * 1e3 == pytest.approx(4 * 16 * 4 * count(grid), rel=1e-3)
        read = sum(grid[-1]) * 2 * 2 * 16 * 4  # keys and values, 2 heads of them, head size 16, 4 bytes
        assert step == (f"{read / 1024:.4g} KiB" if causal else "none")
    assert set(costs(text)) == {7, 40}


def test_bytes_follow_the_dtype_and_units_the_size(capsys):
    for dtype, read in (("float32", "8 GiB"), ("bfloat16", "4 GiB"), ("float16", "4 GiB")):
        text = show(capsys, "full", "--dtype", dtype, "--lengths", 2**21, "--length", 1)
        assert costs(text)[2**21] == ["100%", f"{2**20 * (2**21 + 1):,}", "4.504 P", read, "1.00x"]


def test_heads_that_differ_are_drawn_once_each_under_their_numbers(capsys):
    text = show(
        capsys, "dilated_window", "--window", 3, "--dilation", "1,1,2,1", "--length", 9, "--lengths", 20
    )
    assert "heads 0-1, 3: density 53.3%" in text and "head 2: density" in text
    grids = drawn(text)
    expected = [brute(9, lambda q, k, d=d: q - k < 3 * d and (q - k) % d == 0) for d in (1, 2)]
    assert grids == expected
    mean = (3 * count(expected[0]) + count(expected[1])) / 4
    assert f": {mean:.1f} of 45 pairs per head" in text and "one layer: 4 heads, " in text


def test_many_pictures_stay_within_a_screen(capsys):
    text = show(capsys, "random", "--keys-per-query", 2, "--length", 20, "--lengths", 20, "--heads", 5)
    grids = drawn(text)
    assert len(grids) == 5 and all(len(grid) == 20 for grid in grids)
    for grid in grids:
        assert all(row[q] and min(2, q + 1) <= sum(row) <= min(3, q + 1) for q, row in enumerate(grid))
    assert max(len(line) for line in text.split("random(")[0].splitlines()) <= 120


def test_a_layer_is_chosen_and_the_number_of_layers_is_nobodys_business(capsys):
    command = ("longformer", "--window", "2,4", "--global-tokens", "", "--length", 8, "--lengths", 8)
    for layer, window in enumerate((2, 4)):
        text = show(capsys, *command, "--layer", layer)
        assert drawn(text) == [brute(8, lambda q, k, w=window: q - k < w)]
        assert f"\nlayer {layer}; the others may differ" in text


def test_options_that_adapt_to_the_length_are_resolved_when_asked(capsys):
    command = ("grouped_heads", "--length", 4, "--lengths", 4)
    assert "window=128" in show(capsys, *command) and "window=90" in show(capsys, *command, "--seq-len", 64)


def test_a_union_gives_an_option_to_every_member_that_has_it(capsys):
    text = show(capsys, "sliding_window | strided|streaming_llm", "--window", 2, "--stride", 5, "--sinks", 1)
    assert (
        "sliding_window(window=2) | strided(stride=5, anchor='relative') | streaming_llm(sinks=1, window=2), causal"
    ) in text
    assert drawn(text) == [brute(24, lambda q, k: q - k < 2 or (q - k) % 5 == 0 or k < 1)]
    assert show(capsys, "full|full", "--length", 3).splitlines()[5].startswith("full(), causal")


def test_a_stored_pattern_is_read_from_its_file(tmp_path, capsys):
    nested = PerLayer((STRIDED, PerHead((WINDOW, WINDOW | STRIDED))))
    settings = settings_to_json(SparseSettings(WINDOW, layers=(1, 3)))
    path = tmp_path / "pattern.json"
    command = (path, "--length", 9, "--lengths", 9)

    path.write_text(json.dumps(pattern_to_json(nested)))
    assert drawn(show(capsys, *command)) == [brute(9, lambda q, k: (q - k) % 4 == 0)]
    near, far = drawn(show(capsys, *command, "--layer", 1))
    assert near == brute(9, lambda q, k: q - k < 3)
    assert far == brute(9, lambda q, k: q - k < 3 or (q - k) % 4 == 0)

    for stored in (settings, {"model_type": "llama", "sparse_attention": settings}):
        path.write_text(json.dumps(stored))
        text = show(capsys, *command, "--layer", 1)
        assert drawn(text) == [near] and "the pattern is in layers 1, 3, the others are dense" in text
        assert drawn(show(capsys, *command)) == [brute(9, lambda q, k: True)]

    layers = [[0, 2, {"name": "full"}], [2, 3, pattern_to_json(WINDOW)]]
    path.write_text(json.dumps({"name": "layered", "options": {"layers": layers}}))
    assert drawn(show(capsys, *command, "--layer", 2)) == [near]


BLUE, ORANGE, GREEN = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0x00, 0x9E, 0x73)


def pixels(path):
    from matplotlib.image import imread

    image = (imread(path)[..., :3] * 255).round().astype(int)
    return [tuple(pixel) for row in image.tolist() for pixel in row]


def test_the_png_has_every_allowed_cell_at_the_same_size(tmp_path, capsys):
    path = tmp_path / "deep" / "mask.png"
    text = show(capsys, "sliding_window", "--window", 7, "--length", 200, "--png", path, "--lengths", 64)
    assert drawn(text) == [] and f"drawn: {path}" in text  # too long for text
    kept = count(brute(200, lambda q, k: q - k < 7))
    assert pixels(path).count(BLUE) == kept * 3 * 3  # 720 // 200 pixels a cell
    assert [entry.name for entry in path.parent.iterdir()] == ["mask.png"]


def test_the_png_has_a_panel_per_group_and_a_colour_per_part(tmp_path, capsys):
    path = tmp_path / "mask.png"
    path.write_text("something else")
    shown = ("bigbird", "--block", 4, "--random-blocks", 1, "--heads", 2, "--length", 100, "--lengths", 100)
    text = show(capsys, *shown, "--png", path)
    found = pixels(path)
    cell = (480 // 100) ** 2
    heads = drawn(text)
    assert len(heads) == 2
    far, sinks = 0, 0
    for q, k in itertools.product(range(100), range(100)):
        block, key_block = q // 4, k // 4
        if k <= q and block - key_block > 2:
            sinks += 2 * (key_block < 2)
            far += (key_block >= 2) * (heads[0][q][k] + heads[1][q][k])
    patch = found.count(ORANGE) - sinks * cell  # of the legend, as large for each colour
    assert 0 < patch < 2000
    assert found.count(GREEN) - far * cell == pytest.approx(patch, rel=0.1)


def test_matplotlib_is_imported_for_a_png_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    show(capsys, "full", "--length", 3)
    assert main(["show", "full", "--png", str(tmp_path / "a.png")]) == 2
    assert "plots need matplotlib; install it with" in capsys.readouterr().err


def test_a_png_that_cannot_be_written_leaves_the_old_one(tmp_path, capsys, monkeypatch):
    path = tmp_path / "mask.png"
    path.write_text("before")

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    assert main(["show", "full", "--length", "3", "--png", str(path)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert path.read_text() == "before" and [entry.name for entry in tmp_path.iterdir()] == ["mask.png"]


def test_a_picture_that_shows_nothing_says_how_to_see_more(capsys):
    hint = "at 24 tokens it leaves nothing out; give it smaller options, or draw more tokens (--length)"
    assert hint in show(capsys, "bigbird")
    assert hint not in show(capsys, "bigbird", "--block", 2)
    assert hint not in show(capsys, "full")
