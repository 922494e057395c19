"""Write the OpenAPI of the service: `python -m recsys.serving.api.openapi > docs/openapi.json`."""

from __future__ import annotations

import sys
from typing import Any

from recsys.files import canonical_json


def openapi() -> dict[str, Any]:
    """The contract, from the routes themselves; no model is loaded for it."""
    from fastapi import FastAPI

    from recsys.serving.api.app import make_app

    app = make_app(None)
    assert isinstance(app.rest, FastAPI)
    return app.rest.openapi()


def text() -> str:
    """As it is checked in."""
    return canonical_json(openapi()) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
