"""The `recsys` command: one verb, one library call.

Results go to stdout (tables for people, `--json` for programs), progress to stderr. Exit codes: 0
done, 2 the user's mistake, 1 ours, 130 stopped. Imports stand inside the verbs, so that `--help`
answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys.errors import QueryError
from recsys.experiments.handing import export, golden, promote, prune, publish, rollback
from recsys.experiments.serve import serve
from recsys.experiments.terminal import BundlePath, Json, Verbs, aside, print_json, progress

app = typer.Typer(
    cls=Verbs,
    name="recsys",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich costs a tenth of a second before the first word
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run's configuration.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Another value for a key; TOML."),
]
K = Annotated[int, typer.Option("-k", "--k", min=1, help="How many answers.")]
Exact = Annotated[bool, typer.Option("--exact", help="Search every item, not the index.")]


def _version(wanted: bool) -> None:
    if wanted:
        from recsys import __version__

        print(f"recsys {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", help="Tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")
    ] = False,
) -> None:
    """Two-tower recommendation: train on interaction logs, answer with nearest items.

    \b
    From raw logs to recommendations:
      recsys init events.csv items.csv --out run.toml
      recsys train run.toml
      recsys recommend runs/shop/bundle --user u17

    \b
    Nothing at hand? A simulated shop, in three minutes:
      recsys demo
    """


@app.command()
def init(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="File or folder of the log.")],
    items: Annotated[Path | None, typer.Argument(metavar="ITEMS", help="The item table.")] = None,
    out: Annotated[Path, typer.Option(help="Where to; - is stdout.")] = Path("run.toml"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file.")] = False,
) -> None:
    """Look at a log and write a commented run.toml.

    It holds the best guess of every column, and every other key with the value that is used.
    What was guessed is printed; where something needed is missing, the exit code is 2.

    \b
    Example:
      recsys init events.csv items.csv --out run.toml
    """
    from recsys.errors import ConfigError
    from recsys.experiments.wizard import guess
    from recsys.files import atomic_write

    if str(out) != "-" and out.exists() and not force:
        raise ConfigError(f"{out} is there already. Name another --out, or give --force.")
    printed = str(out) == "-"
    with aside():
        draft = guess(log, items, "." if printed else out.parent)
    if printed:
        print(draft.text(), end="")
    else:
        with atomic_write(out) as temporary:
            temporary.write_text(draft.text(), encoding="utf-8")
        from recsys.experiments import show

        show.guesses(draft.guessed)
    if draft.missing:
        raise ConfigError(
            f"{out} is written, but something needed is missing. Write the column's name there:\n"
            + "\n".join(f"  {line}" for line in draft.missing)
        )
    if not printed:
        print(f"\nWritten to {out}. Mend what was guessed wrong, then: {_command('train', out)}")


@app.command()
def keys(
    section: Annotated[
        str | None, typer.Argument(metavar="SECTION", help="Such as training or towers.history.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As docs/CONFIG.md.")] = False,
    json: Json = False,
) -> None:
    """Every key of a run file: meaning, default and range.

    \b
    Example:
      recsys keys training
    """
    from dataclasses import asdict

    from recsys.experiments import keys as keys_

    listed = keys_.sections() if section is None else keys_.section(section)
    if json:
        print_json([asdict(one) for one in listed])
    elif markdown:
        print(keys_.page() if section is None else keys_.markdown(listed), end="")
    else:
        print(keys_.text(listed), end="")


@app.command()
def prepare(run: Run, set_: Sets = None, json: Json = False) -> None:
    """Read, split, label and code a log, once.

    Unchanged input is left as it is.

    \b
    Example:
      recsys prepare run.toml --set data.log=events/*.parquet
    """
    from recsys.experiments.config import load
    from recsys.experiments.run import prepare as prepare_

    with aside():
        dataset = prepare_(load(run, set_ or ()))
    counts = {"path": str(dataset.path), **dataset.manifest.get("counts", {})}
    if json:
        print_json(counts)
    else:
        from recsys.experiments import show

        show.facts(counts)


@app.command()
def train(
    run: Run,
    set_: Sets = None,
    json: Json = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Go on with a run that was stopped.")
    ] = None,
) -> None:
    """Prepare, train, bundle, judge and record a run.

    With --json: one object with run_id, bundle and scorecard.

    \b
    Example:
      recsys train run.toml --set training.epochs=5 --json
    """
    from recsys.experiments.config import load
    from recsys.experiments.run import train as train_

    with aside():
        result = train_(load(run, set_ or ()), resume=resume)
    if json:
        print_json(
            {
                "run_id": result.run_id,
                "bundle": str(result.bundle),
                "scorecard": result.scorecard,
            }
        )
    else:
        from recsys.experiments import show

        show.scorecard(result.scorecard)
        show.facts({"run": result.run_id, "bundle": str(result.bundle)})


@app.command()
def evaluate(
    bundle: BundlePath,
    on: Annotated[
        str | None, typer.Option(metavar="LOG", help="A later log of the same form.")
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="BUNDLE", help="Other bundles of the same data, paired."),
    ] = None,
    json: Json = False,
) -> None:
    """The scorecard of a bundle.

    On its own test side, or on a later log.

    \b
    Example:
      recsys evaluate runs/shop/bundle --on next_week.csv --json
    """
    from recsys.experiments.evaluation.evaluate import evaluate

    with aside():
        scorecard = evaluate(bundle, on=on, against=against or ())
    if json:
        print_json(scorecard)
    else:
        from recsys.experiments import show

        show.scorecard(scorecard)


@app.command()
def candidates(
    bundle: BundlePath,
    out: Annotated[Path, typer.Option(help="Parquet: user, item, rank, score.")],
    k: K = 100,
    users: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only these: a column user.")
    ] = None,
    histories: Annotated[
        Path | None, typer.Option(metavar="FILE", help="user and history; new users too.")
    ] = None,
    exact: Exact = False,
    keep_seen: Annotated[bool, typer.Option("--keep-seen", help="Seen items may return.")] = False,
) -> None:
    """The best items for every user, in a file.

    Takes up where a stopped call ended.

    \b
    Example:
      recsys candidates runs/shop/bundle --k 100 --out candidates.parquet
    """
    from recsys.serving.candidates import write_candidates
    from recsys.serving.recommender import Recommender

    with aside(), progress("users") as tell:
        written = write_candidates(
            Recommender.load(bundle),
            out,
            k=k,
            users=users,
            histories=histories,
            exact=exact,
            drop_seen=not keep_seen,
            progress=tell,
        )
    notes = {"unknown": written.unknown, "done before": written.resumed}
    more = "".join(f", {count:,} {what}" for what, count in notes.items() if count)
    print(f"{written.path}: {written.users:,} users{more}")


@app.command()
def similar(
    bundle: BundlePath,
    item: Annotated[str | None, typer.Option(metavar="ID", help="Similar to this item.")] = None,
    text: Annotated[str | None, typer.Option(help="Similar to any text.")] = None,
    k: K = 10,
    exact: Exact = False,
    json: Json = False,
) -> None:
    """The items nearest to an item or to a text.

    \b
    Example:
      recsys similar runs/shop/bundle --item i00042 -k 10
      recsys similar runs/shop/bundle --text "a brass desk lamp" --json
    """
    _one(item, text, "--item ID or --text TEXT")
    from recsys.serving.recommender import Recommender

    with aside():
        answers = Recommender.load(bundle).similar(item=item, text=text, k=k, exact=exact)
    _answers(answers, json)


@app.command()
def recommend(
    bundle: BundlePath,
    user: Annotated[str | None, typer.Option(metavar="ID", help="For this user.")] = None,
    history: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="For anybody who had these: once an item, oldest first."),
    ] = None,
    k: K = 10,
    exact: Exact = False,
    json: Json = False,
) -> None:
    """Items for one user, or for a given history.

    \b
    Example:
      recsys recommend runs/shop/bundle --user u00017 -k 10
      recsys recommend runs/shop/bundle --history i00042 --history i00007 --json
    """
    _one(user, history or None, "--user ID or --history ID")
    from recsys.serving.recommender import Recommender

    past = history or None
    with aside():
        answers = Recommender.load(bundle).recommend(user=user, history=past, k=k, exact=exact)
    _answers(answers, json)


@app.command()
def score(
    bundle: BundlePath,
    pairs: Annotated[
        Path, typer.Option(metavar="FILE", help="user or history, item or shown; perhaps time.")
    ],
    out: Annotated[Path, typer.Option(help="Parquet or CSV: the columns of FILE and score.")],
    log: Annotated[
        str | None, typer.Option(metavar="LOG", help="Later events that may be known.")
    ] = None,
) -> None:
    """Scores of given pairs or impression lists.

    As of their time, where they have one; for re-ranking, or for metrics of your own.

    \b
    Example:
      recsys score runs/shop/bundle --pairs impressions.parquet --out scores.parquet
    """
    from recsys.serving.recommender import Recommender
    from recsys.serving.score import write_scores

    with aside():
        recommender = Recommender.load(bundle)
        later = None
        if log is not None:
            from recsys.experiments.evaluation.evaluate import later_log

            later = later_log(recommender, log)
        scored = write_scores(recommender, pairs, out, log=later)
    notes = {"unknown users": scored.unknown_users, "unknown items": scored.unknown_items}
    more = "".join(f", {count:,} {what}" for what, count in notes.items() if count)
    print(f"{scored.path}: {scored.pairs:,} pairs{more}")


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a bundle's.")],
    json: Json = False,
) -> None:
    """What is wrong with a run, and what helps.

    Collapse, temperature, popularity, overfit, content that is not read.

    \b
    Example:
      recsys doctor runs/shop
    """
    from recsys.experiments.doctor import examine

    with aside():
        report = examine(run)
    if json:
        print_json(report)
    else:
        from recsys.experiments.doctor import tell

        tell(report)


@app.command()
def simulate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Written here.")],
    users: Annotated[int, typer.Option(min=1)] = 2000,
    items: Annotated[int, typer.Option(min=1)] = 1500,
    days: Annotated[int, typer.Option(min=1)] = 30,
    requests_per_user: Annotated[float, typer.Option(help="Pages a user sees, on average.")] = 40.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a simulated shop with known tastes.

    Its log and its items; nothing in it is real.

    \b
    Example:
      recsys simulate shop --users 2000 --items 1500 --seed 0
    """
    from recsys.experiments.shop.simulate import simulate as simulate_

    with aside():
        world = simulate_(
            users=users, items=items, days=days, requests_per_user=requests_per_user, seed=seed
        )
        world.write(folder)
    files = (folder / "impressions.parquet", folder / "items.parquet")
    print(f"{folder}\nA simulated shop. Next: {_command('init', *files, '--out', 'run.toml')}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Data and runs go here.")] = Path(
        "runs/demo"
    ),
) -> None:
    """The whole way on a simulated shop, in three minutes.

    Log, towers, scorecard, recommendations, similar items.

    \b
    Example:
      recsys demo
    """
    from recsys.experiments.shop.demo import demo as demo_

    demo_(folder)


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder.")],
    uri: Annotated[str, typer.Option(help="Another store than the run was meant for.")] = "",
) -> None:
    """Send a run to a tracking store that missed it.

    \b
    Example:
      recsys replay runs/shop
    """
    from recsys.experiments.tracking.track import replay as replay_

    print(replay_(folder, uri))


for verb in (serve, publish, rollback, prune, golden, promote, export):
    app.command()(verb)


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with its code."""
    # Before torch is loaded: threads that wait by spinning make a step on crowded cores many times
    # slower, and hardly quicker on free ones.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(arguments, prog_name="recsys")


# --- what the verbs share -------------------------------------------------------------------------


def _command(*words: Any) -> str:
    """A command that can be pasted into a shell."""
    return shlex.join(["recsys", *map(str, words)])


def _one(first: Any, second: Any, names: str) -> None:
    """Told before a bundle is opened."""
    if (first is None) == (second is None):
        raise QueryError(f"Give either {names}.")


COUNTS = "; its scores are numbers of events, which do not compare with a model's"


def _answers(answers: Any, json: bool) -> None:
    counts = answers.fallback is not None and "most popular items answer" in answers.fallback
    note = f"{answers.fallback}{COUNTS if counts else ''}" if answers.fallback else None
    if note:
        print(note, file=sys.stderr)
    if json:
        score = "events" if counts else "model"
        print_json({"fallback": note, "score_is": score, "items": answers.to_list()})
    else:
        from recsys.experiments import show

        show.answers(answers.to_list())
