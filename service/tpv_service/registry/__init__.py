"""Initializations, vectors, versions, aliases: what the registry keeps."""
