"""Bundle: everything needed to answer, in one folder that is whole or absent.

Legend: N item rows (row 0 is "nothing known"), U user rows, D dimensions of the stored vector.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import nn
from torch.overrides import TorchFunctionMode

from recsys.errors import BundleError
from recsys.features.prepared.columns import ContextColumn
from recsys.features.prepared.item_coder import ItemCoder
from recsys.features.prepared.timeline import Timeline
from recsys.files import atomic_folder, read_json, sha256_bytes, write_json
from recsys.ragged import Ragged
from recsys.search import ExactIndex, Index
from recsys.serving.id_table import IdTable
from recsys.serving.index import (
    GraphRules,
    HnswIndex,
    IndexRules,
    build_index,
    graph_rules,
)
from recsys.serving.manifest import Check, begin, digests, may_replace, write_manifest
from recsys.serving.neighbours import write_neighbours
from recsys.serving.recall import recall_against_exact
from recsys.towers.embedding import FeatureSpec, FeatureTable
from recsys.towers.encode import Embeddings
from recsys.towers.rules import TowerRules
from recsys.towers.two_tower import TwoTower
from recsys.vocab import Vocab

if TYPE_CHECKING:
    from recsys.features.text.encoder import TextEncoder


CODING = "coding.json"
ITEM_IDS, USER_IDS = "item_ids.safetensors", "user_ids.safetensors"
"""Tables that lead from ids to rows."""


@dataclass(frozen=True)
class Bundle:
    """What a recommender answers from.

    Args:
        model: both towers with the features of every row.
        items: external ids of item rows; the first are those with an id vector.
        users: external ids of user rows.
        catalog: one row an item in the order of `items`, row 1 first; column `item` and what
            answers carry along.
        window: (N, 2) int64, from when on and until when each item may be recommended.
        timeline: every event, impression and birth before the cut-off.
        vectors: (N, D) float32 stored item vectors as of the cut-off.
        rows: (n,) item rows in the index: those that exist and are available.
        index: over `vectors[rows]`.
        cutoff: microseconds; nothing later is known. None without a clock.
        contexts: how each context column becomes codes.
        manifest: configuration, counts, skip report, measured index recall and more.
        encoder_folder: the text encoder's folder, or None.
        known_items: item rows below this were known when the bundle was made; 0: all. Rows above
            come from a later log and are answered only by towers that read item statistics.
        coder: how an item that comes later becomes codes; None: made before bundles knew that.
    """

    model: TwoTower
    items: Vocab
    users: Vocab
    catalog: pl.DataFrame
    window: np.ndarray
    timeline: Timeline
    vectors: np.ndarray
    rows: np.ndarray
    index: Index
    cutoff: int | None
    contexts: tuple[ContextColumn, ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)
    encoder_folder: Path | None = None
    known_items: int = 0
    coder: ItemCoder | None = None

    @cached_property
    def encoder(self) -> TextEncoder | None:
        """The text encoder, loaded when first asked for."""
        if self.encoder_folder is None:
            return None
        from recsys.features.text.encoder import TextEncoder

        return TextEncoder.load(self.encoder_folder)


def available(window: np.ndarray, as_of: int | None) -> np.ndarray:
    """(N,) bool: what the item table allows to be recommended at the moment; row 0 never.

    Args:
        window: (N, 2) int64, from when on and until when each item is available.
        moment: microseconds; None without a clock: only items never available are left out.
    """
    allowed = window[:, 0] < window[:, 1]
    if as_of is not None:
        allowed = (window[:, 0] <= as_of) & (as_of < window[:, 1])
    allowed[0] = False
    return allowed


def answerable(bundle: Bundle, as_of: int | None) -> np.ndarray:
    """(N,) bool: item rows that exist and are available at the moment.

    Rows of a later log only where the towers read item statistics: else nothing is known of them.
    """
    allowed = bundle.timeline.alive(as_of) & available(bundle.window, as_of)
    if bundle.known_items and not bundle.model.uses_statistics:
        allowed[bundle.known_items :] = False
    return allowed


def save(
    bundle: Bundle,
    path: str | Path,
    *,
    rules: IndexRules,
    encoder: TextEncoder | None = None,
    recall_k: int = 100,
    seed: int = 0,
) -> Path:
    """Write a bundle beside `path` under a temporary name, sync it and rename it.

    The index's recall against exact search is measured here, with item vectors as queries and
    `recall_k` answers, and written into the manifest; so is that of the table of neighbours,
    which is made here unless `rules.neighbours` is 0.

    Raises:
        BundleError: something else than a bundle stands at `path`.
    """
    path = Path(path)
    if path.exists() and not may_replace(path):
        raise BundleError(
            f"{path} holds something that is no bundle, and would be replaced. "
            "Name another folder, or remove it."
        )
    model, timeline = bundle.model, bundle.timeline
    with atomic_folder(path) as folder:
        weights = {name: t.contiguous().cpu() for name, t in model.state_dict().items()}
        save_tensors(weights, folder / "towers.safetensors")
        buffers = {
            f"{side}.{name}": buffer.contiguous().cpu()
            for side, table in (("items", model.items), ("users", model.users))
            for name, buffer in table.named_buffers()
        }
        save_tensors(buffers, folder / "features.safetensors")
        save_arrays(_timeline_arrays(timeline), folder / "timeline.safetensors")
        Embeddings(bundle.items.ids, bundle.vectors[1:], model.rules.score)
        indexed = indexed_vectors(bundle)
        bundle.items.save(folder / "item_ids.parquet")
        bundle.users.save(folder / "user_ids.parquet")
        IdTable.of(bundle.items.ids).save(folder / ITEM_IDS)
        IdTable.of(bundle.users.ids).save(folder / USER_IDS)
        bundle.catalog.write_parquet(folder / "catalog.parquet", statistics=False)
        if isinstance(bundle.index, HnswIndex):
            bundle.index.save(folder / "index.bin")
        if encoder is not None:
            encoder.save(folder / "text")
        if bundle.coder is not None:
            write_json(folder / CODING, bundle.coder.to_json())
        fingerprint = _fingerprint(digests(folder), bundle)
        arrays = {
            "vectors": np.ascontiguousarray(bundle.vectors),
            "rows": bundle.rows,
            "window": np.ascontiguousarray(bundle.window),
        }
        if len(bundle.rows) and not _consecutive(bundle.rows):
            arrays["indexed"] = indexed  # on disk twice rather than in memory twice
        save_arrays(arrays, folder / "vectors.safetensors", metadata={"fingerprint": fingerprint})
        neighbours = None
        if rules.neighbours:
            neighbours = write_neighbours(
                folder, bundle.index, indexed, rules.neighbours, seed=seed
            )
        for file in folder.glob("*.safetensors"):
            os.chmod(file, 0o666 & folder.stat().st_mode)  # safetensors gives 0600
        manifest = {
            **bundle.manifest,
            "fingerprint": fingerprint,
            "cutoff": bundle.cutoff,
            "timed": timeline.timed,
            "score": model.rules.score,
            "dimension": model.vector_dimension,
            "items": len(bundle.items.ids),
            "users": len(bundle.users.ids),
            "indexed": len(bundle.rows),
            "neighbours": neighbours,
            "towers": model.rules.model_dump(),
            "item_spec": asdict(model.item_spec),
            "user_spec": asdict(model.user_spec),
            "item_categories": list(model.items.category_names),
            "user_categories": list(model.users.category_names),
            "contexts": [
                {
                    "name": column.name,
                    "values": None if column.vocab is None else column.vocab.ids.to_list(),
                    "edges": column.edges,
                }
                for column in bundle.contexts
            ],
            "index": {
                "kind": "hnsw" if isinstance(bundle.index, HnswIndex) else "exact",
                "rules": graph_rules(rules).model_dump(),
                "fingerprint": fingerprint,
                "vectors": sha256_bytes(indexed.data.cast("B") if indexed.size else b""),
                "recall": _index_recall(bundle, min(recall_k, len(bundle.rows)), seed),
                "recall_k": min(recall_k, len(bundle.rows)),
            },
        }
        write_manifest(folder, manifest)
    return path


def _index_recall(bundle: Bundle, k: int, seed: int) -> float:
    if not isinstance(bundle.index, HnswIndex) or k == 0:
        return 1.0
    return recall_against_exact(bundle.index, indexed_vectors(bundle), k=k, seed=seed)


def _fingerprint(files: dict[str, str], bundle: Bundle) -> str:
    """Digest of all that decides where a vector lies: towers, text encoder, ids, score.

    Args:
        files: file of the bundle → its digest.
        bundle: whose they are.
    """
    text = sorted((name[5:], digest) for name, digest in files.items() if name[:5] == "text/")
    return sha256_bytes(
        files["towers.safetensors"].encode(),
        repr(text).encode(),
        f"{bundle.model.rules.score} {bundle.model.vector_dimension}".encode(),
        bundle.items.digest.encode(),
        bundle.users.digest.encode(),
    )


def _timeline_arrays(timeline: Timeline) -> dict[str, np.ndarray]:
    arrays = {
        "user_offsets": np.asarray(timeline.user_offsets, np.int64),
        "item": np.asarray(timeline.item, np.int32),
        "time": np.asarray(timeline.time, np.int64),
        "first_seen": np.asarray(timeline.first_seen, np.int64),
        "exists_from": np.asarray(timeline.exists_from, np.int64),
    }
    if timeline.shown is not None:
        arrays["shown_offsets"] = timeline.shown.offsets
        arrays["shown_times"] = timeline.shown.values
    if timeline.event_weight is not None:
        arrays["event_weight"] = np.asarray(timeline.event_weight, np.float32)
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def load(path: str | Path, *, verify: bool = True, begun: Check | None = None) -> Bundle:
    """Read a bundle and check it against itself.

    Args:
        path: its folder.
        verify: compare the digests of all files with the manifest first.
        begun: of `recsys.serving.manifest.begin`, some time ago; else it begins here.

    Raises:
        BundleError: no bundle, a later format, a file that is missing or changed, or parts that do
            not belong together; both values are named.
    """
    path = Path(path)
    if begun is None:
        begun = begin(path, trusted=not verify)
    manifest = begun.manifest
    with begun as checked:
        try:
            bundle = _load_parts(path, manifest, checked)
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            # What is damaged is said before what follows from it.
            checked.wait()
            raise BundleError(
                f"The parts of bundle {path} do not fit each other: {error}. Make it again."
            ) from error
        checked.wait()
    fingerprint = _fingerprint(manifest["files"], bundle)
    with safe_open(path / "vectors.safetensors", "numpy") as stored:
        of_vectors = (stored.metadata() or {}).get("fingerprint", "none")
    said = {
        "its manifest says": manifest["fingerprint"],
        "its vectors were made by": of_vectors,
        "its index by": manifest["index"]["fingerprint"],
    }
    if any(other != fingerprint for other in said.values()):
        others = ", ".join(f"{what} {other[:12]}" for what, other in said.items())
        raise BundleError(
            f"The towers and ids in {path} have the fingerprint {fingerprint[:12]}; {others}. "
            "They were not made together; make the bundle again."
        )
    return bundle


def _load_parts(path: Path, manifest: dict[str, Any], checked: Check) -> Bundle:
    # Large parts are mapped, not read: they cost memory as they are used, and the system may take
    # it back. What was checked when a bundle was written need not be so again: its digests vouch.
    vouched = "vectors" in manifest["index"]

    def vocab(name: str) -> Vocab:
        checked.wait(name)
        return Vocab.load(path / name, checked=vouched)

    def tensors(name: str) -> dict[str, torch.Tensor]:
        checked.wait(name)
        return load_tensors(path / name)

    items, users = vocab("item_ids.parquet"), vocab("user_ids.parquet")
    for name, ids in (("items", items), ("users", users)):
        if len(ids.ids) != manifest[name]:
            raise BundleError(
                f"{path} has {len(ids.ids)} {name}, but its manifest says {manifest[name]}."
            )
    stored = {name: tensor.numpy() for name, tensor in tensors("vectors.safetensors").items()}
    vectors, rows = stored["vectors"], stored["rows"]
    if vectors.shape != (items.size, manifest["dimension"]):
        raise BundleError(
            f"{path} has vectors of shape {vectors.shape}, but its manifest says "
            f"{(items.size, manifest['dimension'])}."
        )
    if not vouched:
        Embeddings(items.ids, vectors[1:], manifest["score"])
    contexts = tuple(
        ContextColumn(
            entry["name"],
            None if entry["values"] is None else Vocab(entry["values"]),
            entry["edges"],
        )
        for entry in manifest["contexts"]
    )
    index = _index(path, manifest, checked, _rows_of(vectors, rows, stored.get("indexed")))
    buffers = tensors("features.safetensors")
    model = _model(
        tensors("towers.safetensors"),
        TowerRules(**manifest["towers"]),
        _table(items.size, "items", manifest["item_categories"], buffers),
        _table(users.size, "users", manifest["user_categories"], buffers),
        _spec(manifest, "item"),
        _spec(manifest, "user"),
        tuple(column.size for column in contexts),
    )
    arrays = {name: tensor.numpy() for name, tensor in tensors("timeline.safetensors").items()}
    shown = (
        Ragged(arrays["shown_offsets"], arrays["shown_times"])
        if "shown_offsets" in arrays
        else None
    )
    timeline = Timeline(
        arrays["user_offsets"], arrays["item"], arrays["time"], arrays["first_seen"],
        arrays["exists_from"], shown, manifest["timed"], arrays.get("event_weight"),
    )  # fmt: skip
    coder = None
    if (path / CODING).is_file():
        checked.wait(CODING)
        coder = ItemCoder.from_json(read_json(path / CODING))
    checked.wait("catalog.parquet")
    catalog = pl.read_parquet(path / "catalog.parquet")
    if catalog["item"].equals(items.ids):
        catalog = catalog.with_columns(items.ids.alias("item"))  # in memory once
    return Bundle(
        model, items, users, catalog, stored["window"], timeline, vectors, rows,
        index, manifest["cutoff"], contexts, manifest,
        path / "text" if (path / "text").is_dir() else None, coder=coder,
    )  # fmt: skip


def _index(path: Path, manifest: dict[str, Any], checked: Check, indexed: np.ndarray) -> Index:
    said = manifest["index"]
    if said["kind"] != "hnsw":
        return ExactIndex(indexed, checked="vectors" in said)
    checked.wait("index.bin", "index.bin.json")
    rules = GraphRules(**said["rules"])
    return HnswIndex.load(path / "index.bin", indexed, rules, digest=said.get("vectors"))


class _Unfilled(TorchFunctionMode):
    """Leaves new weights as the memory was: a million random vectors cost a second."""

    FILLING = frozenset({"normal_", "uniform_", "kaiming_uniform_", "zero_", "fill_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if isinstance(filled, nn.Parameter) and func.__name__ in self.FILLING:
            return filled
        return func(*args, **kwargs)


def _model(weights: dict[str, torch.Tensor], *shape: Any) -> TwoTower:
    """Towers whose weights are the given tensors themselves; no random ones are drawn first."""
    with _Unfilled():
        model = TwoTower(*shape)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _consecutive(rows: np.ndarray) -> bool:
    return bool(len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all())


def _rows_of(vectors: np.ndarray, rows: np.ndarray, stored: np.ndarray | None = None) -> np.ndarray:
    """(n, D) the rows of the vectors: as they lie where that is possible, else a copy."""
    if stored is not None and len(stored) == len(rows):
        return stored
    if _consecutive(rows):
        return np.ascontiguousarray(vectors[rows[0] : rows[-1] + 1])
    return np.ascontiguousarray(vectors[rows])


def indexed_vectors(bundle: Bundle) -> np.ndarray:
    """(n, D) vectors of the indexed items, in the order of the index."""
    return _rows_of(bundle.vectors, bundle.rows)


def _spec(manifest: dict[str, Any], side: str) -> FeatureSpec:
    said = manifest[f"{side}_spec"]
    # JSON sorts its keys; the order of the columns is that of the layers.
    ordered = {name: said["categories"][name] for name in manifest[f"{side}_categories"]}
    return FeatureSpec(**{**said, "categories": ordered})


def _table(
    size: int, side: str, categories: list[str], buffers: dict[str, torch.Tensor]
) -> FeatureTable:
    return FeatureTable(
        size,
        text=buffers.get(f"{side}.text"),
        vector=buffers.get(f"{side}.vector"),
        numbers=buffers.get(f"{side}.numbers"),
        categories={
            name: buffers[f"{side}.category_{position}"] for position, name in enumerate(categories)
        },
    )


def with_index(bundle: Bundle, rules: IndexRules) -> Bundle:
    """The bundle with an index built over the rows that exist and are available."""
    return replace(bundle, index=build_index(indexed_vectors(bundle), rules))
