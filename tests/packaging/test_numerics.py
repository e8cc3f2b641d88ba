"""The lists of modules without the marker `numerics` name modules that there are."""

from tests.numerics import FOLDERS, MODULES


def test_every_name_on_the_lists_is_that_of_a_folder_or_a_module(checkout):
    names = [path.name for path in (checkout / "tests").rglob("test_*.py")]
    assert [name for name in MODULES if not any(module.startswith(name) for module in names)] == []
    assert [name for name in FOLDERS if not (checkout / "tests" / name).is_dir()] == []
