"""A flow as a moving picture, from the base to the data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image

from cnf.plot.array import thin
from cnf.plot.course import draw_density
from cnf.plot.paper import MODEL, Extent, closed_frame, dots, new_figure
from cnf.replace import replacing

DOTS_PER_INCH = 90
LAST = 1500  # milliseconds that the last picture stays
COLORS = 128


def flow_frames(
    times: ArrayLike,
    points: ArrayLike,
    extent: Extent,
    log_density_grids: ArrayLike | None = None,
    title: str = "",
) -> list[np.ndarray]:
    """Pictures (height, width, 3) in bytes, one for each time: the points, and beside them the
    density, if it is given.

    times: (k,); points: (k, n, dim), of which the first two columns are drawn; log_density_grids:
    (k, rows, columns) in nats, the first row at the bottom.
    """
    moments, where = np.ravel(np.asarray(times, float)), np.asarray(points, float)
    grids = None if log_density_grids is None else np.asarray(log_density_grids, float)
    for name, values in (("points", where), ("densities", grids)):
        if values is not None and (values.ndim != 3 or len(values) != len(moments)):
            raise ValueError(f"{name} have shape {values.shape}, for {len(moments)} times")
    frames = []
    for k, moment in enumerate(moments):
        figure = new_figure(4.0 if grids is None else 7.6, 4.0, title)
        panels = np.atleast_1d(figure.subplots(1, 1 if grids is None else 2))
        for axes in panels:
            closed_frame(axes, f"t = {moment:.2f}", extent)
        dots(panels[-1], thin(where[k, :, :2]), MODEL)
        if grids is not None:
            draw_density(panels[0], grids[k], extent)
        frames.append(_pixels(figure))
    return frames


def save_animation(
    frames: Sequence[np.ndarray], path: str | os.PathLike[str], seconds: float = 4.0
) -> Path:
    """The path of the GIF, which runs for so many seconds, waits and starts again; written whole
    or not at all.
    """
    if not len(frames):
        raise ValueError("there are no frames to save")
    target = Path(path)
    each = max(20, round(1000 * seconds / len(frames)))
    durations = [*[each] * (len(frames) - 1), max(each, LAST)]
    # one palette for all: colours that change from frame to frame flicker
    middle = Image.fromarray(np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]]))
    palette = middle.quantize(COLORS)
    first, *rest = (
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    )
    settings: dict[str, Any] = {"append_images": rest, "duration": durations, "loop": 0}
    with replacing(target) as file:
        first.save(file, format="GIF", save_all=True, **settings)
    return target


def _pixels(figure: Figure) -> np.ndarray:
    figure.set_dpi(DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
