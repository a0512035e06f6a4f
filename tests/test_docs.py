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


def test_links_of_the_documents_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_links_to_a_heading_find_it():
    for document in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text()):
            text = (document.parent / target if target else document).read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            found = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
            assert anchor in found, f"{document.name}: {target}#{anchor}"


def test_the_races_name_tests_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("## Who wins the race")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 60
    for row in rows:
        assert " / " in row, f"what meets what: {row}"
        named = re.findall(r"`([\w/]+\.(?:py|rs))::(\w+)`", row)
        assert named, f"no test: {row}"
        for file, function in named:
            path = ROOT / (file if "/" in file else f"tests/{file}")
            definition = rf"^ *(?:async )?(?:def|(?:pub )?fn) {function}\("
            assert re.search(definition, path.read_text(), re.MULTILINE), f"{file}: {function}"


def test_every_model_is_run_and_in_the_table():
    text = (ROOT / "docs" / "architecture.md").read_text()
    count = 0
    for path in (ROOT / "races").glob("*.rs"):
        models = re.findall(r'\(\s*"(\w{10,})",\s*([\w:]+),?\s*\),', path.read_text())
        for name, function in models:
            assert function.rpartition("::")[2] == name
            assert f"`races/{path.name}::{name}`" in text, name
            count += 1
    assert count >= 32


def test_what_is_said_of_security_names_tests_that_exist():
    text = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`([\w/]+\.(?:py|rs))::(\w+)`", text)
    assert len(named) > 40
    for file, function in named:
        path = ROOT / file if file.endswith(".rs") else ROOT / "tests" / file
        assert re.search(rf"\b(?:def|fn) {function}\(", path.read_text()), f"{file}::{function}"


def test_unsafe_code_is_where_it_is_said_to_be():
    text = (ROOT / "docs" / "security.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", text.partition("## Unsafe code")[2], re.MULTILINE))
    found = set()
    for path in (ROOT / "src").rglob("*.rs"):
        code = path.read_text()
        if path.name != "descriptors.rs":
            assert not re.search(r"\bunsafe\s*(\{|fn|impl|extern)|unsafe_code", code), path
            continue
        lines = code.splitlines()
        for at, line in enumerate(lines):
            if re.search(r"\bunsafe \{", line):
                above = "\n".join(lines[max(0, at - 4) : at])
                assert "// SAFETY: " in above, line
                within = re.findall(r"fn (\w+)", "\n".join(lines[:at]))
                found.add(within[-1])
    assert found == listed - {"SSE_CHANNEL", "SSE_CHANNEL_BUS"}
