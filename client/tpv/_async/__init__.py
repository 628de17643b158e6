"""The asynchronous client, written by hand; `tpv._sync` is generated from it by `scripts/unasync.py`."""
