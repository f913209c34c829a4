from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim.errors import EnvironmentProblem
from fedsim.runs.folder import RunFolder
from fedsim.runs.report import html, write_report

MakeRun = Callable[..., RunFolder]
HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def evaluated(clients: int) -> dict[str, Any]:
    return {"client": np.arange(clients), "accuracy": np.linspace(0.2, 1.0, clients)}


def page_of(run: RunFolder, **given: Any) -> tuple[str, Page]:
    text = write_report(run, **given).read_text(encoding="utf-8")
    return text, Page(text)


def test_a_report_shows_outcome_metrics_fairness_and_every_client_that_did_not_count(
    evaluated_page: str,
) -> None:
    page = Page(evaluated_page)
    for shown in (
        "finished", "final accuracy", "0.9", "worst 10 % of clients", "2 kB", "4 refused",
        "the update is not finite", "dirichlet(alpha=0.3), seed 0", 'name = "digits"',
            "fedsim run digits.toml",
    ):  # fmt: skip
        assert shown in page.text, shown
    assert re.search(r"7\s*refused\s*the update is not finite\s*4\s*1, 2, 3, 4", page.text)
    assert page.tags["svg"] == 4


def test_a_run_in_which_every_answer_counted_says_so(make_run: MakeRun) -> None:
    run = make_run()
    (run.path / "clients.jsonl").unlink()
    _, page = page_of(run)
    assert "every answer of every client counted" in page.text


def test_a_page_makes_no_request_and_runs_nothing(evaluated_page: str) -> None:
    text, page = evaluated_page, Page(evaluated_page)
    assert "default-src 'none'" in text
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "xlink:href", "action", "poster"):
            assert value.startswith(("#", "data:")), value
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_hostile_texts_are_shown_and_change_nothing(make_run: MakeRun) -> None:
    run = make_run(HOSTILE)
    run.append_clients({"client": [1], "round": [4], "verdict": ["lost"], "reason": [HOSTILE + "\x1b[2J"]})
    run.update_facts({"partition": HOSTILE})
    (run.path / "config.toml").write_text(f"# {HOSTILE}\n")
    clean, hostile = page_of(make_run())[1], page_of(run)[1]
    assert hostile.text.count(HOSTILE) == 5  # title, heading, reason, fact, configuration
    assert hostile.tags["script"] == hostile.tags["img"] == 0
    assert set(hostile.tags) == set(clean.tags)
    assert "\x1b" not in hostile.text


def test_no_two_elements_share_an_id_and_every_reference_leads_somewhere(evaluated_page: str) -> None:
    text, page = evaluated_page, Page(evaluated_page)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert [i for i, times in Counter(ids).items() if times > 1] == []
    references = [v[1:] for _, n, v in page.attributes if n in ("href", "xlink:href")]
    references += re.findall(r"url\(#([^)]*)\)", text)
    assert references
    assert set(references) <= set(ids)


def test_pictures_follow_the_page_into_the_dark_and_have_words_for_screen_readers(
    evaluated_page: str,
) -> None:
    text = evaluated_page
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert drawings
    for drawing in drawings:
        assert not re.findall(r"(?<=: )#(?!fff\b)[0-9a-f]{6}(?=[;\"])", drawing), "a colour of its own"
        assert "var(--ink)" in drawing
        assert re.match(r'<svg[^>]* role="img" aria-label="[^"]+"', drawing)
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("failed", "✗ failed"),
        ("interrupted", "interrupted, can be resumed"),
        ("target", "reached its target"),
    ],
)
def test_the_outcome_is_told_in_words(make_run: MakeRun, outcome: str, words: str) -> None:
    run = make_run(finished=False)
    run.finish({"outcome": outcome})
    assert words in Page(html(run, [])).text


def test_a_report_of_many_rounds_and_troubles_stays_small_and_says_what_it_leaves_out(
    make_run: MakeRun,
) -> None:
    run = make_run(rounds=400)
    many = list(range(1000))
    run.append_clients(
        {"client": many, "round": [400] * 1000, "verdict": ["lost"] * 1000, "reason": [f"r{i}" for i in many]}
    )
    text, page = page_of(run, client_evaluation=evaluated(1000))
    assert len(text) < 400_000
    assert "901 more are in clients.jsonl" in page.text
    assert "The last 100 of 401 records" in page.text


def test_a_report_renews_the_digests_of_a_finished_run(make_run: MakeRun) -> None:
    run = make_run()
    write_report(run)
    assert run.changed_files() == {}
    assert {"report.html", "plots/accuracy.svg"} <= set(run.manifest["files"])


def test_a_report_that_cannot_be_written_is_an_error_and_the_old_one_stays(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    path = write_report(run)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", _no_space)
    with pytest.raises(EnvironmentProblem) as caught:
        write_report(run)
    assert caught.value.code == "FS-ENV-021"
    assert path.read_bytes() == before
    assert not list(run.path.rglob(".writing-*"))


def _no_space(source: Path, target: Path) -> None:
    import errno

    raise OSError(errno.ENOSPC, "No space left on device")
