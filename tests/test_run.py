"""The whole way through the command: log, towers, scorecard, run, bundle, answers."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.errors import ConfigError, DataError
from recsys.experiments import cli
from recsys.experiments.config import load, loads

QUICK = [
    "training.epochs=2", "training.batch_size=256", "towers.dimension=16", "towers.hidden=16",
    "text.epochs=1", "split.test=2d", "split.valid=1d",
]  # fmt: skip


def _sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.fixture(scope="module")
def trained(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`recsys init` on the simulated shop, then `recsys train --json` on what it wrote."""
    import contextlib
    import io

    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole way")

    def call(*arguments: object) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        assert not ended.value.code
        return out.getvalue()

    log, items, run = shop / "impressions.parquet", shop / "items.parquet", folder / "run.toml"
    call("init", log, items, "--out", run)
    out = call("train", run, *_sets(*QUICK, f"out={folder}", "name=shop"), "--json")
    said = json.loads(out)
    return SimpleNamespace(folder=folder, said=said, bundle=Path(said["bundle"]), run=run)


def test_train_prints_run_id_bundle_and_scorecard_and_nothing_else(
    trained: SimpleNamespace,
) -> None:
    assert set(trained.said) == {"run_id", "bundle", "scorecard"}
    assert trained.bundle == trained.folder / "shop" / "bundle"
    card = trained.said["scorecard"]
    assert {"model", "baselines", "slices", "index", "impressions"} <= set(card)
    assert list(card["model"]["recall_at_20"]) == ["value", "low", "high"]
    assert card["protocol"]["skips"]["used"] is True  # impressions: skips are on by default
    assert sum(card["protocol"]["skips"]["report"]["total"].values()) > 0
    assert json.loads((trained.bundle.parent / "scorecard.json").read_text()) == card


def test_the_run_stands_in_mlflow_with_params_curves_scorecard_pictures_and_model(
    trained: SimpleNamespace,
) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{trained.folder / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    run = client.get_run(trained.said["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.batch_size"] == "256"
    card = trained.said["scorecard"]
    assert run.data.metrics["test/recall_at_20"] == card["model"]["recall_at_20"]["value"]
    assert len(client.get_metric_history(run.info.run_id, "val/ndcg_at_20")) == 2
    assert client.get_metric_history(run.info.run_id, "train/loss")
    kept = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"scorecard.json", "data.json", "run.toml", "pictures", "bundle"} <= kept
    pictures = {file.path for file in client.list_artifacts(run.info.run_id, "pictures")}
    assert {"pictures/comparison.png", "pictures/impressions.png"} <= pictures
    in_bundle = {file.path for file in client.list_artifacts(run.info.run_id, "bundle")}
    assert {"bundle/manifest.json", "bundle/towers.safetensors"} <= in_bundle
    version = client.get_model_version_by_alias("shop", "candidate")
    manifest = json.loads((trained.bundle / "manifest.json").read_text())
    assert version.run_id == run.info.run_id
    assert version.tags["fingerprint"] == manifest["fingerprint"]


def test_evaluate_gives_the_scorecard_of_the_training_again(
    trained: SimpleNamespace, recsys: Callable[..., SimpleNamespace], shop: Path
) -> None:
    ended = recsys("evaluate", trained.bundle, "--json")
    assert ended.code == 0
    assert json.loads(ended.out) == trained.said["scorecard"]
    on = recsys("evaluate", trained.bundle, "--on", shop / "impressions.parquet", "--json")
    found = json.loads(on.out)["model"]["recall_at_20"]["value"]
    assert found == pytest.approx(trained.said["scorecard"]["model"]["recall_at_20"]["value"])
    table = recsys("evaluate", trained.bundle)
    assert table.code == 0 and trained.said["scorecard"]["verdict"][:30] in table.out


def test_answers_of_the_command_are_those_of_the_library(
    trained: SimpleNamespace, recsys: Callable[..., SimpleNamespace], tmp_path: Path
) -> None:
    from recsys import Recommender

    recommender = Recommender.load(trained.bundle)
    user, item = recommender.bundle.users.ids[0], recommender.bundle.items.ids[0]
    asked = {
        ("recommend", "--user", user): recommender.recommend(user=user, k=4),
        ("recommend", "--history", item, "--history", "x"): recommender.recommend(
            history=[item, "x"], k=4
        ),
        ("recommend", "--user", "nobody"): recommender.recommend(user="nobody", k=4),
        ("similar", "--item", item): recommender.similar(item=item, k=4),
        ("similar", "--text", "oak lamp"): recommender.similar(text="oak lamp", k=4),
    }
    for (verb, *question), answers in asked.items():
        ended = recsys(verb, trained.bundle, *question, "-k", 4, "--json")
        printed = json.loads(ended.out)
        assert ended.code == 0 and printed["items"] == answers.to_list()
        assert (answers.fallback or "") in ended.err
        # Popular items say that their scores are counts, and do not compare.
        popular = "nobody" in question
        assert printed["score_is"] == ("events" if popular else "model")
        assert ("do not compare" in str(printed["fallback"])) == popular
        assert recsys(verb, trained.bundle, *question, "-k", 4).code == 0
    out = tmp_path / "c.parquet"
    assert recsys("candidates", trained.bundle, "--k", 3, "--out", out).code == 0
    first = pl.read_parquet(out).filter(pl.col("user") == user)
    assert first.columns == ["user", "item", "rank", "score"]
    assert first["item"].to_list() == recommender.recommend(user=user, k=3).ids
    pl.DataFrame({"user": [user], "item": [item]}).write_csv(tmp_path / "p.csv")
    pairs = recsys("score", trained.bundle, "--pairs", tmp_path / "p.csv", "--out", out)
    assert pairs.code == 0 and pl.read_parquet(out).columns == ["user", "item", "score"]


def test_mistakes_of_the_user_end_with_2_say_the_way_out_and_write_nothing(
    trained: SimpleNamespace, recsys: Callable[..., SimpleNamespace], shop: Path, tmp_path: Path
) -> None:
    run, bundle = trained.run, trained.bundle
    before = sorted(trained.folder.rglob("*"))
    out = f"out={tmp_path / 'out'}"
    cases = [
        (["train", run, *_sets("training.epoch=2", out)], "epochs"),
        (["train", run, *_sets("training.epochs=many", out)], "[training] epochs"),
        (["train", run, *_sets("evaluate.primary=recall", out)], "evaluate"),
        (["train", run, *_sets("data.log=nowhere.csv", out)], "nowhere.csv"),
        (["train", run, *_sets("data.columns.user=usr", out)], "usr"),
        (["train", run, *_sets("split.test=100d", out)], "side of the split is empty"),
        (["train", run, *_sets(out), "--resume", tmp_path], "holds no run"),
        (["train", run, "--resume", bundle.parent], "was started with"),
        (["evaluate", tmp_path], "is no bundle"),
        (["evaluate", bundle.parent], "is no bundle"),
        (["evaluate", bundle, "--on", "nowhere.parquet"], "nowhere.parquet"),
        (["recommend", bundle], "--user ID or --history"),
        (["similar", bundle, "--text", " "], "text is empty"),
        (["candidates", bundle, "--out", tmp_path], "is a folder"),
        (["candidates", bundle, "--users", "no.csv", "--out", tmp_path / "c.parquet"], "no.csv"),
        (["score", bundle, "--pairs", "no.csv", "--out", tmp_path / "s.parquet"], "no.csv"),
    ]
    for arguments, message in cases:
        ended = recsys(*arguments)
        assert ended.code == 2, (arguments, ended.err)
        assert message in ended.err, (arguments, ended.err)
        assert "Traceback" not in ended.err and not ended.out
    assert sorted(trained.folder.rglob("*")) == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_mistake_of_ours_ends_with_1(
    trained: SimpleNamespace,
    recsys: Callable[..., SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from recsys.serving.recommender import Recommender

    monkeypatch.setattr(Recommender, "similar", lambda *_, **__: 1 / 0)
    ended = recsys("similar", trained.bundle, "--item", "i")
    assert ended.code == 1 and "mistake in recsys, not yours" in ended.err


# --- resuming and splits, without a tracking store ------------------------------------------------


def _quiet(run: str, folder: Path, *more: str) -> Any:
    lines = "\n".join(["[track]", "enabled = false", *more])
    return loads(f'out = "{folder.as_posix()}"\n{run}\n{lines}\n')


def test_a_run_of_relative_paths_goes_on_as_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recsys.experiments import config as configs
    from recsys.experiments.run import _check_same

    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    asked = configs.loads('[data]\nlog = "log.csv"\n')
    (tmp_path / "run" / "run.toml").write_text(configs.dump(configs.absolute(asked)))
    _check_same(asked, Path("run"))
    with pytest.raises(ConfigError, match=r"was started with data.log = .*other.csv"):
        _check_same(configs.loads('[data]\nlog = "other.csv"\n'), Path("run"))


@pytest.mark.parametrize("towers", ["", "cooccurrence_neighbours = 9\ntext_neighbours = 3\n"])
def test_a_run_that_was_stopped_goes_on_to_the_same_towers(
    towers: str, market_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pytorch_lightning as lightning
    import torch

    from recsys.experiments.run import train

    torch.set_num_threads(1)
    market_run = market_run.replace("[towers]\n", f"[towers]\n{towers}")
    assert towers in market_run
    short = ("[training]", "epochs = 2", "batch_size = 64", "[text]", "epochs = 1")
    whole = train(_quiet(market_run, tmp_path / "whole", *short))
    config = _quiet(market_run, tmp_path / "cut", *short)
    after = lightning.Trainer.fit

    def stopped(self: Any, *args: Any, **kwargs: Any) -> None:
        self.fit_loop.max_epochs = 1
        after(self, *args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lightning.Trainer, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    run = tmp_path / "cut" / "run"
    assert not (run / "bundle").exists() and (run / "checkpoints" / "last.ckpt").exists()
    assert json.loads((run / "track.json").read_text())["status"] == "KILLED"
    again = train(config, resume=run)
    assert again.folder == run

    def content(bundle: Path) -> str:
        return json.loads((bundle / "manifest.json").read_text())["content"]

    assert content(again.bundle) == content(whole.bundle)
    assert again.scorecard["model"] == whole.scorecard["model"]
    other = config.model_copy(update={"seed": 3})
    with pytest.raises(ConfigError, match="was started with seed = 0, and now it is 3"):
        train(other, resume=run)
    longer = config.model_copy(
        update={"training": config.training.model_copy(update={"epochs": 3})}
    )
    assert train(longer, resume=run).folder == run
    assert json.loads((run / "track.json").read_text())["status"] == "FINISHED"


def test_a_choice_of_epochs_that_had_ended_is_not_taken_up_again(
    market_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped early, then killed before the refit's first checkpoint."""
    import torch

    from recsys.experiments import run as runs

    torch.set_num_threads(1)
    lines: list[str] = []
    monkeypatch.setattr(runs, "say", lines.append)

    def learn(folder: Path, more: str, resume: bool = False) -> tuple[dict[str, Any], int]:
        """The weights, and how many epochs the choice took."""
        rules = f"[training]\nlearning_rate = 0.02\nbatch_size = 64\n{more}\n"
        config = _quiet(market_run, tmp_path / "out", rules)
        towers = runs.Untrained(config, runs.prepare(config))
        lines.clear()
        module = runs.fit(config, towers.dataset, towers.make, folder=folder, resume=resume)
        said = f"at most {config.training.epochs},"
        return module.state_dict(), sum(said in line for line in lines)

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)

    once = "epochs = 30\npatience = 1\nrefit = false"
    first, took = learn(tmp_path / "one", once)
    best = (tmp_path / "one/checkpoints/best.ckpt").read_bytes()
    again, more = learn(tmp_path / "one", once, resume=True)
    assert 1 < took < 30 and more == 0 and same(first, again)
    assert (tmp_path / "one/checkpoints/best.ckpt").read_bytes() == best

    twice = "epochs = 30\npatience = 1"
    whole, took = learn(tmp_path / "whole", twice)
    with monkeypatch.context() as patch:
        real = runs._learn

        def killed(*given: Any, **named: Any) -> Any:
            if given[3] is None:  # nothing to choose on: the refit
                raise KeyboardInterrupt
            return real(*given, **named)

        patch.setattr(runs, "_learn", killed)
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path / "cut", twice)
    resumed, more = learn(tmp_path / "cut", twice, resume=True)
    assert more == 0 and same(whole, resumed)

    # Another number of epochs is a choice yet to be made, and a new run knows nothing of an old.
    assert learn(tmp_path / "one", once.replace("30", "40"), resume=True)[1] > 0
    assert learn(tmp_path / "one", once)[1] == took


def test_a_table_that_came_or_went_is_named_when_a_run_is_to_go_on(
    market_run: str, tmp_path: Path
) -> None:
    from recsys.experiments.config import dump
    from recsys.experiments.run import train

    def config(*options: str) -> Any:
        return _quiet(market_run, tmp_path, "[training.id_init]", *options)

    bare, more = config('kind = "random"'), config('kind = "spectral"', "powers = [0.5, 0.5, 0.0]")
    for then, now, message in ((bare, more, "'random', and now it is 'spectral'"),
                               (more, bare, "'spectral', and now it is 'random'")):  # fmt: skip
        (tmp_path / "run.toml").write_text(dump(then))
        with pytest.raises(ConfigError, match=f"training.id_init.kind = {message}"):
            train(now, resume=tmp_path)


def test_given_files_are_a_split_like_any_other_and_valid_may_be_absent(
    market: Path, market_run: str, tmp_path: Path
) -> None:
    from recsys.experiments.run import prepare, train

    events = pl.read_csv(market / "events.csv")
    events.head(400).write_csv(tmp_path / "train.csv")
    events.slice(400, 80).write_csv(tmp_path / "valid.csv")
    events.tail(120).write_csv(tmp_path / "test.csv")
    files = {name: (tmp_path / f"{name}.csv").as_posix() for name in ("train", "valid", "test")}
    for given in (("train", "valid", "test"), ("train", "test")):
        lines = "\n".join(f'{name} = "{files[name]}"' for name in given)
        run = market_run.replace(f'log = "{market.as_posix()}/events.csv"', lines)
        run = run.replace('[split]\ntest = "2d"\nvalid = "1d"\n', "[training]\nepochs = 1\n")
        config = _quiet(run, tmp_path / "-".join(given))
        dataset = prepare(config)
        counts = dataset.manifest["counts"]
        assert dataset.manifest["split"]["kind"] == "given"
        assert counts["test_positives"] == 120
        expected = (400, 80) if "valid" in given else (360, 40)
        assert (counts["train_positives"], counts["valid_positives"]) == expected
        result = train(config)
        said = result.scorecard["protocol"]
        assert said["targets"] + said["repeats_left_out"] == 120
        assert (result.folder / "checkpoints" / "best.ckpt").exists()


def test_without_a_test_side_the_bundle_knows_everything_and_nothing_is_judged(
    market_run: str, tmp_path: Path
) -> None:
    """How one trains for tomorrow: on all there is."""
    from recsys.experiments import show
    from recsys.experiments.run import train
    from recsys.serving.recommender import Recommender

    run = market_run.replace('test = "2d"', "test = 0")
    result = train(_quiet(run, tmp_path, "[training]", "epochs = 1"))
    assert result.scorecard["verdict"] == "Nothing was judged: there is no later positive."
    assert result.scorecard["model"]["recall_at_5"]["value"] is None
    show.scorecard(result.scorecard)
    recommender = Recommender.load(result.bundle)
    assert len(recommender.bundle.timeline.item) == 600
    assert "i39" in recommender.bundle.items.ids
    assert len(recommender.recommend(user="u01", k=5).ids) == 5


def test_the_same_recipe_runs_on_other_data_of_the_same_form(
    market: Path, market_run: str, tmp_path: Path
) -> None:
    """`--set data.log=…` is all it takes; a second run has a folder of its own."""
    from recsys.experiments.run import train

    path = tmp_path / "recipe.toml"
    path.write_text(market_run + "[track]\nenabled = false\n[training]\nepochs = 1\n")
    other = tmp_path / "other.csv"
    shutil.copy(market / "events.csv", other)
    options = [f"out={tmp_path / 'runs'}", f"data.log={other}"]
    first, second = (train(load(path, options)) for _ in range(2))
    assert (first.folder.name, second.folder.name) == ("run", "run-2")
    assert first.scorecard == second.scorecard
    written = tomllib.loads((second.folder / "run.toml").read_text())
    assert written["data"]["log"] == str(other)


def test_towers_that_learned_nothing_but_nan_make_no_bundle(plain: Any, tmp_path: Path) -> None:
    import torch

    from recsys.errors import RecsysError
    from recsys.experiments.bundling import make_bundle
    from recsys.towers.build import build_model

    model = build_model(plain.dataset, plain.config.towers, item_text=None, seed=0).eval()
    with torch.no_grad():
        model.item_tower.inputs.ids.weight[3, 0] = float("nan")
    with pytest.raises(RecsysError, match="NaN"):
        make_bundle(plain.config, plain.dataset, model, None, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_a_bundle_holds_nothing_of_the_test_side(plain: Any, tiny: Any) -> None:
    from recsys.serving.recommender import Recommender

    for built in (plain, tiny):
        bundle = Recommender.load(built.bundle).bundle
        assert (bundle.timeline.time < bundle.cutoff).all()
        if bundle.timeline.shown is not None:
            assert (bundle.timeline.shown.values < bundle.cutoff).all()
        sides = np.asarray(built.dataset.event_side)
        assert len(bundle.timeline.item) == int((sides < 2).sum())
    bundle = Recommender.load(plain.bundle).bundle
    assert "i39" not in bundle.items.ids  # first chosen on the last day, and in no table


def test_a_log_that_fails_leaves_no_run_behind(market_run: str, tmp_path: Path) -> None:
    from recsys.experiments.run import train

    config = _quiet(market_run.replace("events.csv", "absent.csv"), tmp_path)
    with pytest.raises(DataError, match=r"absent\.csv"):
        train(config)
    assert not list(tmp_path.iterdir())


def test_texts_learn_company_of_the_train_side_first_and_of_both_for_the_refit(
    shop_run: str, tmp_path: Path
) -> None:
    from recsys.experiments.run import Untrained, fit, prepare, text_vectors
    from recsys.tables import Side

    toml = shop_run.replace("[text]\n", '[text]\nviews = ["cooccurrence"]\ndimension = 8\n')
    config = loads(f'out = "{tmp_path.as_posix()}"\n{toml}')
    dataset = prepare(config)
    fingerprint = {}
    for side in (Side.TRAIN, Side.VALID):
        encoder = text_vectors(config, dataset, side)[0]
        assert encoder is not None
        fingerprint[side] = encoder.fingerprint
    assert fingerprint[Side.TRAIN] != fingerprint[Side.VALID]

    towers = Untrained(config, dataset)
    first = towers.make()
    assert towers.encoder is not None and towers.encoder.fingerprint == fingerprint[Side.TRAIN]
    module = fit(config, dataset, towers.make, remake=towers.remake, folder=tmp_path / "fit")
    assert towers.encoder.fingerprint == fingerprint[Side.VALID]
    assert module.model.items.text is not None and first.items.text is not None
    assert not np.allclose(module.model.items.text, first.items.text)

    plain = Untrained(loads(f'out = "{tmp_path.as_posix()}"\n{shop_run}'), dataset)
    plain.make()
    before = plain.encoder
    plain.remake()
    assert plain.encoder is before  # nothing new to learn from: read once


def test_what_the_validation_side_is_the_first_to_know_has_ids_once_it_is_learned(
    tmp_path: Path,
) -> None:
    """A catalogue that renews itself: each item is chosen within a short time of its life."""
    import torch

    from recsys.experiments.bundling import make_bundle
    from recsys.experiments.run import Untrained, prepare
    from recsys.serving.manifest import read_manifest

    random = np.random.default_rng(0)
    n = 2000
    born = np.arange(n) // 20
    frame = pl.DataFrame(
        {
            "user": [f"u{x}" for x in random.integers(0, 40, n)],
            "item": [f"i{x}" for x in born + random.integers(0, 5, n)],
            "time": 1_700_000_000 + np.arange(n) * 60,
        }
    )
    frame.write_parquet(tmp_path / "log.parquet")
    config = loads(
        f'out = "{tmp_path.as_posix()}"\n[data]\nlog = "{tmp_path.as_posix()}/log.parquet"\n'
        "[split]\nvalid = 0.2\ntest = 0.1\n[towers]\nuser_id = true\n"
    )
    dataset = prepare(config)
    assert dataset.n_refit_items > dataset.n_warm_items + 10
    towers = Untrained(config, dataset)
    first, again = towers.make().eval(), towers.remake().eval()
    assert first.item_tower.inputs.ids.num_embeddings == dataset.n_warm_items + 1
    assert again.item_tower.inputs.ids.num_embeddings == dataset.n_refit_items + 1
    news = torch.arange(dataset.n_warm_items + 1, dataset.n_refit_items + 1)
    with torch.no_grad():
        alike = [len(model.embed_items(news).unique(dim=0)) for model in (first, again)]
    assert alike == [1, len(news)]
    path = make_bundle(config, dataset, again, None, tmp_path / "bundle")
    assert read_manifest(path)["warm_items"] == dataset.n_refit_items
