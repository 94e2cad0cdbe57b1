"""report.json is read strictly, and says on what it was measured."""

import json
from importlib import metadata

import pytest

from martlet.core import report
from martlet.core.errors import ArtifactError


def test_reads_what_was_written(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"martlet_report": report.VERSION, "created": "2026-01-01"}))
    assert report.read(path)["created"] == "2026-01-01"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a report: it is not JSON"),
        ("[]", "is a report of version None; this Martlet reads version 1"),
        ('{"martlet_report": 2}', "is a report of version 2; this Martlet reads version 1"),
    ],
)
def test_another_file_is_refused(tmp_path, text, message):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ArtifactError) as error:
        report.read(path)
    assert str(error.value) == f"{path} {message}"


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"can't read the report .*report\.json: No such file or directory"):
        report.read(tmp_path / "report.json")


def test_environment_names_processor_cores_memory_and_versions():
    environment = report.environment(("torch", "no-such-package"))
    assert environment["cpu"]
    assert environment["cores"] >= 1
    assert environment["memory_bytes"] > 2**28
    assert environment["versions"]["torch"] == metadata.version("torch")
    assert set(environment["versions"]) == {"martlet", "python", "torch"}
