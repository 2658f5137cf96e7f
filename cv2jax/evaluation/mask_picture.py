"""Chunk masks as small squares, for the docs; `python -m cv2jax.evaluation.mask_picture` draws docs/masks.png anew."""

import io
import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from cv2jax.nn.masks import NO_CHUNK, ChunkMask

PATH = pathlib.Path("docs/masks.png")
NUM_POSITIONS = 12
EXAMPLES = {
    "non-causal": ChunkMask(chunk=NO_CHUNK),
    "full-causal": ChunkMask(chunk=1),
    "chunk M = 2": ChunkMask(chunk=2),
    "chunk 2M = 4": ChunkMask(chunk=4),
    "chunk 2, left 2": ChunkMask(chunk=2, left=2),
    "chunk 2, left 2, prompt 3": ChunkMask(chunk=2, left=2, prompt=3),
}
_COLOURS = ("#ffffff", "#9dbcd9", "#3f6f9f")  # not seen; seen, earlier; seen, though later than the query


def draw_masks(masks: Mapping[str, ChunkMask], num_positions: int = NUM_POSITIONS) -> bytes:
    """PNG: a square a mask under its name, of `num_positions` queries (rows) and keys (columns); dark is look-ahead."""
    figure = Figure(figsize=(1.9 * len(masks), 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    positions = np.arange(num_positions)
    queries, keys = positions[:, None], positions[None]
    for axes, (name, mask) in zip(figure.subplots(1, len(masks), squeeze=False)[0], masks.items(), strict=True):
        shade = mask.sees(queries, keys) * (1 + (keys > queries))
        axes.pcolormesh(shade, cmap=ListedColormap(_COLOURS), vmin=0, vmax=2, edgecolors="#d0d0d0", linewidth=0.5)
        axes.set(aspect="equal", xticks=[], yticks=[], xlabel="key →")
        axes.set_title(name, fontsize=9)
        axes.invert_yaxis()
    figure.axes[0].set_ylabel("← query")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


if __name__ == "__main__":
    PATH.write_bytes(draw_masks(EXAMPLES))
