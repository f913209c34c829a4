"""Moments at which a coordinator can be made to die, so that coming back is tested at each of them.

``FEDSIM_FAILPOINT=NAME:N`` ends the process the N-th time that it reaches the point, as a kill would: no
handler runs, no buffer is flushed. Without the variable a point costs a comparison.
"""

from __future__ import annotations

import os

POINTS = {
    "before_plan": "a cohort was drawn, and nothing of it is written",
    "after_plan": "the tasks of a round are durable, and nobody was offered one",
    "update_appended": "the bytes of an update are in the segment, its row is not",
    "before_accept": "an update's row is in an open transaction",
    "after_accept": "an update is durable, and nobody knows it yet",
    "after_settle": "a round closed without everybody, and nothing is folded",
    "one_folded": "the first answer of a round is folded",
    "before_lines": "a round is aggregated, and nothing of it is written",
    "after_lines": "a round's lines are in the run folder, its state is not",
    "after_state": "a round's state is a file that no row names",
    "after_commit": "a round is committed, and nothing old is cleared away",
    "after_clearing": "a round is committed and cleared up, the next one not begun",
    "before_finish": "the last round is committed, the run folder is not complete",
    "after_end": "a run is over, and nothing of it is cleared away",
    "object_renamed": "an upload became an object that no answer names",
    "upload_synced": "a part of an upload is on the disk, its offset is not",
}
"""Every point, and what is on the disk when it is reached."""

KILLED = 137

_name, _left = "", 0


def arm(text: str) -> None:
    """Die the N-th time at a point, ``NAME:N``; never, where the text is empty.

    Raises:
        ValueError: there is no such point.
    """
    global _name, _left
    _name, _, count = text.partition(":")
    if _name and _name not in POINTS:
        raise ValueError(f"no fail point is called {_name!r}: {', '.join(POINTS)}")
    _left = int(count or 1)


def reached(point: str) -> None:
    """Die here if that is wanted."""
    global _left
    if point == _name:
        _left -= 1
        if _left == 0:
            os._exit(KILLED)


arm(os.environ.get("FEDSIM_FAILPOINT", ""))
