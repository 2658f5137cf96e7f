"""The mask ablation's table by hand."""

import io

from matplotlib import image

from cv2jax.evaluation.mask_ablation import MaskTimes, draw_masks_table, masks_table

DISTANCES = {"all": {"all": 0.5, "chunk 25": 0.9}, "mixed": {"all": 0.6, "chunk 25": 0.7}}
TIMES = {
    "all": MaskTimes(first_tokens=None, first_seconds=None, hop_seconds=None),
    "chunk 25": MaskTimes(first_tokens=28, first_seconds=0.0123, hop_seconds=0.02),
}


def test_the_best_of_each_mask_is_marked_and_what_cannot_stream_has_no_time():
    lines = masks_table(DISTANCES, TIMES, "Caption.").splitlines()
    assert lines[0] == "Caption."
    assert lines[2] == "|  | heard under all | heard under chunk 25 |"
    assert lines[4:] == [
        "| trained: all | 0.5000 * | 0.9000 |",
        "| trained: mixed | 0.6000 | 0.7000 * |",
        "| first audio: tokens | – | 28 |",
        "| first audio: solve, ms | – | 12.3 |",
        "| hop after 5 s, ms | – | 20.0 |",
    ]


def test_the_picture_shows_other_figures_when_they_change():
    png = draw_masks_table(DISTANCES, TIMES, "Caption.")
    assert image.imread(io.BytesIO(png)).shape[1] > 800
    assert png != draw_masks_table(DISTANCES | {"mixed": {"all": 0.9, "chunk 25": 0.1}}, TIMES, "Caption.")
