"""The public names: `import recsys` is quick, and each name leads where it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

import recsys


@pytest.mark.parametrize("name", recsys.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(recsys, name).__name__ == name


def test_the_listed_names_are_the_public_ones() -> None:
    assert [name for name in dir(recsys) if not name.startswith("_")] == sorted(recsys.__all__)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known() -> None:
    with pytest.raises(AttributeError, match=r"no 'recommender'.*Recommender"):
        _ = recsys.recommender  # type: ignore[attr-defined]


def test_import_does_not_wait_for_torch() -> None:
    code = "import sys, recsys; print('torch' in sys.modules or 'polars' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
