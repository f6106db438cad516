"""The API reference: every public name is on it, with a docstring that the site can show. The pages' `:::`
directives are read here, so that mkdocs is not needed."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import vtok_fast
from vtok_fast import metrics, models, nn, parity, swap
from vtok_fast.io import token_windows, video

API = Path(__file__).resolve().parents[2] / "docs" / "api"
DIRECTIVE = re.compile(r"^::: (?P<path>[\w.]+)$", re.MULTILINE)
MODULES = [parity, metrics]  # documented whole


def resolve(path):
    """What a directive names: a module, or an attribute of the longest prefix that is a module."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for name in parts[count:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def public(module):
    """The functions and classes that a module defines and does not hide."""
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            yield f"{module.__name__}.{name}", value


PATHS = [path for page in sorted(API.glob("*.md")) for path in DIRECTIVE.findall(page.read_text())]
LISTED = [resolve(path) for path in PATHS]
EXPECTED = {
    **{
        f"{package.__name__}.{name}": getattr(package, name)
        for package in (vtok_fast, nn, models, swap, video)
        for name in package.__all__
        if not inspect.ismodule(getattr(package, name))
    },
    "vtok_fast.io.token_windows.write_windows": token_windows.write_windows,
    **{name: value for module in MODULES for name, value in public(module)},
}


def test_every_public_name_is_in_the_reference():
    shown = {id(thing) for thing in LISTED}
    shown |= {id(value) for module in LISTED if inspect.ismodule(module) for _, value in public(module)}
    missing = [name for name, value in EXPECTED.items() if id(value) not in shown]
    assert not missing, f"docs/api/ lacks {missing}"
    assert len(EXPECTED) > 60 and id(token_windows._part) not in shown


def test_no_name_is_twice_in_the_reference():
    assert len(PATHS) == len(set(PATHS)) == len({id(thing) for thing in LISTED})


@pytest.mark.parametrize("name", EXPECTED)
def test_a_public_name_has_a_docstring(name):
    value = EXPECTED[name]
    text = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""  # none inherited
    assert text.strip(), f"{name} has no docstring"
    assert not text.startswith(f"{value.__name__}("), (
        f"{name} has only the docstring that a dataclass is given"
    )


def test_docstrings_are_written_in_markdown():
    """Roles of Sphinx, as in `name`, would be shown as they stand."""
    package = Path(vtok_fast.__file__).parent
    for found in pkgutil.walk_packages([str(package)], "vtok_fast."):
        file = package.joinpath(*found.name.split(".")[1:])
        file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        if file.exists():
            role = re.search(r":(?:mod|func|class|meth|attr|data):`", file.read_text())
            assert role is None, f"{file}: {role[0]}"
