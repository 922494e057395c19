"""Commands that publish, promote and export a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recsys.errors import QueryError
from recsys.experiments.terminal import BundlePath, Json, aside, print_json, progress


def export(
    bundle: BundlePath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder; written here.")],
    format: Annotated[str, typer.Option(help="parquet, faiss or qdrant.")] = "parquet",
    users: Annotated[bool, typer.Option("--users", help="User vectors too.")] = False,
    hnsw: Annotated[bool, typer.Option("--hnsw", help="faiss: a graph, not exact.")] = False,
    json: Json = False,
) -> None:
    """The vectors, for a vector database.

    Ids and catalogue fields beside them; OUT/export.json says how to search.

    \b
    Example:
      recsys export runs/shop/bundle vectors --format qdrant --users
    """
    from dataclasses import asdict

    from recsys.serving.export import export as export_
    from recsys.serving.recommender import Recommender

    with aside(), progress("rows") as tell:
        recommender = Recommender.load(bundle)
        done = export_(recommender, out, format, users=users, graph=hnsw, progress=tell)
    if json:
        print_json(asdict(done))
        return
    unknown = f" ({done.left_out:,} without a history left out)" if done.left_out else ""
    counts = f", {done.users:,} users{unknown}" if users else ""
    print(f"{done.path}: {done.items:,} items{counts}")


def publish(
    bundle: BundlePath,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What a service watches.")],
    keep: Annotated[int, typer.Option(min=2, help="Published bundles that stay.")] = 3,
    copy: Annotated[bool, typer.Option("--copy", help="Copies, not hard links.")] = False,
    json: Json = False,
) -> None:
    """Hand a bundle to the services that watch a folder.

    Its files are checked first; then FOLDER/CURRENT names it. Never half of one.

    \b
    Example:
      recsys publish runs/shop/bundle models/shop
    """
    from recsys.serving.models.publish import publish as publish_

    with aside():
        path = publish_(bundle, folder, keep=keep, link=not copy)
    print_json({"version": path.name, "path": str(path)}) if json else print(path)


def rollback(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What a service watches.")],
    json: Json = False,
) -> None:
    """Serve the bundle before the current one again.

    \b
    Example:
      recsys rollback models/shop
    """
    from recsys.serving.models.publish import rollback as rollback_

    with aside():
        path = rollback_(folder)
    print_json({"version": path.name, "path": str(path)}) if json else print(path)


def prune(
    journal: Annotated[Path, typer.Argument(metavar="JOURNAL", help="A stopped service's.")],
    sources: Annotated[
        list[Path], typer.Argument(metavar="SOURCE...", help="Bundles, or folders with CURRENT.")
    ],
    json: Json = False,
) -> None:
    """Have a journal forget what the bundles hold by now.

    That is items that all of them describe alike, deletions of items that none has, and events that
    stand in the histories of all; what no service reads any more, too: a user's events before the
    newest thousand, where they are older than the bundles. Of a folder with CURRENT all published
    bundles count, for a service may be rolled back to them. Name every model that may still answer.

    \b
    Example:
      recsys prune live models/shop
    """
    from recsys.errors import ConfigError
    from recsys.serving.engine.loaded_model import LoadedModel
    from recsys.serving.live.journal import FILE
    from recsys.serving.live.updates import LiveUpdates
    from recsys.serving.models.publish import versions
    from recsys.serving.models.sources import CURRENT, FolderSource

    if not (journal / FILE).is_file():
        raise ConfigError(f"{journal} is no journal. Name the folder of recsys serve --journal.")
    folders: list[Path] = []
    for source in sources:
        folders.append(FolderSource(source).latest()[1])
        if (source / CURRENT).exists():
            folders += [version.path for version in versions(source)]
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    with aside(), LiveUpdates(journal) as updates:
        for folder in folders:
            updates.attach(LoadedModel.load(folder))
        forgotten = updates.prune()
    if json:
        print_json({**forgotten, "bundles": [str(folder) for folder in folders]})
        return
    held = f"{len(folders)} bundles hold" if len(folders) > 1 else "the bundle holds"
    print(
        f"{journal}: {forgotten['items']:,} items and {forgotten['events']:,} events forgotten "
        f"that {held}"
    )


def golden(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A bundle, or a folder with CURRENT.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to; else beside it, or CURRENT.")
    ] = None,
    questions: Annotated[int, typer.Option(min=1, max=10_000, help="How many.")] = 20,
    k: Annotated[int, typer.Option("-k", "--k", min=1, max=1000, help="Answers of each.")] = 10,
    min_overlap: Annotated[
        float, typer.Option(min=0, max=1, help="Share of them that a later model must give.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write over a file.")] = False,
    json: Json = False,
) -> None:
    """Keep a good model's answers as a test of later ones.

    Half ask for items like one, half for a user's. A service finds golden.json in a bundle, beside
    it and beside CURRENT, and refuses models that answer otherwise; add "must_include": [ITEM, …]
    to a question by hand.

    \b
    Example:
      recsys golden runs/shop/bundle --out models/shop/golden.json
    """
    from recsys.errors import ConfigError
    from recsys.serving.engine.loaded_model import LoadedModel
    from recsys.serving.models.gate import GOLDEN, write_golden
    from recsys.serving.models.sources import CURRENT, FolderSource

    if out is None:
        out = (bundle if (bundle / CURRENT).exists() else bundle.resolve().parent) / GOLDEN
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already. Name another --out, or give --force.")
    with aside():
        model = LoadedModel.load(FolderSource(bundle).latest()[1])
        count = write_golden(
            model, out, questions=questions, k=k, min_overlap=min_overlap, seed=seed
        )
    written = {"path": str(out), "questions": count, "model": model.version}
    print_json(written) if json else print(f"{out}: {count} questions, answered by {model.version}")


def promote(
    model: Annotated[str, typer.Argument(metavar="NAME/VERSION", help="Of a registered model.")],
    alias: Annotated[str, typer.Option(help="The name that services watch.")] = "champion",
    tracking: Annotated[str, typer.Option(help="The store; empty: as in training.")] = "",
) -> None:
    """Let an alias of a registered model name a version.

    Services that watch models:/NAME@ALIAS swap to it.

    \b
    Example:
      recsys promote shop/3
    """
    from recsys.experiments.tracking.registry import promote as promote_

    name, _, version = model.rpartition("/")
    if not name or not version:
        raise QueryError(f"{model!r} is no NAME/VERSION; write for example shop/3.")
    with aside():
        promote_(name, version, alias, tracking=tracking)
    print(f"models:/{name}@{alias} is version {version}")
