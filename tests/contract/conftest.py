"""Which questions wait for `make test-all`: those that methods on one order of work all answer through it."""

import pytest

from martlet.core import registry
from martlet.graph.low_bit import LowBit

ASKED_EVERYTHING = ("uniform", "repq_vit")
"""Methods for few bits that answer for the others."""
ONE_MODEL = "registers and qk-norm"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        values = getattr(item, "callspec", None)
        if values is None or "test_techniques" not in item.nodeid:
            continue
        name = values.params.get("recipe", values.params.get("name"))
        if name is None or name in ASKED_EVERYTHING or not issubclass(registry.technique(name), LowBit):
            continue
        if "model_of_convolutions" in item.name or values.params.get("model", ONE_MODEL) != ONE_MODEL:
            item.add_marker(pytest.mark.slow)
