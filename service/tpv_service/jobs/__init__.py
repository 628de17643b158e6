"""Jobs: what users ask of the workers, and what workers report."""
