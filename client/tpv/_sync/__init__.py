# Generated from client/tpv/_async/__init__.py by scripts/unasync.py; change that file instead.
# ruff: noqa
# fmt: off
"""The synchronous client."""
