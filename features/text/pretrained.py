"""Pretrained sentence-transformers models, from a folder or by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from recsys.errors import ConfigError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""Endings of files that could run code when they are read: never opened."""


def pretrained(name: str, device: str | None) -> SentenceTransformer:
    """A model of the user's, from a folder, the local cache of the hub, or the hub.

    Raises:
        ConfigError: it cannot be had; says what to do without a network.
    """
    folder = Path(name).expanduser()
    offline = _flag("HF_HUB_OFFLINE") or _flag("TRANSFORMERS_OFFLINE")
    is_folder = folder.is_dir()
    way_out = (
        "Without a network: copy the model to a folder and set text.model to that folder, "
        "or leave [text] out to train a static encoder on the catalogue."
    )
    if not is_folder and (folder.is_absolute() or name.startswith((".", "~"))):
        raise ConfigError(f"text.model names the folder {name!r}, which is not there. {way_out}")
    reason: Exception | None = None
    # What is on this machine first: a run that worked once works again without a network.
    for local in [True] if is_folder or offline else [True, False]:
        try:
            return open_model(str(folder) if is_folder else name, device, local)
        except Exception as error:  # each library under it has its own words for "not there"
            reason = error
    where = "read" if is_folder else "found on this machine" if offline else "found or downloaded"
    cause = str(reason).strip().split("\n")[0].rstrip(".")
    raise ConfigError(f"The text model {name!r} cannot be {where}: {cause}. {way_out}") from reason


def open_model(name: str, device: str | None, local: bool) -> SentenceTransformer:
    """Read a model without running code of its own.

    Args:
        name: a folder, or a name on the hub.
        device: None: the fastest that is there.
        local: whether to leave the network alone.
    """
    from sentence_transformers import SentenceTransformer

    if Path(name).is_dir():
        files = [file for file in Path(name).rglob("*") if file.is_file()]
        pickles = sorted(file for file in files if file.suffix in PICKLES)
        if pickles and not any(file.suffix == ".safetensors" for file in files):
            raise ValueError(f"{pickles[0].name} may be a pickle; only safetensors are read")
    with quiet():
        return SentenceTransformer(
            name,
            device=device,
            local_files_only=local,
            model_kwargs={"use_safetensors": True},
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars off the screen."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _flag(name: str) -> bool:
    return os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
