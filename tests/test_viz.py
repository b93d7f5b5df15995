"""Pictures of block maps."""

from __future__ import annotations

import numpy as np
import pytest

from cusparge import viz
from cusparge.errors import InvalidArgumentError, UnsupportedError


def test_one_character_for_each_block(rng):
    mask = rng.random((5, 9)) < 0.5
    text = viz.block_map_text(mask, ascii_only=True)
    assert text == "\n".join("".join(".#"[block] for block in row) for row in mask.astype(int))
    assert viz.block_map_text(mask) == text.translate({ord("."): "·", ord("#"): "█"})


def test_unreachable_blocks_are_blank():
    reachable = np.tri(3, dtype=bool)
    text = viz.block_map_text(np.eye(3, dtype=bool), reachable=reachable, ascii_only=True)
    assert text.split("\n") == ["#  ", ".# ", "..#"]


@pytest.mark.parametrize("shape", [(1, 73), (64, 128), (129, 1000), (3, 144)])
def test_large_maps_shrink_to_the_width(rng, shape):
    mask = rng.random(shape) < 0.5
    lines = viz.block_map_text(mask, width=72, ascii_only=True).split("\n")
    step = -(-shape[1] // 72)
    assert len(lines) == -(-shape[0] // step)
    assert {len(line) for line in lines} == {-(-shape[1] // step)}
    for i, line in enumerate(lines):
        for j, letter in enumerate(line):
            cell = mask[i * step : (i + 1) * step, j * step : (j + 1) * step]
            if cell.all() or not cell.any():
                assert letter == (".#"[int(cell.any())])
            else:
                assert letter == "-+*"[min(2, int(cell.mean() * 3))]


def test_text_of_odd_maps():
    assert viz.block_map_text(np.zeros((0, 5), bool)) == ""
    for mask in (np.zeros(4, bool), np.zeros((1, 4, 4), bool)):
        with pytest.raises(InvalidArgumentError, match="two dimensions"):
            viz.block_map_text(mask)
    with pytest.raises(InvalidArgumentError, match="reachable"):
        viz.block_map_text(np.zeros((2, 2), bool), reachable=np.zeros((2, 3), bool))
    with pytest.raises(InvalidArgumentError, match="width"):
        viz.block_map_text(np.zeros((2, 2), bool), width=0)


@pytest.mark.parametrize("causal", [None, "bottom_right", "top_left"])
@pytest.mark.parametrize(("tokens_q", "tokens_k"), [(1, 1), (128, 64), (300, 200), (130, 401)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_block_mass_is_the_softmax_summed(rng, causal, tokens_q, tokens_k, dtype):
    q = (3 * rng.standard_normal((tokens_q, 24))).astype(dtype)
    k = rng.standard_normal((tokens_k, 24)).astype(dtype)
    options = {} if causal is None else {"causal": True, "causal_align": causal}
    mass = viz.block_mass(q, k, sm_scale=0.3, **options)
    scores = 0.3 * q.astype(np.float64) @ k.astype(np.float64).T
    if causal is not None:
        offset = tokens_k - tokens_q if causal == "bottom_right" else 0
        rows, columns = np.indices(scores.shape)
        scores[columns > rows + offset] = -np.inf
    weights = np.exp(scores)
    total = weights.sum(axis=1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    expected = [
        [weights[i : i + 128, j : j + 64].sum(axis=1).mean() for j in range(0, tokens_k, 64)]
        for i in range(0, tokens_q, 128)
    ]
    assert mass.dtype == np.float32
    np.testing.assert_allclose(mass, expected, rtol=2e-4, atol=1e-6)


def test_block_mass_default_scale_and_refusals(rng):
    q, k = rng.standard_normal((2, 150, 16))
    np.testing.assert_array_equal(viz.block_mass(q, k), viz.block_mass(q, k, sm_scale=0.25))
    assert viz.block_mass(q[:0], k).shape == (0, 3)
    with pytest.raises(InvalidArgumentError, match="one head"):
        viz.block_mass(q[None], k[None])
    with pytest.raises(InvalidArgumentError, match="one head"):
        viz.block_mass(q, k[:, :-1])


def test_figures_become_png(rng):
    pytest.importorskip("matplotlib")
    panels = [
        viz.Panel("a map with $\\broken maths", rng.random((4, 8)) < 0.5),
        viz.Panel("a mass", rng.random((4, 8))),
        viz.Panel("nothing", np.zeros((0, 8), bool)),
    ]
    for figure in (
        viz.draw_panels(panels, columns=2, title="$\\frac"),
        viz.draw_panels([], columns=2),
        viz.draw_curves([("head 0", [0, 0.5], [0, np.nan])], limit=0.05),
    ):
        content = viz.png(figure, dpi=40)
        assert content.startswith(b"\x89PNG\r\n\x1a\n")


def test_a_map_is_drawn_where_it_is(rng):
    pytest.importorskip("matplotlib")
    mask = rng.random((4, 8)) < 0.5
    image = viz.draw_panels([viz.Panel("", mask)], columns=1).axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), mask)
    assert image.axes.yaxis_inverted()  # the first query block on top


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match=r'pip install "cusparge\[plot\]"'):
        viz.draw_panels([], columns=1)
