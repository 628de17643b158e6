"""Similarity and grouping queries over the registry's vectors."""
