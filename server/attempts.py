"""How often somebody failed lately: after so many failures the next attempt is refused unseen.

Only failures count. A thousand clients behind one address that come back after a restart are let in, and a
stranger who guesses from the same address does not lock them out, as each key is counted by itself.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable

_MOST_REMEMBERED = 10_000


class Attempts:
    """Failures of a sliding window, by who failed; any thread, bounded memory.

    Args:
        most: failures within the window after which nothing more is tried.
        seconds: length of the window.
        clock: seconds that never go back.
    """

    def __init__(
        self, most: int = 10, seconds: float = 60.0, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._door = threading.Lock()
        self._failures: OrderedDict[Hashable, deque[float]] = OrderedDict()

    def wait(self, who: Hashable) -> float:
        """Seconds until `who` may try again; 0 now."""
        with self._door:
            times = self._recent(who)
            if len(times) < self._most:
                return 0.0
            return max(times[0] + self._seconds - self._clock(), 0.001)

    def failed(self, who: Hashable) -> None:
        """Count a failure."""
        with self._door:
            times = self._recent(who)
            times.append(self._clock())
            self._failures[who] = times
            self._failures.move_to_end(who)
            while len(self._failures) > _MOST_REMEMBERED:
                self._failures.popitem(last=False)

    def _recent(self, who: Hashable) -> deque[float]:
        times = self._failures.get(who)
        if times is None:
            return deque(maxlen=self._most)
        oldest = self._clock() - self._seconds
        while times and times[0] <= oldest:
            times.popleft()
        if not times:
            del self._failures[who]
        return times
