"""What an attempt tells while it works."""

from __future__ import annotations

import os
import threading
import time
import traceback
from datetime import UTC, datetime, timedelta
from typing import Any

from tpv import Client
from tpv.errors import JobFinished, StaleAttempt
from tpv.schemas.jobs import AttemptStarted, EventReport

SEND_EVERY = 1.0  #: seconds between two reports
LIMIT = 1000  #: events in one report


class Events:
    """Sends what happens, once a second, from a thread of its own: training never waits for the network."""

    def __init__(self, client: Client, started: AttemptStarted) -> None:
        self.client, self.started = client, started
        self._pending: list[EventReport] = []
        self._adding, self._sending = threading.Lock(), threading.Lock()
        self._began, self._clock = datetime.now(UTC), time.perf_counter()
        self._newest = self._began
        threading.Thread(target=self._send_for_ever, daemon=True).start()

    def phase(self, message: str) -> None:
        self.add("phase", message=message)

    def log(self, message: str) -> None:
        self.add("log", message=message)

    def warning(self, message: str) -> None:
        self.add("warning", message=message)

    def add(self, type: str, **data: Any) -> None:  # noqa: A002 # the wire's name
        with self._adding:
            # Times grow, whatever is done to the clock: by them the service knows a report that comes a second time.
            now = self._began + timedelta(seconds=time.perf_counter() - self._clock)
            self._newest = max(now, self._newest + timedelta(microseconds=1))
            self._pending.append(EventReport(type=type, at=self._newest, data=data))

    def flush(self) -> None:
        """Sends everything that has been added; what cannot be sent now is sent with the next events."""
        with self._sending:
            while batch := self._pending[:LIMIT]:
                self.client.jobs.report_events(self.started.job, self.started.number, batch)
                with self._adding:
                    del self._pending[: len(batch)]

    def _send_for_ever(self) -> None:
        while True:
            time.sleep(SEND_EVERY)
            try:
                self.flush()
            except (StaleAttempt, JobFinished):
                os._exit(0)  # the work is for nobody any more; a result would be refused
            except Exception:
                traceback.print_exc()
