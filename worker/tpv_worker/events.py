"""What an attempt tells while it works."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
import warnings
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from tpv import Client
from tpv.errors import Invalid, JobFinished, StaleAttempt, TooLarge
from tpv.schemas.jobs import AttemptStarted, EventReport

SEND_EVERY = 1.0  #: seconds between two reports
LIMIT = 1000  #: events in one report


class Events:
    """Sends what happens, once a second, from a thread of its own: training never waits for the network."""

    def __init__(self, client: Client, started: AttemptStarted) -> None:
        self.client, self.started = client, started
        self._pending: list[EventReport] = []
        # A warning that is heard while this thread adds an event, as when it collects garbage, is one more event.
        self._adding, self._sending = threading.RLock(), threading.Lock()
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

    def listen(self) -> None:
        """From now on also tells what `logging`, from WARNING on, and `warnings` say in this process, each text once.

        They still write where they wrote before. Records are heard where they are made: the loggers of transformers and
        torch hand theirs to nobody above them.
        """
        heard = set[str]()

        def tell(text: str) -> None:
            if text not in heard:
                heard.add(text)
                self.log(text)

        make, show = logging.getLogRecordFactory(), warnings.showwarning

        def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
            made = make(*args, **kwargs)
            with suppress(Exception):  # a message that does not fit its arguments is the handlers' to report
                if made.levelno >= logging.WARNING:
                    tell(f"{made.name}: {made.getMessage()}")
            return made

        def warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
            show(message, category, *args, **kwargs)
            tell(f"{category.__name__}: {message}")

        logging.setLogRecordFactory(record)
        warnings.showwarning = warning

    def flush(self) -> None:
        """Sends everything that has been added; what cannot be sent now is sent with the next events.

        What the service refuses to take is dropped: it would be refused for ever, and hold up all that comes after it.
        """
        with self._sending:
            while batch := self._pending[:LIMIT]:
                try:
                    self.client.jobs.report_events(self.started.job, self.started.number, batch)
                except (Invalid, TooLarge):
                    traceback.print_exc()
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


class Untold(Events):
    """Of a process beside the first one of an attempt, which tells what happens to all of them."""

    def __init__(self) -> None:
        pass

    def add(self, type: str, **data: Any) -> None:  # noqa: A002 # the wire's name
        pass

    def listen(self) -> None:
        pass

    def flush(self) -> None:
        pass
