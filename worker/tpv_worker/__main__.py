"""`python -m tpv_worker` is `tpv worker`."""

import typer

from tpv_worker.cli import worker

typer.run(worker)
