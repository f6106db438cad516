"""Habits that make this project's English hard to read are rejected: in the pages, and in the docstrings,
messages and comments of the package and its tests. Spelling is American, in names too."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HABITS = {
    "say 'is not a ...'": r"(?<!\bthere )\b(?:is|are|was|were) no (?!(?:longer|more|less|better|matter)\b)",
    "say what it is not": r"(?<!\bthere )\b(?:is|are|was|were) (?-i:none)\b(?! of\b)",
    "say 'lacks'": r"\b(?:has|have|had) not(?=[.,:;)])",
    "say 'except'": r"\bbut for\b",
    "say 'after'": r"\bbehind(?=[.,:;)]|$)"
    r"|\b(?:one|before,?|and|zeros|rows?|copies|frames?|lanes|floats|values?|NaN|lies?|stands?) behind\b",
    "say 'only'": r"\b(?:on an?|for|in|of this|of these) (?:\w+ )?\w+ alone\b|\blibrary alone\b",
}
BRITISH = (
    r"quantis|normalis|tokenis|initialis|optimis(?!t)|factoris|regularis|randomis|synchronis|recognis|standardis"
    r"|parametris|serialis|summaris|generalis|organis|vectoris|colour|neighbour|behaviour|favour|centre|centring"
    r"|labelled|\bgrey"
)
# What is quoted from elsewhere: a file and the words in it.
ALLOWED = {("tests/support/golden_vidtok.py", "level_centres")}  # a name in the golden files


def python_prose(source: str) -> list[str]:
    """The strings and the comments of a module, each run of comment lines as one."""
    tree = ast.parse(source)
    strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    comments, last = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if token.start[0] == last + 1 and comments:
                comments[-1] += " " + text
            else:
                comments.append(text)
            last = token.start[0]
    return strings + comments


def cpp_prose(source: str) -> list[str]:
    """The comments, each run of lines as one, and the strings."""
    runs = re.findall(r"(?://[^\n]*\n[ \t]*)+", source + "\n")
    comments = [re.sub(r"^[ \t]*//+", " ", run, flags=re.MULTILINE) for run in runs]
    code = re.sub(r"//[^\n]*", "", source)
    return comments + re.findall(r'"((?:[^"\\\n]|\\.)*)"', code)


def page_prose(source: str) -> list[str]:
    return re.split(r"\n\s*\n", source)


def prose(file: Path) -> list[str]:
    readers = {".md": page_prose, ".py": python_prose}
    found = readers.get(file.suffix, cpp_prose)(file.read_text())
    return [re.sub(r"\s+", " ", text) for text in found]


def files() -> list[Path]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    pages.append(ROOT / "tests" / "golden_data" / "README.md")
    sources = [
        file
        for folder in ("vtok_fast", "kernels", "csrc", "examples", "scripts", "benchmarks", "tests")
        for pattern in ("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
        for file in (ROOT / folder).rglob(pattern)
    ]
    found = {file for file in pages + sources if ".cache" not in file.parts}
    return sorted(found - {Path(__file__).resolve()})  # what is rejected stands there


def faults(text: str) -> list[tuple[str, str]]:
    """(the words, what to do instead)"""
    text = re.sub(r"\b(?:leav\w+|left)\b[^.]{0,20} behind\b", " ", text)
    found = [
        (text[max(m.start() - 30, 0) : m.end() + 30], advice)
        for advice, habit in HABITS.items()
        for m in re.finditer(habit, text, re.IGNORECASE)
    ]
    spelled = re.finditer(rf"\w*(?:{BRITISH})\w*", text, re.IGNORECASE)
    return found + [(m[0], "spell it the American way") for m in spelled]


NAMES = [str(file.relative_to(ROOT)) for file in files()]


@pytest.mark.parametrize("name", NAMES)
def test_english(name):
    found = [
        f"{advice}: ... {words} ..."
        for text in prose(ROOT / name)
        for words, advice in faults(text)
        if not any(file == name and quoted in words for file, quoted in ALLOWED)
    ]
    assert not found, f"{name}:\n" + "\n".join(found)


def test_names_are_american():
    for name in NAMES:
        assert not re.search(BRITISH, name, re.IGNORECASE), name
        if name.endswith(".py"):
            tokens = tokenize.generate_tokens(io.StringIO((ROOT / name).read_text()).readline)
            names = {token.string for token in tokens if token.type == tokenize.NAME}
            british = {word for word in names if re.search(BRITISH, word, re.IGNORECASE)}
            assert not british, f"{name}: {british}"


@pytest.mark.parametrize(
    "text",
    [
        "a scope is no tensor",
        "ValueError for a file that is none",
        "what torch 2.6 has not: FSDP",
        "all of it but for the border",
        "frames added before and behind",
        "zeros behind the last row",
        "tiles, on a GPU alone",
        "it uses the standard library alone",
        "normalises the colour",
    ],
)
def test_a_habit_is_found(text):
    assert faults(text)


@pytest.mark.parametrize(
    "text",
    [
        "there is no GPU",
        "why there is none",
        "it is no longer there",
        "none of them is a tensor",
        "the kernels behind a thin API",
        "nothing is left behind.",
        "kernels leave no graph behind, so",
        "it is left alone",
        "depends on the seed alone",
        "it has not been measured",
    ],
)
def test_good_english_passes(text):
    assert not faults(text)
