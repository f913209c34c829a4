"""Updates that must not count, handed in over the wire to a real run with honest nodes beside.

A hostile node sends another bad update in every round. What each one is answered is one test; that nothing of
all of them reached the model is another: its SHA-256 is that of a run without that node.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from grpc import StatusCode
from safetensors.torch import load_file

from fedsim.bundle import encode
from fedsim.identity import SUBMIT
from fedsim.pb import federation_pb2 as pb
from tests.hostile import (
    Denial,
    RawNode,
    Run,
    Site,
    denied,
    frames,
    honest_update,
    site,
    tensors_for,
    values,
)
from tests.hostile_bundles import BOMBS, DELTA, entry, framed, pickled, torch_zip, trap

Content = Callable[[pb.Task], bytes]
LARGE = 3_000  # width of a model whose updates are uploaded in chunks
MOST_WEIGHT = 1_000


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tmp_path_factory.mktemp("site")) as found:
        yield found


@dataclass(frozen=True)
class Bad:
    """One bad update, and what it must be answered.

    Args:
        content: of the bundle; fields: of the body that differ from an honest one.
        reason: of the verdict; text: part of what the node is told.
    """

    reason: str
    text: str = ""
    content: Content = field(default=lambda task: honest_update(task, "villain"))
    fields: dict[str, Any] = field(default_factory=dict)


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Content:
    """The bundle of an honest node after `change`, which works in place."""

    def made(task: pb.Task) -> bytes:
        tensors = tensors_for(task, 0.5)
        change(tensors)
        return encode(tensors)

    return made


def with_value(value: float, at: int) -> Content:
    """An honest update but for one element."""

    def put(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DELTA].view(-1)[at] = value

    return changed(put)


def longer(tensors: dict[str, torch.Tensor]) -> None:
    tensors[DELTA] = torch.cat([tensors[DELTA], torch.zeros(1, dtype=tensors[DELTA].dtype)])


def fixed(content: bytes) -> Content:
    return lambda task: content


CASES: dict[str, Bad] = {
    "S1 NaN": Bad("non_finite", DELTA, with_value(math.nan, 0)),
    "S1 NaN at the end": Bad("non_finite", DELTA, with_value(math.nan, -1)),
    "S1 Inf": Bad("non_finite", DELTA, with_value(math.inf, 3)),
    "S1 -Inf": Bad("non_finite", DELTA, with_value(-math.inf, 3)),
    "S2 shape": Bad("schema", "has shape", changed(longer)),
    "S2 rank": Bad("schema", "has shape", changed(lambda t: t.update({DELTA: t[DELTA][None]}))),
    "S2 dtype": Bad("schema", "is F64", changed(lambda t: t.update({DELTA: t[DELTA].double()}))),
    "S2 missing": Bad("schema", f"{DELTA!r} is missing", changed(lambda t: t.clear())),
    "S2 extra": Bad("schema", "'zz' does not belong", changed(lambda t: t.update(zz=torch.zeros(1)))),
    "S2 renamed": Bad("schema", f"{DELTA!r} is missing", changed(lambda t: t.update(Delta=t.pop(DELTA)))),
    "S3 weight 0": Bad("weight", "0 examples", fields={"examples": 0}),
    "S3 weight -1000": Bad("weight", "-1000 examples", fields={"examples": -1000}),
    "S3 weight -2^63": Bad("weight", "examples", fields={"examples": -(2**63)}),
    "S3 weight 2^63-1": Bad("weight", "examples", fields={"examples": 2**63 - 1}),
    "S3 weight above the limit": Bad("weight", "1 to 1000", fields={"examples": MOST_WEIGHT + 1}),
    "S3 steps -1": Bad("weight", "local steps", fields={"local_steps": -1}),
    "S3 normaliser Inf": Bad("weight", "finite", fields={"normaliser": math.inf}),
    "S3 normaliser negative": Bad("weight", "negative", fields={"normaliser": -1.0}),
    "S3 seconds NaN": Bad("weight", "finite", fields={"train_seconds": math.nan}),
    "S18 257 metrics": Bad("policy", "257 metrics", fields={"metrics": {f"m{i}": 1.0 for i in range(257)}}),
    "S18 long metrics": Bad("policy", "bytes", fields={"metrics": {f"m{i}" * 80: 1.0 for i in range(250)}}),
    "S18 metric with an escape": Bad("policy", "no name of", fields={"metrics": {"\x1b[2Jloss": 1.0}}),
    "S18 metric with a newline": Bad("policy", "no name of", fields={"metrics": {"a\r\nb": 1.0}}),
    "S18 metric in HTML": Bad("policy", "no name of", fields={"metrics": {"<script>": 1.0}}),
    "digest of other bytes": Bad("digest", "signed", fields={"update": pb.Object(digest=bytes(32), size=0)}),
} | {f"S5 S8 {name}": Bad("schema", content=fixed(content)) for name, content in BOMBS.items()}


@dataclass(frozen=True)
class Outcome:
    """What became of a run with a hostile node in it."""

    replies: dict[str, pb.SubmitReply]
    run: Run
    alone: Run  # the honest nodes without it


def play(coordinator: Site, group: str, cases: dict[str, Bad], **options: Any) -> Outcome:
    """One round for each case: the hostile node first, so that its answer is in time."""
    villain, *honest = coordinator.fleet(f"villain-{group}", f"anna-{group}", f"bert-{group}", group=group)
    others = coordinator.fleet(f"anna-{group}-2", f"bert-{group}-2", group=f"{group}-2")
    for node, other in zip(honest, others, strict=True):
        other.name = node.name  # so that it answers the same
    limits = {"max_strikes": 10_000, "max_weight": MOST_WEIGHT}
    tables = {"deployment": {**limits, "min_clients": 3}, **options}
    run = coordinator.submit(values(len(cases), **tables), group=group)
    replies = {}
    for name, case in cases.items():
        task, _ = villain.lease()
        content = case.content(task)
        fields = dict(case.fields)
        if "update" in fields:
            fields["update"] = pb.Object(digest=fields["update"].digest, size=len(content))
        replies[name] = villain.submit(task, content, **fields)
        for node in honest:
            node.answer()
    run.end()
    tables["deployment"] = {**limits, "min_clients": 2}
    alone = coordinator.submit(values(len(cases), clients=2, **tables), group=f"{group}-2")
    for _ in cases:
        for node in others:
            node.answer()
    alone.end()
    return Outcome(replies, run, alone)


FEW = (
    "S1 NaN at the end", "S1 -Inf", "S2 shape", "S2 dtype", "S2 missing", "S3 weight -1000",
    "S3 weight 2^63-1", "S18 257 metrics", "S18 metric with an escape", "digest of other bytes",
    "S5 S8 a header of 1 GB", "S5 S8 1e12 elements in 10 bytes", "S5 S8 overlapping offsets",
    "S5 S8 a name twice", "S5 S8 a zip of pickles",
)  # fmt: skip
"""One of each kind; the others are slow because there are many of them."""


@pytest.fixture(scope="module", params=["few", pytest.param("many", marks=pytest.mark.slow)])
def inline(request: pytest.FixtureRequest, coordinator: Site) -> Outcome:
    chosen = {name: case for name, case in CASES.items() if (name in FEW) == (request.param == "few")}
    return play(coordinator, f"inline-{request.param}", chosen)


def test_a_bad_update_is_rejected_with_its_reason(inline: Outcome) -> None:
    """S1, S2, S3, S5, S8, S18."""
    got = {name: (pb.Verdict.Name(reply.verdict), reply.reason) for name, reply in inline.replies.items()}
    assert got == {name: ("REJECTED", CASES[name].reason) for name in inline.replies}
    for name, reply in inline.replies.items():
        assert CASES[name].text in reply.text, name
        assert reply.text.isprintable(), name
        assert len(reply.text) < 500, name


def test_nothing_of_what_was_rejected_reaches_the_model(inline: Outcome) -> None:
    """S1, S2, S3, S5, S8, S18: every round counts the honest answers alone, and the model is theirs."""
    rounds = inline.run.lines("metrics.jsonl")[1:]
    assert [(line["outcome"], line["received"], line["refused"]) for line in rounds] == [
        ("partial", 2, 1) for _ in inline.replies
    ]
    assert inline.run.digest == inline.alone.digest


def test_rejections_are_counted_by_reason(coordinator: Site, inline: Outcome) -> None:
    """S1, S2, S3, S18: in /metrics."""
    for reason in {CASES[name].reason for name in inline.replies}:
        expected = sum(CASES[name].reason == reason for name in inline.replies)
        line = f'fedsim_updates_total{{reason="{reason}",verdict="rejected"}}'
        assert coordinator.metric(line) >= expected


LARGE_CASES: dict[str, Bad] = {
    "S1 NaN at the end": Bad("non_finite", DELTA, with_value(math.nan, -1)),
    "S2 dtype": Bad(
        "schema", "is F16, it must be F32", changed(lambda t: t.update({DELTA: t[DELTA].half()}))
    ),
    "S3 weight": Bad("weight", "examples", fields={"examples": -1000}),
    "S5 a header of 1 GB": Bad("schema", content=fixed((1 << 30).to_bytes(8, "little") + bytes(90_000))),
    "S5 1e12 elements": Bad("schema", content=fixed(framed({DELTA: entry(10**12)}, bytes(90_000)))),
    "S5 deep JSON": Bad("schema", content=fixed(framed(b'{"a":' * 9_000 + b"1" + b"}" * 9_000, bytes(1000)))),
    "S8 a pickle": Bad("schema", content=fixed(pickled() + bytes(90_000))),
    "S8 a zip of pickles": Bad("schema", content=fixed(torch_zip({DELTA: torch.zeros(25_000)}))),
}


@pytest.mark.slow
def test_the_same_holds_for_updates_that_were_uploaded(coordinator: Site) -> None:
    """S1, S2, S3, S5, S8: in a file instead of inside the call."""
    found = play(coordinator, "large", LARGE_CASES, model={"name": "mlp", "hidden": [LARGE]})
    got = {name: (pb.Verdict.Name(reply.verdict), reply.reason) for name, reply in found.replies.items()}
    assert got == {name: ("REJECTED", case.reason) for name, case in LARGE_CASES.items()}
    assert all(case.text in found.replies[name].text for name, case in LARGE_CASES.items())
    assert found.run.digest == found.alone.digest


def trio(coordinator: Site, group: str, rounds: int = 1, **tables: Any) -> tuple[Run, list[RawNode]]:
    """A run with three nodes of its own."""
    nodes = coordinator.fleet(f"v-{group}", f"a-{group}", f"b-{group}", group=group)
    return coordinator.submit(values(rounds, **tables), group=group), nodes


def model(run: Run, name: str = "final") -> torch.Tensor:
    """All parameters of a run's model in one vector."""
    tensors = load_file(run.path / "checkpoints" / f"{name}.safetensors")
    return torch.cat([tensors[key].double().view(-1) for key in sorted(tensors)])


@pytest.mark.slow
def test_negative_zero_and_denormals_are_ordinary_values(coordinator: Site) -> None:
    """S1: they are accepted, and count as the zeros that they are beside anything larger."""
    digests = []
    for group, numbers in (("odd", (-0.0, 1e-45, -1e-40)), ("plain", (0.0, 0.0, 0.0))):
        run, (villain, *honest) = trio(coordinator, group, rounds=len(numbers))
        for node, name in zip(honest, ("a", "b"), strict=True):
            node.name = name
        for number in numbers:
            task, _ = villain.lease()
            assert villain.submit(task, encode(tensors_for(task, number))).verdict == pb.ACCEPTED
            for node in honest:
                node.answer()
        run.end()
        digests.append(run.digest)
    assert digests[0] == digests[1]


def test_an_update_that_is_too_long_is_rejected(coordinator: Site) -> None:
    """S4: with its length."""
    run, (villain, *honest) = trio(coordinator, "norm", deployment={"max_norm": 10.0, "min_clients": 3})
    task, _ = villain.lease()
    reply = villain.submit(task, encode(tensors_for(task, 1e30)))
    assert (reply.verdict, reply.reason) == (pb.REJECTED, "norm")
    assert "e+30 long, 10 is allowed" in reply.text or "e+31 long, 10 is allowed" in reply.text
    for node in honest:
        node.answer()
    run.end()
    assert coordinator.metric('fedsim_updates_total{reason="norm"') >= 1
    assert float(model(run).abs().max()) < 10.0


@pytest.mark.parametrize("size", [4, pytest.param(LARGE, marks=pytest.mark.slow)])
def test_an_update_that_is_too_long_is_clipped_where_that_is_the_policy(coordinator: Site, size: int) -> None:
    """S4: what is folded is as long as is allowed, whatever was sent, inline and uploaded."""
    ends = {}
    for sent in (1e30, 1e10, 0.0):
        limits = {"max_norm": 0.5, "over_norm": "clip", "min_clients": 3}
        run, (villain, *honest) = trio(
            coordinator, f"clip-{size}-{int(sent**0.1)}", hidden=size, deployment=limits
        )
        task, _ = villain.lease()
        assert villain.submit(task, encode(tensors_for(task, sent))).verdict == pb.ACCEPTED
        for node in honest:
            node.give_up()
        run.end()
        ends[sent] = model(run)
    # The same direction at the same length: only rounding may differ.
    assert torch.allclose(ends[1e30], ends[1e10], atol=1e-6)
    assert float((ends[1e30] - ends[0.0]).norm()) == pytest.approx(0.5, rel=1e-4)


def test_after_three_strikes_a_node_is_not_asked_any_more(coordinator: Site) -> None:
    """S1: it costs the run three answers, not the run."""
    run, (villain, *honest) = trio(coordinator, "strikes", rounds=5, deployment={"min_clients": None})
    for number in range(5):
        if number < 3:
            task, _ = villain.lease()
            bad = encode(tensors_for(task, math.nan))
            assert villain.submit(task, bad).reason == "non_finite"
        for node in honest:
            node.answer()
    run.end()
    assert [line["cohort"] for line in run.lines("metrics.jsonl")[1:]] == [3, 3, 3, 2, 2]
    assert [line["received"] for line in run.lines("metrics.jsonl")[1:]] == [2] * 5
    reply = villain.call("Lease", pb.LeaseRequest())
    assert not reply.HasField("offer")


def test_a_flood_of_metrics_ends_the_call_and_the_task_stays(coordinator: Site) -> None:
    """S18: a million names are refused unread; NaN is a value, and no number in a file."""
    run, (villain, *honest) = trio(coordinator, "flood")
    task, _ = villain.lease()
    content = honest_update(task, "villain")
    said = villain.body(task, content).SerializeToString()
    for count, code in ((20_000, StatusCode.INVALID_ARGUMENT), (1_000_000, StatusCode.RESOURCE_EXHAUSTED)):
        # Above 4 MiB gRPC itself reads no message at all.
        raw = said + b"".join(b"\x62\x10\x0a\x05%05x\x11%8d" % (i, i) for i in range(count))
        request = pb.SubmitRequest(body=raw, signature=villain.key.sign(SUBMIT, raw), update=content)
        assert denied(villain.call, "Submit", request).code is code
    strange = {"nan": math.nan, "inf": math.inf, "a/b.c": 2.0, "loss": 0.5}
    strange |= dict.fromkeys(("round", "client", "verdict", "examples", "steps", "norm", "bytes_up"), 1e9)
    assert villain.submit(task, content, metrics=strange).verdict == pb.ACCEPTED
    for node in honest:
        node.answer()
    run.end()
    for name in ("metrics.jsonl", "clients.jsonl"):
        text = (run.path / name).read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
    (mine,) = [line for line in run.lines("clients.jsonl") if line["a/b.c"] == 2.0]
    assert (mine["round"], mine["verdict"], mine["examples"], mine["steps"]) == (1, "accepted", 8, 1)
    assert len({line["bytes_up"] for line in run.lines("clients.jsonl")}) == 1
    assert mine["norm"] < 1.0
    assert mine["loss"] == 0.5


def wire_double(number: int, value: float) -> bytes:
    """A field of type double, as it crosses the wire."""
    return bytes([number << 3 | 1]) + struct.pack("<d", value)


def wire_varint(number: int, value: int) -> bytes:
    """A field of an integer type; negative and larger ones are not made smaller."""
    found = bytearray([number << 3])
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


TAILS: list[tuple[bytes, str | StatusCode]] = [
    (wire_double(8, math.nan), "weight"),  # examples in another type are an unknown field
    (wire_varint(8, 2**63), "weight"),  # -2^63 to a reader
    (wire_varint(8, 2**64 - 1), "weight"),
    (wire_varint(8, 2**70 - 1), "weight"),  # the bits that do not fit are dropped
    (wire_varint(8, 2**77), StatusCode.INVALID_ARGUMENT),  # no varint of protobuf
    (b"\x62\x05\x0a\x01a\x12\x7f", StatusCode.INVALID_ARGUMENT),  # a metric whose value runs out
    (b"\xff" * 20, StatusCode.INVALID_ARGUMENT),
    (b"\x62\x07\x0a\x01a\x12\x02\x0a\x00", ""),  # a message in place of a number counts as no number
]
"""What is put behind a signed body, and the reason of the verdict or the status of the call."""


def test_fields_of_other_types_are_no_way_round_the_checks(coordinator: Site) -> None:
    """S3, S18: bytes that no library would write, signed all the same."""
    limits = {"max_strikes": 99, "min_clients": 3}
    run, (villain, *honest) = trio(coordinator, "wire", rounds=len(TAILS), deployment=limits)
    for tail, answer in TAILS:
        task, _ = villain.lease()
        content = honest_update(task, "villain")
        examples = 0 if answer == "weight" else 8
        raw = villain.body(task, content, examples=examples).SerializeToString() + tail
        request = pb.SubmitRequest(body=raw, signature=villain.key.sign(SUBMIT, raw), update=content)
        if isinstance(answer, StatusCode):
            assert denied(villain.call, "Submit", request).code is answer, tail
            villain.call("Fail", pb.FailRequest(task_id=task.task_id, attempt=task.attempt, code="exception"))
        else:
            assert villain.call("Submit", request).reason == answer, tail
        for node in honest:
            node.answer()
    run.end()
    counted = [line["received"] for line in run.lines("metrics.jsonl")[1:]]
    assert counted == [3 if answer == "" else 2 for _, answer in TAILS]


@pytest.mark.slow
def test_nothing_of_a_pickle_is_executed(coordinator: Site, tmp_path: Path) -> None:
    """S8: inline, in a file, and as the header of a bundle."""
    trace = tmp_path / "trace"
    run, (villain, *honest) = trio(
        coordinator, "trap", rounds=3, hidden=LARGE, deployment={"max_strikes": 9, "min_clients": 3}
    )
    content = trap(trace)
    for sent in (content, content + bytes(90_000), framed(content, bytes(8))):
        task, _ = villain.lease()
        assert villain.submit(task, sent).reason == "schema"
        for node in honest:
            node.answer()
    run.end()
    assert not trace.exists()


def test_an_update_larger_than_the_task_allows_is_not_taken(coordinator: Site) -> None:
    """S5: neither inside the call nor as an upload."""
    run, (villain, *honest) = trio(coordinator, "larger")
    task, _ = villain.lease()
    huge = bytes(1_000_000)
    refused: Denial = denied(villain.upload, frames(task, huge, upload_id=bytes(16)))
    assert refused.code is StatusCode.INVALID_ARGUMENT
    body = villain.body(task, huge)
    reply = villain.call("Submit", villain.request(body, huge))
    assert (reply.verdict, reply.reason) == (pb.REJECTED, "schema")
    assert f"the update has {len(huge)} bytes" in reply.text
    for node in honest:
        node.answer()
    run.end()
