"""The documents' Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(document: Path) -> list[str]:
    """Those that say `no-run` need what the document does not have."""
    return re.findall(r"^```python\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


IN_DJANGO = blocks_of(ROOT / "docs" / "django.md")
BLOCKS = [
    pytest.param(code, id=f"{document.name}-{number}")
    for document in DOCUMENTS
    if document.name != "django.md"
    for number, code in enumerate(blocks_of(document))
]
# A project of the news example's app, whose URLs are those of the block.
PROJECT = """
import os
os.environ.pop("SSE_CHANNEL_BUS", None)
import django
import pytest
from django.conf import settings
pytest_plugins = ["sse_channel.testing.pytest_plugin"]

def pytest_configure():
    settings.configure(
        ALLOWED_HOSTS=["testserver"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        INSTALLED_APPS=[
            "django.contrib.contenttypes", "django.contrib.auth", "rest_framework", "news",
            "sse_channel.django",
        ],
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        ROOT_URLCONF="test_block",
        SSE_CHANNEL={"BUS": "memory://"},
        USE_TZ=True,
    )
    django.setup()
    from django.core.management import call_command
    call_command("migrate", verbosity=0)

def pytest_sessionfinish():
    from django.core.management import call_command
    call_command("check")
"""


@pytest.mark.parametrize("code", BLOCKS)
def test_the_documents_code_runs(script, code):
    script("from django.conf import settings\nsettings.configure()\n" + code)


def test_the_documents_have_code_to_run():
    found = {block.id.rpartition("-")[0] for block in BLOCKS}
    assert found >= {"README.md", "who-may-listen.md", "deployment.md", "migration.md"}
    assert len(IN_DJANGO) >= 4


@pytest.mark.parametrize("code", IN_DJANGO, ids=range(len(IN_DJANGO)))
def test_the_code_for_django_projects_runs(script, tmp_path, code):
    (tmp_path / "conftest.py").write_text(PROJECT)
    (tmp_path / "test_block.py").write_text(
        f"urlpatterns = []\n{code}\n\ndef test_it_was_loaded():\n    pass\n"
    )
    out = script(
        "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))",
        *("-q", "-p", "no:cacheprovider", str(tmp_path)),
        PYTHONPATH=str(ROOT / "examples" / "news"),
    )
    assert f"{1 + len(re.findall('def test_', code))} passed" in out


def test_routes_that_the_documents_templates_name_are_in_their_code():
    for document in DOCUMENTS:
        text = document.read_text()
        for name in re.findall(r"{% url '([^']+)' %}", text):
            assert f'name="{name}")' in text, f"{document.name}: {name}"


def test_links_of_the_documents_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_links_to_a_heading_find_it():
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text()):
            text = (document.parent / target if target else document).read_text()
            # A comment in a block of code is none.
            text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            found = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
            assert anchor in found, f"{document.name}: {target}#{anchor}"


def check_names(row: str) -> None:
    """What a row of a table names must be tests, or models, and at least one."""
    named = re.findall(r"`([\w/]+\.(?:py|rs))::(\w+)`", row)
    assert named, f"no test: {row}"
    assert len(named) == row.count("::"), f"something else than file and function: {row}"
    for file, function in named:
        if file.startswith("races/"):
            is_one = rf'^ *\(\s*"{function}",'
        elif file.endswith(".rs"):
            is_one = rf"^ *#\[test\]\n *fn {function}\("
        else:
            is_one = rf"^ *(?:async )?def (?=test_|case_){function}\("
        text = (ROOT / (file if "/" in file else f"tests/{file}")).read_text()
        assert re.search(is_one, text, re.MULTILINE), f"{file}: {function}"


def test_the_races_name_tests_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("## Who wins the race")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 60
    for row in rows:
        assert " / " in row, f"what meets what: {row}"
        check_names(row)


def test_every_model_is_run_and_in_the_table():
    text = (ROOT / "docs" / "architecture.md").read_text()
    run = (ROOT / "races" / "main.rs").read_text()
    count = 0
    for path in (ROOT / "races").glob("*.rs"):
        models = re.findall(r'\(\s*"(\w{10,})",\s*([\w:]+),?\s*\),', path.read_text())
        assert not models or f"{path.stem}::MODELS" in run, path
        for name, function in models:
            assert function.rpartition("::")[2] == name
            assert f"`races/{path.name}::{name}`" in text, name
            count += 1
    assert count >= 32


def test_what_is_said_of_security_names_tests_that_exist():
    text = (ROOT / "docs" / "security.md").read_text()
    # Paragraphs and rows; a test that `make fuzz` is has no name.
    tables = re.findall(r"^\|.*\| test \|\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 40
    for row in rows:
        assert "::" in row or "make fuzz" in row, f"no test: {row}"
    for part in re.sub("`file::function`|`clippy::", "", text).splitlines():
        if "::" in part:
            check_names(part)


def test_unsafe_code_is_where_it_is_said_to_be():
    lints = (ROOT / "Cargo.toml").read_text()
    assert 'unsafe_code = "deny"' in lints
    assert 'undocumented_unsafe_blocks = "deny"' in lints
    text = (ROOT / "docs" / "security.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", text.partition("## Unsafe code")[2], re.MULTILINE))
    found = set()
    for path in (ROOT / "src").rglob("*.rs"):
        code = path.read_text()
        written = re.sub(r"//.*", "", code)
        if path != ROOT / "src" / "descriptors.rs":
            assert not re.search(r"\bunsafe(_code)?\b", written), path
            continue
        # Blocks alone: not a function, a trait, an attribute.
        assert not re.search(r"\bunsafe\b(?! \{)", written)
        lines = code.splitlines()
        for at, line in enumerate(lines):
            if re.search(r"\bunsafe \{", line):
                above = "\n".join(lines[max(0, at - 4) : at])
                assert "// SAFETY: " in above, line
                within = re.findall(r"fn (\w+)", "\n".join(lines[:at]))
                found.add(within[-1])
    assert found == listed - {"SSE_CHANNEL", "SSE_CHANNEL_BUS"}
