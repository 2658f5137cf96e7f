"""Masks as pictures."""

import io
import pathlib

import numpy as np
from matplotlib import image

from cv2jax.evaluation.mask_picture import EXAMPLES, PATH, draw_masks
from cv2jax.nn.masks import NO_CHUNK, ChunkMask

EARLIER, LATER = (np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in ("#9dbcd9", "#3f6f9f"))


def shares(png):
    """Shares of the picture that are seen keys before the query (and itself), and after it."""
    pixels = np.round(255 * image.imread(io.BytesIO(png))[..., :3]).astype(int)
    return [(np.abs(pixels - colour).max(axis=-1) < 2).mean() for colour in (EARLIER, LATER)]


def test_a_square_holds_what_is_seen_and_what_of_it_is_look_ahead():
    full, causal, chunk = (shares(draw_masks({"a": ChunkMask(chunk=c)}, 8)) for c in (NO_CHUNK, 1, 2))
    assert causal[1] == 0
    assert full[0] == causal[0] == chunk[0] > 0.1
    np.testing.assert_allclose(full[1] / full[0], 28 / 36, rtol=0.03)
    np.testing.assert_allclose(chunk[1] / chunk[0], 4 / 36, rtol=0.1)


def test_a_mask_more_is_a_wider_picture():
    one, all_of_them = (image.imread(io.BytesIO(draw_masks(m))) for m in ({"a": ChunkMask(chunk=1)}, EXAMPLES))
    assert one.shape[0] == all_of_them.shape[0]
    assert all_of_them.shape[1] == len(EXAMPLES) * one.shape[1]


def test_the_docs_show_the_masks_as_they_are():
    committed = (pathlib.Path(__file__).parents[2] / PATH).read_bytes()
    drawn, now = (later / earlier for earlier, later in map(shares, (committed, draw_masks(EXAMPLES))))
    np.testing.assert_allclose(drawn, now, rtol=0.03)  # fonts may make the squares smaller
