"""The contract: the checked-in file is current, and the service keeps what it says."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from service_cases import FakeHost, FakeUpdates, ask

from recsys.experiments.serve import MAIN, Plan, service
from recsys.files import canonical_json
from recsys.serving.api.app import make_app
from recsys.serving.api.auth import Keys
from recsys.serving.api.contract import OPERATIONS, openapi
from recsys.serving.api.handlers import PARAMETERS
from recsys.serving.api.schemas import STATUS, Code, Options

FILE = Path(__file__).parents[1] / "docs" / "openapi.json"
DESCRIBED = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"paths": {}}


def test_the_file_is_current() -> None:
    assert FILE.read_text(encoding="utf-8") == canonical_json(openapi()) + "\n", (
        "Write it again: python -m recsys.serving.api.app > docs/openapi.json"
    )


def test_the_service_gives_out_the_same() -> None:
    got = ask(make_app(FakeHost()), "GET", "/openapi.json")
    assert got.json() == DESCRIBED


def test_every_code_is_documented_with_its_status() -> None:
    assert set(STATUS) == set(Code)
    assert DESCRIBED["components"]["schemas"]["Code"]["enum"] == [code.value for code in Code]
    said = {
        (int(status), code)
        for path in DESCRIBED["paths"].values()
        for operation in path.values()
        for status, response in operation["responses"].items()
        if status != "200"
        for code in response["description"].split(" or ")
    }
    assert said == {(status, code.value) for code, status in STATUS.items()}


def test_every_operation_declares_its_errors_in_the_one_form() -> None:
    operations = [one for path in DESCRIBED["paths"].values() for one in path.values()]
    assert len(operations) == len(OPERATIONS) == 16
    for operation in operations:
        for status, response in operation["responses"].items():
            if status != "200":
                (kind,) = response["content"].values()
                assert kind["schema"] == {"$ref": "#/components/schemas/ErrorBody"}
        assert {"400", "401", "500", "503"} <= set(operation["responses"])
        public = operation["operationId"] in ("live", "ready", "metrics")
        assert ("429" in operation["responses"]) != public


def test_a_query_string_may_say_all_that_a_body_may_but_the_filter() -> None:
    assert set(PARAMETERS) == set(Options.model_fields) - {"filter"}
    for path in ("/v1/items/{id}/similar", "/v1/users/{id}/recommendations"):
        names = [one["name"] for one in DESCRIBED["paths"][path]["get"]["parameters"]]
        expected = {"id", "equals", *PARAMETERS} - ({"user"} if "users" in path else set())
        assert set(names) == expected


# --- schemathesis ---------------------------------------------------------------------------------


def without_columns(described: dict[str, Any]) -> dict[str, Any]:
    """The contract without columns as parameters: a number there is its text, and nothing wrong."""
    described = copy.deepcopy(described)
    for path in described["paths"].values():
        for operation in path.values():
            given = operation.get("parameters", [])
            operation["parameters"] = [one for one in given if one["name"] != "equals"]
    return described


Seen = Counter[tuple[str, int]]


def keeps_its_word(examples: int, app: Any = None, positive: dict[str, Any] = DESCRIBED) -> Seen:
    """Ask every operation what fits its schema and what does not.

    Args:
        examples: of each operation, each way.
        app: the service; None: over engines that are none.
        positive: the contract from which questions are drawn that fit it.

    Returns:
        How often each operation gave each status.
    """
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from schemathesis.checks import CHECKS, load_all_checks
    from schemathesis.generation import GenerationMode

    load_all_checks()
    # What a schema cannot say is refused too: columns that the catalogue lacks, totals over lists.
    checks = [one for one in CHECKS.get_all() if one.__name__ != "positive_data_acceptance"]
    assert len(checks) > 8
    rejected = [400, 401, 403, 404, 405, 410, 413, 414, 415, 431]
    config = schemathesis.Config.from_dict(
        {"checks": {"negative_data_rejection": {"expected-statuses": rejected}}}
    )
    app = app or make_app(FakeHost(), FakeUpdates(), keys=Keys(open_writes=True))
    seen = Seen()
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        described = positive if mode == GenerationMode.POSITIVE else without_columns(DESCRIBED)
        schema = schemathesis.openapi.from_dict(described, config=config)
        schema.app = app
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) == len(OPERATIONS)
        operations.sort(key=lambda one: bool(one.method.upper() == "DELETE"))  # or nothing is left
        for operation in operations:
            if mode == GenerationMode.NEGATIVE and not (
                operation.body or operation.query or operation.path_parameters
            ):
                continue  # there is nothing to be wrong
            name = operation.definition.raw["operationId"]

            @settings(
                max_examples=examples, deadline=None, derandomize=True, database=None,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(mode))
            def one(case: Any) -> None:
                response = case.call_and_validate(checks=checks)
                seen[name, response.status_code] += 1  # noqa: B023, it is called at once

            one()
    return seen


def test_the_service_keeps_its_word() -> None:
    seen = keeps_its_word(4)
    assert {200, 400} <= {status for _, status in seen}


@pytest.mark.slow
def test_the_service_keeps_its_word_at_length() -> None:
    keeps_its_word(150)


def of_this_shop(
    items: list[str], columns: list[str], contexts: list[str], dimension: int
) -> dict[str, Any]:
    """The contract narrowed to what a model knows: random ids would never reach its towers.

    Cursors are left out, since none of the random ones is one.
    """

    def narrowed(schema: Any, name: str = "") -> Any:
        if isinstance(schema, list):
            return [narrowed(one) for one in schema]
        if not isinstance(schema, dict):
            return schema
        known = {"i00042": items, "category": contexts if name == "context" else columns}
        for example in schema.get("examples", ()):
            if isinstance(example, str):
                return {"type": "string", "enum": known[example]}
        if name == "cursor":
            return {"type": "null"}
        inner = {key: narrowed(one, name if key == "propertyNames" else key)
                 for key, one in schema.items()}  # fmt: skip
        if name == "vector":
            inner |= {"minItems": dimension, "maxItems": dimension}
        return inner

    described: dict[str, Any] = narrowed(without_columns(DESCRIBED))
    for path in described["paths"].values():
        for operation in path.values():
            given = operation.get("parameters", [])
            operation["parameters"] = [one for one in given if one["name"] != "cursor"]
            for one in given:
                if one["in"] == "path":
                    one["schema"] = {"type": "string", "enum": items}
    return described


@pytest.mark.slow
def test_a_real_model_keeps_the_word_of_the_service(tiny: Any, tmp_path: Path) -> None:
    # Listening for others, so that any name in a Host header will do.
    plan = Plan(
        {MAIN: str(tiny.bundle)}, Keys(open_writes=True), host="0.0.0.0", insecure=True,
        journal=tmp_path / "journal", impressions=tmp_path / "shown", deadline=60,
    )  # fmt: skip
    with service(plan) as app:
        engine = app.handlers.models.choose(None)[1]
        facts, bundle = engine.facts(), engine.model.bundle
        known = bundle.items.ids.to_list()[:20] + bundle.users.ids.to_list()[:10]
        described = of_this_shop(
            [*known, "nobody", "new/1"], list(facts["fields"]), facts["context"],
            facts["dimension"],
        )  # fmt: skip
        seen = keeps_its_word(60, app, described)
        assert all(status < 500 for _, status in seen), seen
        # It was the model that answered, not the schema that refused.
        for one in OPERATIONS:
            asks_something = one.body is not None or "{id}" in one.path
            assert seen[one.name, 200] >= (5 if asks_something else 1), (one.name, seen)
        assert engine.facts()["hidden_items"] and engine.facts()["users_with_events"]
