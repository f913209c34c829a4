"""Reading, merging, checking and writing configurations."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedsim.config import (
    config_from,
    digest,
    from_dict,
    json_schema,
    load_config,
    to_dict,
    to_toml,
)
from fedsim.config_keys import as_markdown, explain
from fedsim.config_merge import preset_names, scalar
from fedsim.config_sections import TABLES, Config
from fedsim.errors import ConfigError
from fedsim.local import LocalSpec


def written(folder: Path, text: str, name: str = "fedsim.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refused(code: str, file: Path | None = None, **arguments: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(file, **arguments)
    assert caught.value.code == code, caught.value
    return caught.value


# defaults and files


def test_without_anything_the_defaults_are_a_whole_configuration() -> None:
    config = load_config().config
    assert (config.data.name, config.data.partition.kind, config.strategy.name) == (
        "digits",
        "dirichlet",
        "fedavg",
    )
    assert config.data.partition.parameters == {"alpha": 0.3}
    assert config.client == LocalSpec()
    assert config.strategy.parameters["server_lr"] == 1.0


def test_what_is_written_loads_again_to_the_same(tmp_path: Path) -> None:
    first = load_config(sets=["round.deadline=10m", "round.sample=0.5", "client.clip_norm=2"]).config
    again = load_config(written(tmp_path, to_toml(first))).config
    assert again == first
    assert to_toml(again) == to_toml(first)


def test_a_file_replaces_defaults_and_is_named_as_the_source(tmp_path: Path) -> None:
    file = written(tmp_path, "[round]\nsample = 5\n[client]\nlr = 0.5\n")
    loaded = load_config(file)
    assert (loaded.config.round.sample, loaded.config.client.lr) == (5, 0.5)
    assert loaded.sources["round.sample"] == str(file)
    assert loaded.sources["client.epochs"] == "default"


def test_every_key_of_the_result_has_a_source() -> None:
    loaded = load_config()
    values = to_dict(loaded.config)
    for key in loaded.sources:
        place: Any = values
        for part in key.split("."):
            place = place[part]
    assert set(loaded.sources.values()) == {"default"}


def test_precedence_is_preset_base_file_environment_set_flag(tmp_path: Path) -> None:
    written(
        tmp_path,
        "[run]\nseed = 2\nrounds = 2\n[round]\nsample = 2\nquorum = 2\novercommit = 2.0\n",
        "base.toml",
    )
    file = written(
        tmp_path,
        'extends = "base.toml"\n[run]\nrounds = 3\n[round]\nsample = 3\nquorum = 3\novercommit = 3.0\n',
    )
    loaded = load_config(
        file,
        preset="demo",
        environ={"FEDSIM__ROUND__SAMPLE": "4", "FEDSIM__ROUND__QUORUM": "4", "FEDSIM_RUNS": "elsewhere"},
        sets=["round.quorum=5", "run.seed=5"],
        flags={"run.seed": ("--seed", 6)},
    )
    run, cohort = loaded.config.run, loaded.config.round
    assert run.name == "demo"
    assert (cohort.overcommit, cohort.sample, cohort.quorum, run.rounds, run.seed) == (3.0, 4, 5, 3, 6)
    sources = loaded.sources
    assert sources["run.name"] == "preset demo"
    assert sources["round.sample"] == "environment FEDSIM__ROUND__SAMPLE"
    assert sources["round.quorum"] == "--set round.quorum=5"
    assert sources["run.seed"] == "--seed"


def test_a_value_of_the_base_file_alone_comes_from_the_base_file(tmp_path: Path) -> None:
    base = written(tmp_path, "[run]\nseed = 9\n", "base.toml")
    loaded = load_config(written(tmp_path, 'extends = "base.toml"\n'))
    assert loaded.config.run.seed == 9
    assert loaded.sources["run.seed"] == str(base)


def test_a_base_file_has_no_base_of_its_own(tmp_path: Path) -> None:
    written(tmp_path, 'extends = "other.toml"\n', "base.toml")
    refused("FS-CFG-011", written(tmp_path, 'extends = "base.toml"\n'))


def test_the_last_assignment_of_a_key_wins() -> None:
    assert load_config(sets=["run.seed=1", "run.seed=2"]).config.run.seed == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20", 20), ("0.5", 0.5), ("true", True), ('"a b"', "a b"), ("all", "all"), ("10m", "10m"),
        ("[1, 2]", [1, 2]), ("{a = 1}", {"a": 1}), ("2024-01-01", "2024-01-01"), ("1\nb = 2", "1\nb = 2"),
        ("", ""), ("accuracy >= 0.9", "accuracy >= 0.9"),
    ],
)  # fmt: skip
def test_a_value_on_the_command_line_is_toml_or_else_a_text(text: str, value: object) -> None:
    found = scalar(text)
    assert found == value
    assert type(found) is type(value)


# plugins and their parameters


def test_another_plugin_drops_the_parameters_that_lower_layers_gave(tmp_path: Path) -> None:
    file = written(tmp_path, '[strategy]\nname = "fedprox"\nmu = 0.5\n[data.partition]\nalpha = 0.7\n')
    assert load_config(file).config.strategy.parameters["mu"] == 0.5
    changed = load_config(file, sets=["strategy.name=fedavg", "data.partition.kind=iid"]).config
    assert "mu" not in changed.strategy.parameters
    assert changed.data.partition.parameters == {}
    assert changed.data.partition.clients == 20


def test_the_same_plugin_keeps_them(tmp_path: Path) -> None:
    file = written(tmp_path, '[strategy]\nname = "fedprox"\nmu = 0.5\n')
    assert load_config(file, sets=["strategy.name=fedprox"]).config.strategy.parameters["mu"] == 0.5


def test_assignments_of_one_command_line_belong_together_in_any_order() -> None:
    config = load_config(sets=["strategy.mu=0.5", "strategy.name=fedprox"]).config
    assert config.strategy.parameters["mu"] == 0.5


def test_another_data_set_drops_the_path_and_keeps_the_partition(tmp_path: Path) -> None:
    file = written(tmp_path, '[data]\nname = "mnist"\npath = "mnist"\n[data.partition]\nclients = 7\n')
    config = load_config(file, sets=["data.name=digits"]).config
    assert config.data.path is None
    assert config.data.partition.clients == 7


def test_a_target_replaces_the_named_model_with_its_parameters(tmp_path: Path) -> None:
    file = written(tmp_path, '[model]\nname = "mlp"\n')
    config = load_config(file, sets=["model.target=pkg.mod:Net", "model.width=3"]).config
    assert config.model.target == "pkg.mod:Net"
    assert config.model.parameters == {"width": 3}
    assert "name" not in to_dict(config)["model"]
    assert load_config(written(tmp_path, to_toml(config), "again.toml")).config.model.target == "pkg.mod:Net"


def test_natural_clients_need_no_number_and_others_do(tmp_path: Path) -> None:
    config = load_config(sets=["data.partition.kind=natural"]).config
    assert config.data.partition.clients is None
    assert load_config(written(tmp_path, to_toml(config))).config == config
    with pytest.raises(ConfigError, match="does not fit"):
        from_dict({"data": {"partition": {"clients": None}}})


def test_the_expected_table_of_a_preset_is_no_part_of_the_configuration() -> None:
    loaded = load_config(preset="demo")
    assert loaded.expected["metric"] == "accuracy"
    assert "expected" not in to_dict(loaded.config)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_says_where_it_comes_from_and_what_it_reaches(name: str) -> None:
    from fedsim.config_merge import preset_text

    assert preset_text(name).startswith("# ")
    assert "et al." in preset_text(name)
    loaded = load_config(preset=name)
    assert loaded.config.run.name == name
    assert {"metric", "value", "tolerance", "round", "command"} <= set(loaded.expected)
    assert loaded.expected["round"] == loaded.config.run.rounds


# mistakes


def test_an_unknown_key_of_a_plugin_names_file_table_and_the_nearest_key(tmp_path: Path) -> None:
    file = written(tmp_path, "[data.partition]\nalhpa = 0.3\n")
    error = refused("FS-CFG-004", file)
    assert error.what == "unknown key `alhpa` in [data.partition], did you mean `alpha`?"
    assert error.where is not None
    assert error.where.startswith(f"{file}: [data.partition]")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[run]\nsede = 1\n", "unknown key `sede` in [run], did you mean `seed`?"),
        ("[client]\nlearning_rate = 1\n", "unknown key `learning_rate` in [client]"),
        ("[strateggy]\nname = 'x'\n", "unknown table `strateggy`, did you mean `strategy`?"),
        ("sample = 3\n", "unknown table `sample`"),
    ],
)
def test_an_unknown_key_or_table_is_refused(tmp_path: Path, text: str, what: str) -> None:
    assert refused("FS-CFG-004", written(tmp_path, text)).what.startswith(what)


@pytest.mark.parametrize(
    ("text", "code", "why"),
    [
        ('[run]\nrounds = "5"\n', "FS-CFG-005", "expected a whole number"),
        ("[run]\nrounds = 2.5\n", "FS-CFG-005", "expected a whole number"),
        ("[run]\nrounds = -1\n", "FS-CFG-006", "greater than or equal to 0"),
        ('[round]\nsample = "some"\n', "FS-CFG-005", "a whole number or a number or 'all'"),
        ("[client]\nlr = -0.1\n", "FS-CFG-006", "lr must be above 0"),
        ("[client]\nmomentum = 1.0\n", "FS-CFG-006", "momentum must be at least 0 and below 1"),
        ("[client]\nbatch_size = 1.5\n", "FS-CFG-005", "expected a whole number"),
        ('[client]\noptimizer = "lion"\n', "FS-CFG-005", "'sgd', 'adam' or 'adamw'"),
        ('[round]\ndeadline = "soon"\n', "FS-CFG-006", "a time is"),
        ('[evaluation]\nclients = "often"\n', "FS-CFG-006", "every N"),
        ("[evaluation]\nholdout = 1.0\n", "FS-CFG-006", "less than 1"),
        ('[strategy]\nserver_lr = "fast"\n', "FS-CFG-005", "expected a number"),
        ("round = 3\n", "FS-CFG-005", "round = 3"),
        ('[model]\nname = "mlp"\ntarget = "a:B"\n', "FS-CFG-006", "not by both"),
        ("[engine]\nworkers = 0\n", "FS-CFG-006", "greater than or equal to 1"),
        ("[data.partition]\nkind = 'quantity_skew'\n", "FS-CFG-007", "no default"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_its_reason(
    tmp_path: Path, text: str, code: str, why: str | None
) -> None:
    file = written(tmp_path, text)
    error = refused(code, file)
    assert error.where is not None
    assert str(file) in error.where
    assert why is None or why in f"{error.why}"


def test_mistakes_in_the_environment_and_in_assignments_name_their_source() -> None:
    error = refused("FS-CFG-005", environ={"FEDSIM__RUN__ROUNDS": "many"})
    assert error.where is not None
    assert error.where.startswith("environment FEDSIM__RUN__ROUNDS")
    error = refused("FS-CFG-004", sets=["run.sed=1"])
    assert error.where is not None
    assert error.where.startswith("--set run.sed=1")


@pytest.mark.parametrize("text", ["rounds", "=3", "rounds=3", ".rounds=3"])
def test_an_assignment_of_another_form_is_refused(text: str) -> None:
    refused("FS-CFG-010", sets=[text])


def test_unreadable_and_broken_files_are_refused(tmp_path: Path) -> None:
    refused("FS-CFG-002", tmp_path / "none.toml")
    refused("FS-CFG-002", tmp_path)
    error = refused("FS-CFG-003", written(tmp_path, "[run]\nname = mnist\n"))
    assert "line 2" in f"{error.why}"
    (tmp_path / "latin.toml").write_bytes(b"[run]\nname = '\xe9'\n")
    refused("FS-CFG-002", tmp_path / "latin.toml")


def test_unknown_plugins_presets_and_engines_list_the_known_ones() -> None:
    assert "fedavg" in f"{refused('FS-REG-001', sets=['strategy.name=fedag']).why}"
    assert "demo" in f"{refused('FS-CFG-009', preset='dmo').why}"
    assert "stacked" in f"{refused('FS-REG-001', sets=['engine.name=fast']).why}"


# from programs


def test_overrides_of_a_program_replace_keys_and_leave_the_rest() -> None:
    first = from_dict({"strategy": {"name": "fedprox", "mu": 0.3}, "run": {"seed": 4}})
    second = config_from(first, {"round": {"sample": "all"}, "strategy": {"name": "fedavg"}})
    assert (second.run.seed, second.round.sample, second.strategy.parameters) == (4, "all", {})
    assert isinstance(config_from(None, {}), Config)


def test_a_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().config.run.seed = 3  # type: ignore[misc]


def test_the_digest_is_that_of_what_decides_the_numbers() -> None:
    base = load_config().config
    assert digest(config_from(base, {"run": {"name": "x"}, "output": {"plots": False}})) == digest(base)
    assert digest(config_from(base, {"run": {"seed": 2}})) != digest(base)
    assert digest(config_from(base, {"client": {"lr": 0.123}})) != digest(base)


# looking things up


def test_the_json_schema_describes_every_key_of_every_table() -> None:
    schema = json.loads(json.dumps(json_schema()))
    definitions = schema["$defs"]
    for section in TABLES.values():
        for key, entry in definitions[section.__name__]["properties"].items():
            if "$ref" not in entry and "allOf" not in entry:
                assert entry.get("description"), f"{section.__name__}.{key}"
    assert "fedavg" in definitions["StrategySection"]["properties"]["name"]["examples"]
    assert definitions["RunSection"]["additionalProperties"] is False


def test_a_key_is_explained_with_type_default_meaning_and_user() -> None:
    (entry,) = explain("client.lr")
    assert entry.type == "float"
    assert float(entry.default) == LocalSpec().lr
    assert entry.doc
    assert entry.used_by


def test_a_parameter_of_several_plugins_is_explained_for_each() -> None:
    users = {entry.used_by for entry in explain("strategy.mu")}
    assert {'name = "fedprox"', 'name = "fednova"'} <= users


@pytest.mark.parametrize("table", list(TABLES))
def test_every_key_of_every_table_can_be_explained(table: str) -> None:
    entries = explain(table)
    assert entries[0].key == table
    for entry in entries:
        assert entry.doc, entry
        assert entry.used_by, entry


def test_an_unknown_key_is_explained_by_near_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        explain("round.sampel")
    assert caught.value.code == "FS-CFG-014"
    assert "round.sample" in f"{caught.value.hint}"


def test_the_toml_has_every_table_with_values() -> None:
    tables = tomllib.loads(to_toml(load_config().config))
    assert {"run", "data", "model", "client", "round", "strategy", "engine", "evaluation", "output"} <= set(
        tables
    )


def test_the_documentation_lists_every_key(repository: Path) -> None:
    text = (repository / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert text.endswith(as_markdown()), "write its end again: fedsim config explain --markdown"
