"""What the commands share: exit codes, quiet stdout, progress, JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from recsys.errors import RecsysError

DONE, OURS, YOURS, STOPPED = 0, 1, 2, 130

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]


class Verbs(TyperGroup):
    """Turns what a verb raises into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except RecsysError as error:
            _say_error(ctx, str(error))
            raise typer.Exit(YOURS) from error
        except BrokenPipeError:
            # Whoever read our output has enough (`| head`); nothing more can be said there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(DONE) from None
        except KeyboardInterrupt as error:
            print("Stopped.", file=sys.stderr)
            raise typer.Exit(STOPPED) from error
        except SystemExit as error:
            # What Lightning makes of Ctrl-C.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise typer.Exit(STOPPED) from error
            raise
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            # Usage errors have an exit code and a message of their own.
            if hasattr(error, "exit_code"):
                raise
            _say_error(
                ctx,
                f"This is a mistake in recsys, not yours: {type(error).__name__}: {error}\n"
                "`recsys --verbose …` shows where it happened; a report of it is welcome.",
            )
            raise typer.Exit(OURS) from error


def _say_error(ctx: Any, message: str) -> None:
    if ctx.params.get("verbose"):
        import traceback

        traceback.print_exc()
    print(message, file=sys.stderr)


@contextmanager
def aside() -> Iterator[None]:
    """What libraries print on stdout goes to stderr: stdout has the result and nothing else."""
    with redirect_stdout(sys.stderr):
        yield


@contextmanager
def progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for people who watch; silent for those who do not."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(value: Any) -> None:
    import json

    from recsys.experiments.tracking.spool import finite

    print(json.dumps(finite(value), indent=2, ensure_ascii=False, default=str))
