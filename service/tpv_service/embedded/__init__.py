"""The registry with nothing installed beside it: PostgreSQL, API and workers as one tree of processes."""

from tpv.errors import TpvError


class EmbeddedError(TpvError):
    """The embedded stack cannot start or go on; the text says why and what to do."""
