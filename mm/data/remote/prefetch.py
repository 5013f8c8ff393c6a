"""Shards are brought into the cache before they are needed, by threads of the process that will read them."""

import threading
import time
from collections.abc import Iterable

from mm.data.remote.cache import Cache, Full
from mm.errors import UserError


class Prefetch:
    """Fetches what is wanted, the first first. The threads start with the first wish and never keep a process."""

    def __init__(self, cache: Cache, threads: int):
        self._cache, self._threads = cache, threads
        self._wishes: list[tuple[int, str]] | None = []  # the first one last; None: all is over
        self._changed = threading.Condition()
        self._running = 0

    def want(self, urls: Iterable[str]) -> None:
        """Fetch these; what was wanted before and has not begun is forgotten."""
        now, step = time.time_ns(), 10**6
        wishes = [(now - step * place, url) for place, url in enumerate(dict.fromkeys(urls))]
        with self._changed:
            self._wishes = wishes[::-1]
            for _ in range(min(self._threads - self._running, len(wishes))):
                self._running += 1
                threading.Thread(target=self._work, daemon=True, name="mm prefetch").start()
            self._changed.notify_all()

    def stop(self) -> None:
        """Begin no other transfer."""
        with self._changed:
            self._wishes = None
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._wishes == []:
                    self._changed.wait()
                if self._wishes is None:
                    self._running -= 1
                    return
                due, url = self._wishes.pop()
            try:
                self._cache.fetch_ahead(url, due)
            except Full:  # what is there must be used first
                with self._changed:
                    self._wishes = self._wishes and []
            except (OSError, UserError):  # the read will tell
                pass
