"""Label expressions: what they select, and that nothing else is done with them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.errors import ConfigError
from fedsim.server.labels import LONGEST_EXPRESSION, check_labels, check_name, parse

LABELS = {"site": "a", "gpu": "true", "mobile": "false", "tier": "2", "name": "site-1", "empty": ""}


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("", True),
        ("   ", True),
        ("gpu", True),
        ("mobile", False),
        ("empty", True),
        ("unknown", False),
        ("not unknown", True),
        ("not not gpu", True),
        ("site = a", True),
        ("site=a", True),
        ("site != a", False),
        ("unknown != a", True),
        ("site in {a, b} and gpu and not mobile", True),
        ("site in {b}", False),
        ("site not in {b,c}", True),
        ("unknown in {a}", False),
        ("site = b or site = a", True),
        ("site = b or gpu and mobile", False),
        ("site = a or gpu and mobile", True),
        ("(site = a or gpu) and mobile", False),
        ("not (site = b or mobile)", True),
        ("not site = b and gpu", True),
        ("name = site-1", True),
        ("'site' = \"a\"", True),
        ("tier = 2", True),
        ("empty = ''", True),
        ("organ = x or android", False),
    ],
)
def test_an_expression_means_what_it_says(expression: str, holds: bool) -> None:
    assert parse(expression)(LABELS) is holds


@pytest.mark.parametrize(
    ("expression", "place"),
    [
        ("site in", 8), ("site in {", 10), ("site in {}", 10), ("site in {a,}", 12), ("and gpu", 1),
        ("gpu gpu", 5), ("(gpu", 5), ("gpu)", 4), ("site == a", 7), ("site = and", 8), ("not", 4),
        ("__import__('os')", 11), ("gpu; gpu", 4), ("a.b()", 4), ("gpu and 'x", 9), ("site = ä", 8),
        ("a" + "\n" + "b", 3),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place(expression: str, place: int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(expression)
    assert caught.value.code == "FS-SEC-008"
    assert f"at character {place}:" in str(caught.value)


def test_length_and_depth_are_bounded() -> None:
    parse("(" * 32 + "gpu" + ")" * 32)
    for expression in ("(" * 33 + "gpu" + ")" * 33, "a" * (LONGEST_EXPRESSION + 1)):
        with pytest.raises(ConfigError):
            parse(expression)
    assert parse("not " * 200 + "gpu")(LABELS) is True


WORD = st.sampled_from(["site", "gpu", "a", "b", "tier", "unknown"])
TREES = st.recursive(
    st.one_of(
        WORD.map(lambda w: (w, lambda labels: labels.get(w, "false") != "false")),
        st.tuples(WORD, WORD).map(lambda p: (f"{p[0]} = {p[1]}", lambda labels: labels.get(p[0]) == p[1])),
        st.tuples(WORD, st.lists(WORD, min_size=1, max_size=3)).map(
            lambda p: (f"{p[0]} in {{{','.join(p[1])}}}", lambda labels: labels.get(p[0]) in p[1])
        ),
    ),
    lambda inner: st.one_of(
        inner.map(lambda t: (f"not ({t[0]})", lambda labels: not t[1](labels))),
        st.tuples(inner, inner).map(
            lambda p: (f"({p[0][0]}) and ({p[1][0]})", lambda labels: p[0][1](labels) and p[1][1](labels))
        ),
        st.tuples(inner, inner).map(
            lambda p: (f"({p[0][0]}) or ({p[1][0]})", lambda labels: p[0][1](labels) or p[1][1](labels))
        ),
    ),
    max_leaves=6,
)


@given(tree=TREES, labels=st.dictionaries(WORD, WORD | st.sampled_from(["true", "false"]), max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_expression_agrees_with_python(tree: tuple, labels: dict[str, str]) -> None:  # type: ignore[type-arg]
    text, meaning = tree
    assert parse(text)(labels) == meaning(labels)


@given(st.text(alphabet="ab &(){}=!,'\"\n\0ä", max_size=30) | st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        test = parse(text)
    except ConfigError as error:
        code = error.code
    else:
        code = "FS-SEC-008" if test(LABELS) in (True, False) else ""
    assert code == "FS-SEC-008"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-a", "a/b", "a b", "a\0", "é", "x" * 64, "A" * 16, "0" * 16]
)
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_name(name)
    assert caught.value.code == "FS-SEC-007"


def test_names_and_labels_that_are_fine_pass_unchanged() -> None:
    assert check_name("site-1.b_C") == "site-1.b_C"
    assert check_labels({"gpu": "", "a.b": "1"}) == {"gpu": "", "a.b": "1"}
