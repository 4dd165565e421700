"""Whether Pathfinder can be guessed without following a contour, and whether it can be learned at all."""
