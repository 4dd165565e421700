"""Retrieval without the internet: pairs of manual pages, with and without a reference between them."""

from lra.tasks.retrieval_manuals.task import RetrievalManuals

__all__ = ["RetrievalManuals"]
