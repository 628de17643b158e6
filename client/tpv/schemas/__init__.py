"""The wire: every message between client, service and worker, one module a noun."""
