"""What a coordinator counts, and how many lines that can make."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from fedsim.pb import federation_pb2 as pb
from fedsim.server.telemetry import MOST_RUNS, Telemetry, describe_verdict

NAMES = {
    "fedsim_nodes", "fedsim_round", "fedsim_round_seconds", "fedsim_tasks", "fedsim_updates", "fedsim_bytes",
    "fedsim_upload_resumes", "fedsim_lease_expired", "fedsim_aggregate_seconds", "fedsim_validate_seconds",
    "fedsim_epsilon", "fedsim_db_commit_seconds", "fedsim_disk_free_bytes", "fedsim_event_loop_lag_seconds",
    "fedsim_watchers_dropped",
}  # fmt: skip


def values(telemetry: Telemetry) -> dict[str, float]:
    """Every sample as ``name{label=value,…}``."""
    found = {}
    for family in text_string_to_metric_families(telemetry.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_the_names_are_those_of_the_specification(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path)
    families = {family.name for family in text_string_to_metric_families(telemetry.render().decode())}
    assert families == NAMES
    assert values(telemetry)["fedsim_disk_free_bytes"] > 0


def test_what_happens_is_counted() -> None:
    telemetry = Telemetry()
    telemetry.nodes({"online": 3, "pending": 1})
    telemetry.round("digits", 7)
    telemetry.phase("aggregate", 0.02)
    telemetry.task("answered")
    telemetry.update("ACCEPTED")
    telemetry.update("rejected", "norm")
    telemetry.moved("up", "update", 1000)
    telemetry.moved("up", "update", 500)
    telemetry.upload_resumed()
    telemetry.lease_expired()
    telemetry.aggregated("fedavg", 0.5)
    telemetry.validated(0.001)
    telemetry.committed(0.002)
    telemetry.epsilon("digits", 1.5)
    telemetry.watcher_dropped()
    found = values(telemetry)
    assert found["fedsim_nodes{state=online}"] == 3
    assert found["fedsim_nodes{state=revoked}"] == 0
    assert found["fedsim_round{run=digits}"] == 7
    assert found["fedsim_round_seconds_count{phase=aggregate}"] == 1
    assert found["fedsim_tasks_total{outcome=answered}"] == 1
    assert found["fedsim_updates_total{reason=,verdict=accepted}"] == 1
    assert found["fedsim_updates_total{reason=norm,verdict=rejected}"] == 1
    assert found["fedsim_bytes_total{direction=up,kind=update}"] == 1500
    assert found["fedsim_upload_resumes_total"] == 1
    assert found["fedsim_lease_expired_total"] == 1
    assert found["fedsim_aggregate_seconds_sum{strategy=fedavg}"] == 0.5
    assert found["fedsim_validate_seconds_count"] == 1
    assert found["fedsim_db_commit_seconds_count"] == 1
    assert found["fedsim_epsilon{run=digits}"] == 1.5
    assert found["fedsim_watchers_dropped_total"] == 1


def test_words_of_others_make_no_lines_of_their_own() -> None:
    telemetry = Telemetry()
    for number in range(500):
        telemetry.task(f"outcome {number}")
        telemetry.update(f"verdict {number}", f"reason {number}")
        telemetry.moved(f"to {number}", f"kind {number}", 1)
        telemetry.phase(f"phase {number}", 1.0)
        telemetry.round(f"run {number}", number)
        telemetry.epsilon(f"run {number}", 1.0)
        telemetry.aggregated(f"strategy {number}", 1.0)
    found = values(telemetry)
    assert found["fedsim_tasks_total{outcome=other}"] == 500
    assert found["fedsim_updates_total{reason=other,verdict=other}"] == 500
    runs = [name for name in found if name.startswith("fedsim_round{")]
    assert len(runs) == MOST_RUNS
    assert "fedsim_round{run=run_499}" in runs
    assert len([name for name in found if name.startswith("fedsim_epsilon{")]) == MOST_RUNS
    assert len([n for n in found if n.startswith("fedsim_aggregate_seconds_count")]) <= 65


def test_a_hostile_name_stays_one_label() -> None:
    telemetry = Telemetry()
    telemetry.round('x"} 1\nfedsim_round{run="forged', 3)
    assert values(telemetry)["fedsim_round{run=x___1_fedsim_round_run__forged}"] == 3


def test_the_lines_of_a_run_go_with_it() -> None:
    telemetry = Telemetry()
    telemetry.round("a", 1)
    telemetry.forget_run("a")
    telemetry.forget_run("never seen")
    assert not [name for name in values(telemetry) if name.startswith("fedsim_round{")]


def test_every_verdict_of_the_wire_has_a_label() -> None:
    named = [describe_verdict(v) for v in pb.Verdict.values()]
    assert named == ["other", "accepted", "duplicate", "late", "rejected", "retry"]


def test_a_loop_that_is_held_up_shows_it() -> None:
    telemetry = Telemetry()

    async def held_up() -> None:
        sampler = asyncio.create_task(telemetry.sample_lag())
        await asyncio.sleep(0.1)
        time.sleep(1.0)  # blocks the loop past the moment at which the sampler is due
        await asyncio.sleep(0.05)
        sampler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampler

    asyncio.run(held_up())
    assert values(telemetry)["fedsim_event_loop_lag_seconds"] > 0.3
