"""The log of a coordinator: one line per record, no secrets, no power over terminals."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from fedsim.server.logs import MASK, JsonLines, Lines, fields, redacted, start_logging, stop_logging

log = logging.getLogger("fedsim.server.test")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("fedsim")
    levels = root.level, own.level
    yield
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def logged(form: str, *calls: object, level: str = "info") -> list[str]:
    """The lines that calls write."""
    stream = io.StringIO()
    handler = start_logging(form, level, stream=stream)
    try:
        for call in calls:
            call()  # type: ignore[operator]
    finally:
        stop_logging(handler)
    return stream.getvalue().splitlines()


def test_a_line_of_json_has_the_fields_that_were_given_and_no_others() -> None:
    (line,) = logged(
        "json",
        lambda: log.info(
            "committed", extra=fields(run="digits", round=12, node="ab", task=b"\x01\xff", dur_ms=4.5)
        ),
    )
    record = json.loads(line)
    assert record.pop("ts").endswith("Z")
    assert record == {
        "level": "info", "event": "committed", "run": "digits", "round": 12, "node": "ab", "task": "01ff",
        "dur_ms": 4.5, "logger": "fedsim.server.test",
    }  # fmt: skip


def test_an_unknown_field_is_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="no such field"):
        fields(ticket="x")


def test_numbers_that_json_does_not_know_are_null() -> None:
    (line,) = logged("json", lambda: log.info("x", extra=fields(dur_ms=float("nan"))))
    assert json.loads(line)["dur_ms"] is None


@pytest.mark.parametrize("form", ["json", "text"])
def test_names_of_others_cannot_forge_lines_or_steer_a_terminal(form: str) -> None:
    evil = "x\x1b[2J\r\n2025 INFO forged\u202e\x9b"
    lines = logged(form, lambda: log.info("joined name=%s", evil, extra=fields(node=evil)))
    assert len(lines) == 1
    assert lines[0].isprintable()


def test_a_line_for_people_names_what_it_is_about() -> None:
    (line,) = logged("text", lambda: log.warning("late", extra=fields(run="digits", round=3)))
    assert line.endswith("WARNING late  run=digits round=3")


def test_a_traceback_stays_one_line_of_json_and_several_for_people() -> None:
    def fail() -> None:
        try:
            raise ValueError("token=abcdef1234567890 is wrong")
        except ValueError:
            log.exception("it broke")

    (line,) = logged("json", fail)
    assert "ValueError" in json.loads(line)["error"]
    assert "abcdef1234567890" not in line
    shown = logged("text", fail)
    assert len(shown) > 3
    assert "abcdef1234567890" not in "".join(shown)


def test_arguments_that_do_not_fit_lose_no_line() -> None:
    record = logging.makeLogRecord({"msg": "%d rounds", "args": ("many",), "levelname": "INFO"})
    assert json.loads(JsonLines().format(record))["event"] == "%d rounds"
    assert Lines().format(record).endswith("%d rounds")


def test_levels_and_other_loggers() -> None:
    other = logging.getLogger("uvicorn.error")
    calls = (
        lambda: log.debug("no"),
        lambda: log.info("yes"),
        lambda: other.info("no"),
        lambda: other.error("yes"),
    )
    assert [json.loads(line)["event"] for line in logged("json", *calls)] == ["yes", "yes"]
    assert len(logged("json", *calls, level="error")) == 1


TOKEN = "Zm9yIHRoZXNlIHRlc3RzIG9ubHk0X-_7"  # fixed: the names of the tests hold it


@pytest.mark.parametrize(
    "text",
    [
        f"ticket={TOKEN}",
        f"ticket: {TOKEN}",
        f"enrol_token = '{TOKEN}'",
        f'{{"token": "{TOKEN}", "name": "a"}}',
        f"password={TOKEN}",
        f"Authorization: Bearer {TOKEN}",
        f"sent Bearer {TOKEN} along",
        f"postgresql://fedsim:{TOKEN}@db.example.org/fedsim",
        f"-----BEGIN PRIVATE KEY-----\n{TOKEN}\n-----END PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{TOKEN}",
        f"('fedsim-ticket-bin', {TOKEN.encode()!r})",
        f"metadata {bytes(range(200, 232)) + TOKEN.encode()!r}",
        f"fedsim-ticket-bin: {TOKEN}",
    ],
)
def test_secrets_are_masked_whoever_logged_them(text: str) -> None:
    assert TOKEN not in redacted(text)
    assert MASK in redacted(text)
    for form in ("json", "text"):
        assert TOKEN not in "".join(logged(form, lambda: log.info(text), lambda: log.info("%s", text)))


@pytest.mark.parametrize(
    "text",
    [
        "ticket_seconds=900",
        "the token has expired",
        "http_token=/etc/fedsim/token is read by others",
        "task=00ff00ff00ff00ff round=3 node=0123456789abcdef",
        "run key digits-1 belongs to another run",
        "https://example.org:8470/x",
        "lost=UNAVAILABLE: 14 again_in=3.1",
    ],
)
def test_what_is_no_secret_stays_readable(text: str) -> None:
    assert redacted(text) == text
