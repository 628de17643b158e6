"""The processes that train: jobs of the registry run here, with torch and transformers."""
