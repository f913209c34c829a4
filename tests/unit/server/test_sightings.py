"""When nodes were seen last and what they compute on: noted seldom, many at a time."""

from __future__ import annotations

from collections.abc import Mapping

from fedsim.server.sightings import LONGEST, Sightings


class Book:
    """What was handed over to be written down, on a clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pages: list[Mapping[str, str]] = []
        self.sightings = Sightings(self.pages.append, every_seconds=300.0, clock=lambda: self.now)

    def at(self, now: float, node_id: str, device: str = "") -> list[Mapping[str, str]]:
        """What is written when a node asks for work at `now`."""
        self.now = now
        before = len(self.pages)
        self.sightings.seen(node_id, device)
        self.sightings.write()
        return self.pages[before:]


def test_a_node_is_noted_when_it_comes_when_its_device_is_news_and_every_few_minutes() -> None:
    book = Book()
    assert book.at(0.0, "a", "cpu") == [{"a": "cpu"}]
    assert book.at(1.0, "a") == []
    assert book.at(2.0, "a", "cpu") == []
    assert book.at(3.0, "a", "cuda") == [{"a": "cuda"}]
    assert book.at(299.0, "a") == []
    assert book.at(303.0, "a") == [{"a": "cuda"}]
    assert book.at(304.0, "a") == []


def test_a_node_that_never_says_its_device_is_noted_without_one() -> None:
    book = Book()
    assert book.at(0.0, "a") == [{"a": ""}]
    assert book.at(1.0, "a", "cpu") == [{"a": "cpu"}]


def test_many_nodes_are_one_write_and_very_many_are_several() -> None:
    book = Book()
    nodes = [f"{number:04x}" for number in range(2_500)]
    for node_id in nodes:
        book.sightings.seen(node_id, "cpu")
    assert book.pages == []
    for _ in range(4):  # the last time there is nothing left
        book.sightings.write()
    assert [len(page) for page in book.pages] == [1_000, 1_000, 500]
    assert sorted(node_id for page in book.pages for node_id in page) == nodes


def test_the_name_of_a_device_is_short_and_has_no_power() -> None:
    ((page,),) = [Book().at(0.0, "a", "\x1b[2J\n" + "x" * 1_000)]
    assert page["a"].isprintable()
    assert len(page["a"]) <= LONGEST
