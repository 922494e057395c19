"""The command: what it prints where, and the code it ends with."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from recsys.errors import BundleError, ConfigError
from recsys.experiments import cli, show
from recsys.experiments.wizard import Draft

VERBS = [
    "init",
    "keys",
    "prepare",
    "train",
    "evaluate",
    "candidates",
    "similar",
    "recommend",
    "score",
]
VERBS += [
    "doctor",
    "simulate",
    "demo",
    "replay",
    "serve",
    "publish",
    "rollback",
    "prune",
    "golden",
    "promote",
    "export",
]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a stand-in for a module of the library, so that the command is tested alone."""

    def put(name: str, **members: Any) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    return put


class Answers:
    fallback: str | None = None

    def to_list(self) -> list[dict[str, Any]]:
        return [
            {"item": "i1", "score": 0.9, "title": "Brass [lamp]", "tags": ["a", "b"]},
            {"item": "i2", "score": 0.5, "title": None, "tags": []},
        ]


@pytest.fixture
def recommender(library: Callable[..., None]) -> dict[str, Any]:
    asked: dict[str, Any] = {}

    class Recommender:
        @staticmethod
        def load(path: Path) -> Any:
            asked["bundle"] = str(path)
            print("a library talks")  # must not reach stdout
            return Recommender()

        def similar(self, **query: Any) -> Answers:
            asked.update(query)
            return Answers()

        def recommend(self, **query: Any) -> Answers:
            asked.update(query)
            answers = Answers()
            answers.fallback = "user 'u9' is unknown" if query["user"] == "u9" else None
            return answers

    library("recsys.serving.recommender", Recommender=Recommender)
    return asked


def test_help_names_every_verb(recsys: Callable[..., Any]) -> None:
    ended = recsys("--help")
    assert ended.code == 0
    listed = [line.split()[0] for line in ended.out.partition("Commands:")[2].splitlines() if line]
    assert listed == VERBS
    assert "…" not in ended.out and "..." not in ended.out.partition("Commands:")[2]


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_an_example_that_the_command_understands(
    recsys: Callable[..., Any], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    ended = recsys(verb, "--help")
    assert ended.code == 0
    examples = [line.strip() for line in ended.out.splitlines() if line.strip()[:7] == "recsys "]
    assert examples
    for example in examples:
        arguments = shlex.split(example)[1:]
        assert arguments[0] == verb
        # The verb itself does nothing: only what is parsed counts.
        for command in cli.app.registered_commands:
            monkeypatch.setattr(command.callback, "__code__", _nothing(command.callback))
        assert recsys(*arguments).code == 0, example


def _nothing(function: Any) -> Any:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    space: dict[str, Any] = {}
    exec(f"def {function.__name__}({', '.join(names)}): pass", space)
    return space[function.__name__].__code__


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "try:\n"
        "    from recsys.experiments.cli import main; main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'polars', 'numpy', 'mlflow', 'pytorch_lightning', 'rich', 'pydantic'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    # CPU seconds, for a machine may be busy; all of its work counts.
    best = min(_cpu_seconds([sys.executable, "-m", "recsys", "--help"]) for _ in range(3))
    assert best < 0.4


def _cpu_seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, capture_output=True, check=True)
    after = os.times()
    return (
        after.children_user + after.children_system
        - before.children_user - before.children_system
    )  # fmt: skip


def test_similar_prints_a_list_of_objects_and_nothing_else(
    recsys: Callable[..., Any], recommender: dict[str, Any]
) -> None:
    ended = recsys("similar", "b", "--item", "i7", "-k", "3", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["items"] == Answers().to_list()
    assert "a library talks" in ended.err
    assert recommender == {"bundle": "b", "item": "i7", "text": None, "k": 3, "exact": False}


def test_people_get_a_table_with_titles(
    recsys: Callable[..., Any], recommender: dict[str, Any]
) -> None:
    ended = recsys("similar", "b", "--text", "a lamp")
    assert "Brass [lamp]" in ended.out and "0.900" in ended.out and "a, b" in ended.out
    assert recommender["text"] == "a lamp" and recommender["k"] == 10


def test_recommend_takes_a_user_or_a_history_and_tells_a_fallback_aside(
    recsys: Callable[..., Any], recommender: dict[str, Any]
) -> None:
    ended = recsys("recommend", "b", "--user", "u9", "--json")
    assert "u9" in ended.err and "u9" in json.loads(ended.out)["fallback"]
    assert recsys("recommend", "b", "--history", "i1,i2", "--history", "i3").code == 0
    assert recommender["history"] == ["i1,i2", "i3"] and recommender["user"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("similar", "b"), "--item ID or --text TEXT"),
        (("similar", "b", "--item", "i", "--text", "t"), "--item ID or --text TEXT"),
        (("recommend", "b"), "--user ID or --history"),
        (("similar", "b", "--item", "i", "-k", "0"), "-k"),
        (("similar", "b", "--item", "i", "-k", "many"), "-k"),
        (("similar",), "BUNDLE"),
        (("similar", "b", "--itm", "i"), "--itm"),
        (("smilar", "b"), "smilar"),
        (("candidates", "b"), "--out"),
        (("train", "no such file.toml"), "no such file.toml"),
        (("replay", "no such folder"), "track.json"),
    ],
)
def test_a_mistake_of_the_user_ends_with_2_and_no_traceback(
    recsys: Callable[..., Any],
    recommender: dict[str, Any],
    library: Callable[..., None],
    arguments: tuple[str, ...],
    words: str,
) -> None:
    from recsys.experiments import toml
    from recsys.tables import Strict

    library("recsys.experiments.config", load=lambda path, sets: toml.read(Strict, path, sets))
    library("recsys.experiments.run", train=None)
    ended = recsys(*arguments)
    assert ended.code == 2
    assert words in ended.err and "Traceback" not in ended.err
    assert ended.out == "" and recommender == {}


def test_an_error_of_the_library_is_one_message_on_stderr(
    recsys: Callable[..., Any], library: Callable[..., None]
) -> None:
    def evaluate(bundle: Path, on: str | None = None, against: Any = ()) -> None:
        raise BundleError(f"{bundle}/manifest.json says 128, but index.bin was built with 64.")

    library("recsys.experiments.evaluation.evaluate", evaluate=evaluate)
    ended = recsys("evaluate", "b", "--json")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "b/manifest.json says 128, but index.bin was built with 64.\n"
    assert "Traceback" in recsys("--verbose", "evaluate", "b").err


def test_a_mistake_of_ours_ends_with_1_and_says_how_to_see_more(
    recsys: Callable[..., Any], library: Callable[..., None]
) -> None:
    def evaluate(bundle: Path, on: str | None = None, against: Any = ()) -> None:
        raise ZeroDivisionError("division by zero")

    library("recsys.experiments.evaluation.evaluate", evaluate=evaluate)
    ended = recsys("evaluate", "b")
    assert ended.code == 1
    assert "ZeroDivisionError: division by zero" in ended.err and "--verbose" in ended.err
    assert "Traceback" not in ended.err
    assert "Traceback" in recsys("--verbose", "evaluate", "b").err


def test_an_interrupt_ends_with_130_also_as_lightning_passes_it_on(
    recsys: Callable[..., Any], library: Callable[..., None]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def lightning(*_: Any, **__: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    for evaluate in (interrupted, lightning):
        library("recsys.experiments.evaluation.evaluate", evaluate=evaluate)
        ended = recsys("evaluate", "b")
        assert ended.code == 130 and "Traceback" not in ended.err


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    code = (
        "import sys, types\n"
        "module = types.ModuleType('recsys.experiments.evaluation.evaluate')\n"
        "card = {'model': {'x%d' % n: 'y' * 100 for n in range(10_000)}}\n"
        "module.evaluate = lambda bundle, on=None, against=(): card\n"
        "sys.modules['recsys.experiments.evaluation.evaluate'] = module\n"
        "from recsys.experiments.cli import main; main(['evaluate', 'b', '--json'])\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert writer.stdout and writer.stderr
    writer.stdout.read(10)
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait(60) == 0


CARD: dict[str, Any] = {
    "model": {
        "recall_at_20": {"value": 0.21, "low": 0.2, "high": 0.22},
        "ndcg_at_20": {"value": 0.11, "low": None, "high": None},
        "coverage_at_20": {"value": math.nan, "low": None, "high": None},
    },
    "baselines": {
        "recent_popularity": {
            "recall_at_20": {"value": 0.05, "low": 0.04, "high": 0.06},
            "ndcg_at_20": {"value": None, "low": None, "high": None},
        }
    },
    "slices": {
        "cold_items_among_cold": {
            "queries": 1200,
            "candidates": 300,
            "chance": {"recall_at_20": 0.0667},
            "model": {"recall_at_20": {"value": 0.5, "low": 0.4, "high": 0.6}},
            "baselines": {},
        }
    },
    "index": {"kind": "hnsw", "recall_at_20": {"value": 0.99, "low": 0.98, "high": 1.0}},
    "impressions": {
        "requests": 900,
        "model": {"auc": {"value": 0.61, "low": 0.6, "high": 0.62}},
        "baselines": {"newest": {"auc": {"value": 0.55, "low": 0.54, "high": 0.56}}},
    },
    "protocol": {"queries": "each event", "queries_judged": 1200, "split": {"kind": "time"}},
    "verdict": "The towers beat every baseline.",
}


def test_train_prints_one_object_with_run_bundle_and_scorecard(
    recsys: Callable[..., Any], library: Callable[..., None]
) -> None:
    seen: dict[str, Any] = {}

    def train(config: Any, resume: Path | None = None) -> Any:
        print("Epoch 1")
        seen.update(config=config, resume=resume)
        return SimpleNamespace(run_id="r1", bundle=Path("runs/shop/bundle"), scorecard=CARD)

    library("recsys.experiments.config", load=lambda path, sets: (path, sets))
    library("recsys.experiments.run", train=train)
    ended = recsys("train", "run.toml", "--set", "a.b=1", "--set", "c.d=x", "--json")
    printed = json.loads(ended.out)
    assert sorted(printed) == ["bundle", "run_id", "scorecard"]
    assert printed["bundle"] == "runs/shop/bundle"
    assert printed["scorecard"]["model"]["recall_at_20"] == CARD["model"]["recall_at_20"]
    assert printed["scorecard"]["model"]["coverage_at_20"]["value"] is None
    assert seen == {"config": (Path("run.toml"), ["a.b=1", "c.d=x"]), "resume": None}
    ended = recsys("train", "run.toml", "--resume", "runs/shop")
    assert seen["resume"] == Path("runs/shop")
    assert "runs/shop/bundle" in ended.out and "Epoch 1" in ended.err


def test_the_scorecard_of_people_has_baselines_slices_protocol_and_verdict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show.scorecard(CARD)
    out = capsys.readouterr().out
    for words in (
        "two towers",
        "recent popularity",
        "0.2100 ±0.0100",
        "cold items among cold: 1,200 queries, 300 candidates",
        "chance",
        "0.6100 ±0.0100",
        "index recall@20",
        "each event",
        "The towers beat every baseline.",
    ):
        assert words in out


def test_init_writes_a_file_and_never_over_another(
    recsys: Callable[..., Any], library: Callable[..., None], tmp_path: Path
) -> None:
    def guess(log: Path, items: Path | None, folder: Path) -> Draft:
        return Draft([f"# {log.name} {items}"])

    library("recsys.experiments.wizard", guess=guess)
    out = tmp_path / "run.toml"
    assert recsys("init", "log.csv", "--out", str(out)).code == 0
    assert out.read_text() == "# log.csv None\n"
    ended = recsys("init", "log.csv", "items.csv", "--out", str(out))
    assert ended.code == 2 and "--force" in ended.err
    assert recsys("init", "log.csv", "items.csv", "--out", str(out), "--force").code == 0
    assert out.read_text() == "# log.csv items.csv\n"
    assert recsys("init", "log.csv", "--out", "-").out == "# log.csv None\n"


def test_nothing_is_written_when_the_guess_fails(
    recsys: Callable[..., Any], library: Callable[..., None], tmp_path: Path
) -> None:
    def guess(log: Path, items: Path | None, folder: Path) -> Draft:
        raise ConfigError("There is no log.csv.")

    library("recsys.experiments.wizard", guess=guess)
    assert recsys("init", "log.csv", "--out", str(tmp_path / "run.toml")).code == 2
    assert list(tmp_path.iterdir()) == []


def test_candidates_and_scores_are_files_with_a_line_about_them(
    recsys: Callable[..., Any], library: Callable[..., None], recommender: dict[str, Any]
) -> None:
    seen: dict[str, Any] = {}

    def write_candidates(recommender: Any, out: Path, progress: Any, **options: Any) -> Any:
        progress(1, 2)
        seen.update(options)
        return SimpleNamespace(path=out, users=5000, unknown=2, resumed=0)

    def write_scores(recommender: Any, pairs: Path, out: Path, log: Any = None) -> Any:
        return SimpleNamespace(path=out, pairs=7, unknown_users=0, unknown_items=1)

    library("recsys.serving.candidates", write_candidates=write_candidates)
    library("recsys.serving.score", write_scores=write_scores)
    ended = recsys("candidates", "b", "--k", "50", "--out", "c.parquet", "--users", "u.csv")
    assert ended.out == "c.parquet: 5,000 users, 2 unknown\n"
    assert seen == {
        "k": 50,
        "users": Path("u.csv"),
        "histories": None,
        "exact": False,
        "drop_seen": True,
    }
    ended = recsys("score", "b", "--pairs", "p.parquet", "--out", "s.parquet")
    assert ended.out == "s.parquet: 7 pairs, 1 unknown items\n"


def test_the_module_is_the_command() -> None:
    begin = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "recsys", "--version"], capture_output=True, text=True
    )
    assert ended.stdout.startswith("recsys 0.") and ended.returncode == 0
    assert time.monotonic() - begin < 30
