"""Configuration: TOML in, a checked value out, and sentences for what cannot be meant."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from recsys.errors import ConfigError
from recsys.experiments import toml
from recsys.tables import Schema, Strict


class Source(Strict):
    log: str | tuple[str, ...]
    columns: Schema = Schema()
    days: int | None = 30


class Training(Strict):
    epochs: Annotated[int, Field(ge=1)] = 10
    rate: Annotated[float, Field(gt=0)] = 1e-3
    loss: Literal["softmax", "bpr"] = "softmax"
    sizes: tuple[int, ...] = (64,)
    amp: bool = False
    low: float = 0.0
    high: float = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Training:
        if self.low > self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; low must not be above it")
        return self


class Run(Strict):
    name: str = "run"
    seed: int = 0
    data: Source
    training: Training = Training()
    towers: tuple[Training, ...] = ()


RUN = """
name = "shop"
[data]
log = "log.csv"
[data.columns]
user = "uid"
positive = {click = 1, "add to cart" = 2.5}
[training]
epochs = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def refused(file: Path, *overrides: str, text: str | None = None) -> str:
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as error:
        toml.read(Run, file, overrides)
    message = str(error.value)
    assert file.name in message or "--set" in message
    assert message.endswith((".", "?", ")")), message
    assert "pydantic" not in message and "Input should" not in message
    return message


def test_a_run_file_is_read_with_its_sections(file: Path) -> None:
    run = toml.read(Run, file)
    assert run.name == "shop"
    assert run.data.columns.user == "uid"
    assert run.data.columns.positive == {"click": 1.0, "add to cart": 2.5}
    assert run.training == Training(epochs=3)


def test_overrides_are_toml_values_and_bare_words_are_text(file: Path) -> None:
    run = toml.read(
        Run,
        file,
        [
            "training.epochs=7",
            "training.rate = 1e-2",
            "training.sizes=[128, 64]",
            "training.amp=true",
            "training.loss=bpr",
            "data.log=/logs/a b=c*.csv",
            'name="quoted"',
            'data.columns.positive."add to cart"=4',
            "data.columns.time_zone=Europe/Berlin",
        ],
    )
    assert run.training == Training(epochs=7, rate=0.01, sizes=(128, 64), amp=True, loss="bpr")
    assert run.data.log == "/logs/a b=c*.csv"
    assert run.name == "quoted"
    assert run.data.columns.positive == {"click": 1.0, "add to cart": 4.0}
    assert run.data.columns.time_zone == "Europe/Berlin"


def test_an_override_is_never_evaluated_and_adds_one_key_only(file: Path) -> None:
    text = "__import__('os').getcwd()"
    assert toml.read(Run, file, [f"name={text}"]).name == text
    assert toml.read(Run, file, ["name=1\nseed = 5"]).seed == 0
    assert "a whole number" in refused(file, "seed = 5\nname=1")


def test_a_date_is_text_where_text_is_wanted(file: Path) -> None:
    assert toml.read(Run, file, ["name=2023-05-25"]).name == date(2023, 5, 25).isoformat()


def test_an_empty_string_is_nothing_where_a_key_may_be_nothing(file: Path) -> None:
    run = toml.read(Run, file, ["data.columns.time=", "data.days=''", "data.columns.separator="])
    assert run.data.columns.time is None and run.data.days is None
    assert run.data.columns.separator == ""
    assert toml.parse(Run, toml.dump(run), "again") == run


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epoch=3", ["'epoch'", "[training]", "Did you mean 'epochs'?"]),
        ("trainig.epochs=3", ["'trainig'", "top level", "'training'"]),
        ("data.columns.usr=x", ["'usr'", "[data.columns]", "'user'"]),
        ("data.epochs=3", ["'epochs'", "[data]", "[training] epochs"]),
        ("data.zzzz=3", ["'zzzz'", "Known: columns, days, log."]),
        ("training.epochs=0", ["[training] epochs", "is 0", "at least 1"]),
        ("training.epochs=2.5", ["[training] epochs", "is 2.5", "a whole number"]),
        ("training.epochs=many", ['"many"', "a whole number"]),
        ("training.epochs='3'", ['"3"', "a whole number"]),
        ("training.amp=1", ["is 1", "true or false"]),
        ("training.rate=-1", ["is -1", "more than 0"]),
        ("training.loss=hinge", ['"hinge"', "'softmax' or 'bpr'"]),
        ("training.sizes=3", ["is 3", "a list"]),
        ("training.sizes=[3, 'x']", ["[training.sizes] 1", '"x"', "a whole number"]),
        ("data.log=3", ["[data] log", "is 3", "text in quotes", "or a list"]),
        ("name=3", ["name in", "is 3", "text in quotes"]),
        ("training=3", ["training in", "a section"]),
        ("training.low=2", ["[training]"[1:-1], "low is 2.0 and high is 1.0"]),
        ("data.log.more=3", ["data.log", '"log.csv"', "not a section"]),
        ("training.sizes=[3", ["not TOML"]),
        ("epochs", ["section.key=value"]),
        ("a b=3", ["section.key=value"]),
        ("=3", ["section.key=value"]),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(
    file: Path, override: str, words: list[str]
) -> None:
    message = refused(file, override)
    assert [word for word in words if word not in message] == [], message


def test_an_unknown_key_is_told_before_the_key_that_it_misspells(file: Path) -> None:
    message = refused(file, text='[data]\nlogs = "a.csv"\n')
    assert "'logs'" in message and "Did you mean 'log'?" in message
    assert "(1 more key is wrong.)" in message


def test_a_missing_key_is_named(file: Path) -> None:
    assert "no [data] log" in refused(file, text="[data]\ndays = 3\n")
    assert "no data" in refused(file, text="seed = 3\n")


def test_bad_toml_names_the_file_and_the_line(file: Path) -> None:
    assert "line 2" in refused(file, text='name = "x"\nseed = = 3\n')


def test_files_that_cannot_be_read_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run file .*none.toml.*recsys init"):
        toml.read(Run, tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="is a folder"):
        toml.read(Run, tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not TOML"):
        toml.read(Run, file)


words = st.text(max_size=20)


@given(
    st.builds(
        Run,
        name=words,
        seed=st.integers(-(2**63), 2**63 - 1),
        data=st.builds(
            Source,
            log=words | st.lists(words, max_size=3).map(tuple),
            days=st.none() | st.integers(0, 99),
            columns=st.builds(
                Schema,
                time=st.none() | st.text(min_size=1),
                positive=st.dictionaries(words, st.floats(allow_nan=False), max_size=3),
            ),
        ),
        towers=st.lists(st.builds(Training, rate=st.floats(1e-300, 1e300)), max_size=2).map(tuple),
    )
)
def test_a_written_value_reads_back_the_same(run: Run) -> None:
    text = toml.dump(run)
    again = toml.parse(Run, text, "again")
    assert again == run
    assert toml.dump(again) == text


def test_a_written_run_has_its_defaults(file: Path) -> None:
    text = toml.dump(toml.read(Run, file))
    assert "rate = 0.001" in text and "[data.columns]" in text


def test_every_recipe_is_a_configuration_that_reads_back() -> None:
    from recsys.experiments import config

    recipes = sorted((Path(config.__file__).parent / "recipes").glob("*.toml"))
    assert recipes
    for recipe in recipes:
        run = config.load(recipe)
        assert config.loads(config.dump(run), recipe.name) == run


def test_the_run_configuration_reads_back_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    from recsys.experiments import config

    file = tmp_path / "run.toml"
    file.write_text('name = "shop"\n[data]\nlog = "log.csv"\n')
    run = config.load(file, ["seed=3"])
    assert run.seed == 3
    assert config.loads(config.dump(run)) == run
    with pytest.raises(ConfigError, match=r"\[towers\]"):
        config.load(file, ["towers.nothing_of_the_kind=1"])
    with pytest.raises(ConfigError, match="of the form"):
        config.load(file, ["name=../x"])
