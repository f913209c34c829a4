"""Nonces: what a caller signs to prove that its request was made now, for this coordinator.

A nonce is the time, random bytes, and an HMAC over both with a key that lives as long as the process. So
nothing is stored when one is given out, and whoever asks for a million of them fills no memory; only those
that were used are remembered, for as long as they would be accepted.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable

NONCE_BYTES = 32
NONCE_SECONDS = 60.0
_TIME, _RANDOM = 8, 8


class Nonces:
    """Nonces of one process; any thread.

    Args:
        seconds: for which a nonce is accepted.
        clock: seconds that never go back.
    """

    def __init__(
        self, seconds: float = NONCE_SECONDS, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._key = secrets.token_bytes(32)
        self._seconds = seconds
        self._clock = clock
        self._door = threading.Lock()
        self._used: dict[bytes, float] = {}  # in the order of their use

    def new(self) -> bytes:
        """A nonce (32 bytes) that was not given out before."""
        stamp = int(self._clock() * 1e6).to_bytes(_TIME, "big") + secrets.token_bytes(_RANDOM)
        return stamp + self._mac(stamp)

    def fresh(self, nonce: bytes) -> bool:
        """Whether this process made the nonce, recently, and it was not used."""
        stamp = nonce[: _TIME + _RANDOM]
        if len(nonce) != NONCE_BYTES or not hmac.compare_digest(nonce[len(stamp) :], self._mac(stamp)):
            return False
        age = self._clock() - int.from_bytes(stamp[:_TIME], "big") / 1e6
        with self._door:
            return age <= self._seconds and nonce not in self._used

    def use(self, nonce: bytes) -> bool:
        """Use a nonce up; False where it is not fresh any more. Of two callers at once one is told True."""
        if not self.fresh(nonce):
            return False
        now = self._clock()
        with self._door:
            while self._used and now - next(iter(self._used.values())) > self._seconds:
                del self._used[next(iter(self._used))]
            if nonce in self._used:
                return False
            self._used[nonce] = now
            return True

    def _mac(self, stamp: bytes) -> bytes:
        return hmac.digest(self._key, stamp, hashlib.sha256)[: NONCE_BYTES - len(stamp)]
