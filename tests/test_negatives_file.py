"""Negatives given in a file: what is read of it, and that training pushes them down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from recsys.errors import DataError
from recsys.experiments.config import load
from recsys.experiments.run import _learn
from recsys.features.batching.examples import asking, timeline_until
from recsys.features.batching.negatives_file import read_negatives
from recsys.tables import Side
from recsys.towers import training
from recsys.towers.build import build_model
from recsys.towers.encode import encode_items, encode_users


def _chosen(dataset: Any, until: Side) -> set[tuple[str, str]]:
    """Pairs of ids that stand on the sides up to `until`."""
    on = np.asarray(dataset.event_side) <= until
    users = dataset.users.decode(dataset.event_user[on]).to_list()
    return set(zip(users, dataset.items.decode(dataset.event_item[on]).to_list(), strict=True))


def _found(negatives: Any, dataset: Any) -> dict[tuple[str, str], float]:
    users = np.repeat(np.arange(negatives.n_users), np.diff(negatives.offsets))
    pairs = zip(dataset.users.decode(users), dataset.items.decode(negatives.items), strict=True)
    return dict(zip(pairs, negatives.weights.tolist(), strict=True))


@pytest.mark.parametrize("form", ["csv", "parquet", "tsv"])
def test_pairs_of_known_ids_that_the_user_never_chose_become_negatives(
    plain: Any, tmp_path: Path, form: str
) -> None:
    dataset, rng = plain.dataset, np.random.default_rng(3)
    frame = pl.DataFrame(
        {
            "weight": rng.integers(0, 4, 300) / 2,
            "item": [f"i{i:02}" for i in rng.integers(0, 45, 300)],  # i40 to i44 do not exist
            "more": [None] * 300,
            "user": [f"u{u:02}" for u in rng.integers(0, 33, 300)],  # u30 to u32 neither
        }
    )
    path = tmp_path / f"given.{form}"
    if form == "parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path, separator="\t" if form == "tsv" else ",")
    known_items = dataset.items.decode(np.flatnonzero(dataset.item_known)).to_list()
    for until in (Side.TRAIN, Side.VALID):
        chosen = _chosen(dataset, until)
        wanted: dict[tuple[str, str], float] = {}
        counts = {"pairs": 300, "of unknown users": 0}
        counts |= {"of items unknown at the cut-off": 0, "chosen by the user": 0}
        for weight, item, user in frame.select("weight", "item", "user").rows():
            if user >= "u30":
                counts["of unknown users"] += 1
            elif item not in known_items:
                counts["of items unknown at the cut-off"] += 1
            elif (user, item) in chosen:
                counts["chosen by the user"] += 1
            elif weight:
                wanted[user, item] = wanted.get((user, item), 0) + weight
        negatives, notes = read_negatives(path, dataset, until)
        assert _found(negatives, dataset) == wanted and "i39" not in {i for _, i in wanted}
        assert notes == counts | {"negatives": len(wanted)} and all(notes.values())
        assert negatives.n_users == dataset.n_users and negatives.weights.dtype == np.float32


def test_without_weights_each_pair_counts_one_and_numbers_are_ids_too(
    plain: Any, tmp_path: Path
) -> None:
    chosen = _chosen(plain.dataset, Side.TRAIN)
    item = next(f"i{i:02}" for i in range(36) if ("u03", f"i{i:02}") not in chosen)
    path = tmp_path / "given.csv"
    pl.DataFrame({"user": ["u03", "7"], "item": [item, "8"]}).write_csv(path)
    negatives, notes = read_negatives(path, plain.dataset)
    assert _found(negatives, plain.dataset) == {("u03", item): 1.0}
    assert notes["of unknown users"] == 1


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"user": ["u01"], "itm": ["i01"]}, "no column 'item'. Did you mean 'itm'"),
        ({"item": ["i01"]}, "no column 'user'"),
        ({"user": ["u01"], "item": ["i02"], "weight": ["much"]}, "weight 'much' for user 'u01'"),
        ({"user": ["u01"], "item": ["i02"], "weight": ["-1"]}, "weight '-1'"),
        ({"user": ["u01"], "item": ["i02"], "weight": ["inf"]}, "weight 'inf'"),
        ({"user": ["u01", "u02"], "item": ["i02"] * 2, "weight": ["1", None]}, "weight None"),
    ],
)
def test_what_cannot_be_meant_names_the_file_and_the_way_out(
    plain: Any, tmp_path: Path, columns: dict[str, list[str]], complaint: str
) -> None:
    path = tmp_path / "given.csv"
    pl.DataFrame(columns).write_csv(path)
    with pytest.raises(
        DataError, match=r"given\.csv, which training\.negatives\.file names"
    ) as raised:
        read_negatives(path, plain.dataset)
    assert complaint in str(raised.value)
    with pytest.raises(DataError, match=r"no file .*absent\.csv"):
        read_negatives(tmp_path / "absent.csv", plain.dataset)


def test_a_run_with_a_bad_file_of_negatives_leaves_no_run_behind(
    market_run: str, tmp_path: Path
) -> None:
    from recsys.experiments.run import train

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(market_run + "[track]\nenabled = false\n")
    config = load(recipe, [f"out={tmp_path}/runs", "training.negatives.file=absent.csv"])
    with pytest.raises(DataError, match=r"absent\.csv"):
        train(config)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["prepared"]


def test_training_pushes_read_negatives_down(
    plain: Any,
    market_run: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the pairs that nobody chose are given, with some noise that has to be left out."""
    monkeypatch.setattr(training, "WARMUP_STEPS", 3)
    dataset, rng = plain.dataset, np.random.default_rng(0)
    chosen = _chosen(dataset, Side.VALID)
    free = [
        (f"u{u:02}", f"i{i:02}") for u in range(30) for i in range(36)
        if (f"u{u:02}", f"i{i:02}") not in chosen
    ]  # fmt: skip
    picked = rng.permutation(len(free))[: len(free) // 2]
    given = [free[place] for place in sorted(picked)]
    noise = [("nobody", "i01"), sorted(chosen)[0]]
    path, recipe = tmp_path / "given.parquet", tmp_path / "recipe.toml"
    pl.DataFrame([*given, *noise], schema=["user", "item"], orient="row").with_columns(
        weight=pl.lit(30)
    ).write_parquet(path)
    recipe.write_text(
        market_run + "user_id = true\n[training]\nbatch_size = 64\nlearning_rate = 0.02\n"
    )
    others = [free[place] for place in sorted(set(range(len(free))) - set(picked.tolist()))]
    lead = []
    for name, overrides in (("with", [f"training.negatives.file={path}"]), ("without", [])):
        config = load(recipe, overrides)
        made = build_model(dataset, config.towers, item_text=None, seed=0)
        module, _ = _learn(
            config, dataset, made, None, 6, tmp_path / name, logger=False, resume=False
        )
        model = module.model
        timeline = timeline_until(dataset, Side.TRAIN)
        everybody = asking(timeline, np.arange(dataset.n_users), last=50)
        score = encode_users(model, everybody) @ encode_items(model, np.arange(dataset.n_items)).T
        low, high = (
            np.mean([score[_row(dataset.users, u), _row(dataset.items, i)] for u, i in pairs])
            for pairs in (given, others)
        )
        lead.append(high - low)
    assert lead[0] > lead[1] + 0.05 and abs(lead[1]) < 0.05
    said = capsys.readouterr().err
    assert f"{path}: {len(given) + 2:,} pairs, 1 of unknown users, 1 chosen by the user" in said


def _row(vocab: Any, name: str) -> int:
    return int(vocab.encode([name])[0])
