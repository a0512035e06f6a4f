"""The command of the compatibility matrix: what it covers, counts and says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from commands import load

ROOT = Path(__file__).parent.parent
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    return load("matrix")


@pytest.fixture
def cell(matrix):
    return matrix.Cell("one (of them)", HERE, "5.2", ("tests/test_queue.py",))


def test_every_python_meets_each_django_that_it_may(matrix):
    full = [(cell.python, cell.django) for cell in matrix.cells() if cell.name.startswith("Python")]
    assert full == [
        *(("3.10", "5.2"), ("3.11", "5.2")),
        *(("3.12", "5.2"), ("3.12", "6.0"), ("3.12", "6.1")),
        *(("3.13", "5.2"), ("3.13", "6.0"), ("3.13", "6.1")),
    ]


def test_each_cell_has_a_log_of_its_own_and_shares_an_environment_with_its_equals(matrix):
    cells = matrix.cells()
    assert len({cell.slug for cell in cells}) == len(cells)
    of = {cell.environment: (cell.python, cell.constraints) for cell in cells}
    assert len(of) == len(set(of.values())) < len(cells)
    assert all(of[cell.environment] == (cell.python, cell.constraints) for cell in cells)


def test_the_tests_of_every_cell_exist(matrix):
    for test in {test for cell in matrix.cells() for test in (*cell.tests, *matrix.QUICK)}:
        path, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in (ROOT / path).read_text(), test


def test_the_pythons_are_those_of_the_package(matrix):
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r"Python :: (3\.\d+)", text) == list(matrix.PYTHONS)
    assert re.findall(r"Framework :: Django :: (\S+)\"", text) == list(matrix.DJANGOS)
    assert f"gevent>={matrix.OLDEST_GEVENT.removeprefix('gevent==')}".startswith(
        re.search(r"\"(gevent>=[\d.]+)\"", text)[1]
    )


def test_an_interpreter_is_the_newest_that_pyenv_has(matrix, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert matrix.interpreter(HERE) is None
    for name in (f"{HERE}.9", f"{HERE}.10", f"{HERE}-dev"):
        python = tmp_path / "versions" / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
    assert matrix.interpreter(HERE) == str(tmp_path / f"versions/{HERE}.10/bin/python")


def test_a_shim_for_a_python_that_is_not_there_is_none(matrix, tmp_path, monkeypatch):
    shim = tmp_path / f"python{HERE}"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert matrix.interpreter(HERE) is None


@pytest.mark.parametrize(("ci", "outcome"), [("", "skipped"), ("true", "failed")])
def test_a_missing_python_is_named_and_fails_in_ci(matrix, cell, monkeypatch, ci, outcome):
    monkeypatch.setattr(matrix, "interpreter", lambda version: None)
    monkeypatch.setenv("CI", ci)
    result = matrix.test(cell, Path("a.whl"), is_quick=True)
    assert result.outcome == outcome
    text = matrix.report([result], "Here.")
    assert f"- {outcome.title()}: one (of them): Python {HERE} is missing" in text
    assert f"`pyenv install {HERE}`" in text


def test_what_pytest_reports_is_counted_and_a_skip_is_not_a_pass(matrix, cell, tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "def test_errs(broken): pass\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_skips(n): pytest.skip('nginx is missing')\n"
    )
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=it.xml", "."],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
    )
    result = matrix.Result(cell, log=matrix.WORK / "logs" / "one-of-them.txt")
    matrix.read_junit(tmp_path / "it.xml", result)
    assert (result.passed, result.failed) == (1, 2)
    assert result.skipped == {"nginx is missing": 2}
    text = matrix.report([result], "Here.")
    assert "- Failed: one (of them): 2 of its tests failed; see .matrix/logs/one-of-" in text
    assert "- Skipped: 2 tests of one (of them): nginx is missing" in text


def test_a_cell_all_of_whose_tests_were_skipped_has_not_passed(matrix, cell):
    skipped = Counter({"redis-server is missing": 3})
    assert matrix.Result(cell, skipped=skipped).outcome == "skipped"
    assert matrix.Result(cell, passed=1, skipped=skipped).outcome == "passed"
    assert matrix.Result(cell, passed=1, why="pytest ended with status 3").outcome == "failed"


def test_the_table_is_aligned_and_shows_what_is_installed(matrix, cell):
    versions = {"Python": "3.12.1", "Django": "6.0.10", "gevent": "26.9.0"}
    result = matrix.Result(cell, passed=700, seconds=61.4, versions=versions)
    head, marks, row = matrix.table([result]).splitlines()
    assert len(head) == len(marks) == len(row)
    cells = [text.strip() for text in row.strip("|").split("|")]
    assert cells[:5] == ["one (of them)", "3.12.1", "6.0.10", "-", "26.9.0"]
    assert cells[-4:] == ["700", "0", "0", "61"]


def test_cells_are_chosen_by_python_django_and_name(matrix, capsys):
    def listed(*words):
        assert matrix.main(["--list", *words]) == 0
        return capsys.readouterr().out.splitlines()

    assert len(listed()) == len(matrix.cells())
    assert listed("--quick") == ["Python 3.13, Django 6.1", "the oldest of all"]
    assert listed("--python", "3.13", "--django", "6.0") == ["Python 3.13, Django 6.0"]
    assert listed("GEVENT", "oldest") == ["gevent, oldest"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nonsense"], "no cell is chosen"),
        (["--python", "3.10", "--django", "6.0"], "no cell is chosen"),
        (["--wheel", "nowhere.whl"], "no file nowhere.whl"),
    ],
)
def test_wrong_arguments_are_told(matrix, capsys, words, says):
    with pytest.raises(SystemExit) as ended:
        matrix.main(words)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
