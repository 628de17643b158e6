"""The API server of the TPV registry."""
