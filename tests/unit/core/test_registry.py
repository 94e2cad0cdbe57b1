"""Techniques are listed from their source text."""

import subprocess
import sys
from pathlib import Path

import pytest

from martlet.core import registry
from martlet.core.errors import RecipeError

TECHNIQUE = """
from typing import ClassVar


class {class_name}(Technique):
    name: ClassVar[str] = "{name}"
    summary: ClassVar[str] = "{summary}"
    breaks: ClassVar[frozenset] = frozenset(made_elsewhere)
"""


@pytest.fixture
def techniques(tmp_path, monkeypatch):
    """An empty folder of techniques in the place of the package's."""
    monkeypatch.setattr(registry, "TECHNIQUES", tmp_path)
    registry.entries.cache_clear()
    yield tmp_path
    registry.entries.cache_clear()


def write(folder: Path, family: str, file: str, name: str, class_name: str = "X", summary: str = "does x") -> None:
    (folder / family).mkdir(exist_ok=True)
    text = TECHNIQUE.format(name=name, class_name=class_name, summary=summary)
    (folder / family / f"{file}.py").write_text(text)


def test_shipped_techniques_by_name():
    entries = registry.entries()
    assert {"fuse", "bf16", "int8"} <= entries.keys()
    assert entries["int8"].family == "quantize"
    assert entries["int8"].module == "martlet.techniques.quantize.int8"


def test_listing_imports_nothing_heavy_and_no_technique():
    code = """
import sys
from martlet.core import registry
from martlet.core.recipe import Recipe, shipped
print(*registry.entries(), *shipped())
heavy = {"torch", "timm", "transformers", "onnx", "openvino", "onnxruntime", "pyarrow", "PIL", "numpy"}
loaded = {name for name in sys.modules if name.split(".")[0] in heavy or name.startswith("martlet.techniques")}
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "int8" in done.stdout


def test_technique_gives_the_class():
    cls = registry.technique("int8")
    assert cls.__name__ == "Int8"
    assert cls.name == "int8"


def test_unknown_technique_names_the_nearest():
    with pytest.raises(RecipeError, match=r"there is no technique 'int9'; did you mean int8"):
        registry.technique("int9")


def test_reads_text_without_running_it(techniques):
    write(techniques, "tokens", "tome", "tome", "ToMe", "merges tokens")
    assert registry.entries()["tome"] == registry.Entry("tome", "tokens", "merges tokens", "", "ToMe")


def test_a_name_that_two_files_claim_is_a_defect(techniques):
    write(techniques, "tokens", "tome", "tome")
    write(techniques, "prune", "tome", "tome")
    with pytest.raises(TypeError, match=r"two techniques are named tome: martlet\.techniques\.prune\.tome and"):
        registry.entries()


def test_a_file_without_a_technique_of_its_name_is_a_defect(techniques):
    write(techniques, "tokens", "tome", "evit")
    with pytest.raises(TypeError, match=r'tome\.py has no class with `name: ClassVar\[str\] = "tome"`'):
        registry.entries()
