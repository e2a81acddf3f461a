import inspect

from waterline import errors
from waterline.errors import MissingExtraError, WaterlineError, nearest


def test_every_error_stands_in_the_tree_with_its_codes() -> None:
    tree = errors.__doc__ or ""
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, WaterlineError):
            (line,) = [line for line in tree.splitlines() if f" {name} " in f" {line.replace('─', ' ')} "]
            assert [int(code) for code in line.split(name)[1].split()[:2]] == [kind.exit_code, kind.http_status]


def test_a_missing_extra_says_the_line_that_installs_it() -> None:
    assert "pip install 'waterline-llm[embedded]'" in str(MissingExtraError("the embedded engine", extra="embedded"))


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    assert nearest("rtx-4900", ["rtx-4090", "rtx-5090", "mi300x"]) == "Did you mean 'rtx-4090' or 'rtx-5090'?"


def test_a_name_like_no_other_is_answered_with_what_there_is() -> None:
    assert nearest("zzz", ["b", "a"]) == "Known: a, b."
