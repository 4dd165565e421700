"""How a Pathfinder image is drawn: the benchmark's parameters for each resolution."""

from dataclasses import dataclass

CONTOUR_LENGTHS = (6, 9, 14)
"""Paddles of a contour at the levels easy, intermediate and hard; the benchmark takes the last."""


DRAWINGS = ("published", "turned", "even")
"""By the rules of the published generator, with its flaws; the same, each image then turned and mirrored at random; or
without the flaws. See `generator`."""


@dataclass(frozen=True)
class Style:
    """Lengths are in pixels of the image; see `lra.tasks.pathfinder.generator` for what they mean.

    window           side of the image
    padding          width of the frame that no contour enters
    margins          half of the gap between two paddles of a contour; one value is chosen for each image
    paddle_length, thickness, marker_radius
    seed_distance    between the first tips of the two contours; twice that to the border
    continuity       how straight contours run: a turn by d is weighted cos²(continuity·d)
    distractor_ink   paddles of all distractors together: their number is this over their length
    contrast         of a distractor; a paddle of a target contour has contrast·paddle_contrast
    """

    window: int
    margins: tuple[int, ...]
    paddle_length: int
    thickness: float
    marker_radius: float
    seed_distance: int
    continuity: float
    distractor_ink: int
    contrast: float
    paddle_contrast: float
    padding: int = 1

    def distractors(self, contour_length: int) -> tuple[int, int]:
        """Number of distractors, and paddles of each."""
        length = contour_length // 3
        return self.distractor_ink // length, length


STYLES = {
    32: Style(
        window=32,
        margins=(1,),
        paddle_length=2,
        thickness=0.5,
        marker_radius=1.5,
        seed_distance=7,
        continuity=1.0,
        distractor_ink=20,
        contrast=2.0,
        paddle_contrast=0.75,
    ),
    128: Style(
        window=128,
        margins=(2, 3),
        paddle_length=5,
        thickness=1.5,
        marker_radius=3.0,
        seed_distance=20,
        continuity=1.8,
        distractor_ink=35,
        contrast=0.9,
        paddle_contrast=1.0,
    ),
}
"""By resolution: those of Pathfinder and Path-X (Tay et al. 2020, docstrings of their data/pathfinder.py)."""
