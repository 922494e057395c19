"""What a bundle says of itself in manifest.json, and whether it is so."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from recsys.errors import BundleError, DataError
from recsys.files import canonical_json, read_json, sha256_bytes, sha256_file, write_json

FORMAT = "recsys-bundle"
FORMAT_VERSION = 1
LIBRARIES = ("torch", "sentence-transformers", "tokenizers", "hnswlib", "polars", "numpy")
MANIFEST = "manifest.json"


def write_manifest(folder: Path, said: dict[str, Any]) -> None:
    """Write what is said, with the digests of all files that stand in the folder and its own."""
    files = digests(folder)
    manifest = {
        **said,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "files": files,
        "content": sha256_bytes(*(f"{name}={files[name]}".encode() for name in sorted(files))),
    }
    # As it will be read back: tuples are lists then.
    manifest = json.loads(canonical_json(manifest))
    write_json(folder / MANIFEST, {**manifest, "self": _own_digest(manifest)})


def read_manifest(path: str | Path) -> dict[str, Any]:
    """What a bundle says of itself, without loading or checking the rest.

    Raises:
        BundleError: there is no manifest, or not one of a bundle of this version.
    """
    path = Path(path)
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"{path} is no bundle: it has no {MANIFEST}. Train one: recsys train.")
    try:
        manifest = read_json(file)
    except DataError as error:
        raise BundleError(f"{error} The bundle is damaged; make it again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise BundleError(
            f"{file} has the format {found!r}, not {FORMAT!r}. Name a bundle's folder, as "
            "`recsys train` prints it."
        )
    if manifest.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {manifest.get('format_version')}; this recsys reads "
            f"{FORMAT_VERSION}. Train again, or install the recsys that wrote it."
        )
    return manifest


def check(path: Path, manifest: dict[str, Any]) -> None:
    """Compare every digest of the manifest, its own included, with what stands in the folder.

    Raises:
        BundleError: a file is missing or changed; both digests are named.
    """
    own = _own_digest(manifest)
    if manifest.get("self") != own:
        raise BundleError(
            f"{path / MANIFEST} has the SHA-256 {own[:12]}…, but says "
            f"{str(manifest.get('self'))[:12]}… of itself. It was changed; copy the bundle again."
        )
    for name, digest in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise BundleError(f"The bundle {path} lacks {name}. Copy it again as a whole.")
        found = sha256_file(file)
        if found != digest:
            raise BundleError(
                f"{file} has the SHA-256 {found[:12]}…, but the manifest says {digest[:12]}…. "
                "The file was damaged or replaced; copy or make the bundle again."
            )


def may_replace(path: Path) -> bool:
    """Whether an earlier bundle, whole or damaged, or nothing stands there."""
    if not path.is_dir():
        return False
    manifest = path / MANIFEST
    if manifest.is_file():
        return f'"{FORMAT}"' in manifest.read_text("utf-8", "replace")
    return not any(path.iterdir())


def _own_digest(manifest: dict[str, Any]) -> str:
    """Digest of all that the manifest says but this digest."""
    said = {name: value for name, value in manifest.items() if name != "self"}
    return sha256_bytes(canonical_json(said).encode())


def digests(folder: Path) -> dict[str, str]:
    """File → SHA-256 of everything below the folder but its manifest."""
    return {
        file.relative_to(folder).as_posix(): sha256_file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / MANIFEST
    }
