"""Every error leaves the exit status that the command line promises."""

import pytest

from martlet.core import errors
from martlet.core.errors import MartletError, UsageError, nearest

ALL = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, MartletError)]


@pytest.mark.parametrize("cls", ALL)
def test_exit_status_is_2_for_what_the_user_typed_and_1_for_the_rest(cls):
    usage = {"UsageError", "SourceError", "RecipeError", "DataError"}
    assert cls.exit_status == (2 if cls.__name__ in usage else 1)
    assert issubclass(cls, UsageError) == (cls.__name__ in usage)


def test_there_are_all_of_them():
    assert len(ALL) == 8


def test_nearest_names_what_is_close_and_nothing_else():
    assert nearest("openvno", ["openvino", "onnxruntime", "torch"]) == "; did you mean openvino?"
    assert nearest("zzz", ["openvino", "onnxruntime"]) == ""
    assert nearest("int", ["int8", "int4", "int2", "int1"], n=2).count("int") == 2
