"""The documents' Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = [
    block
    for document in (ROOT / "README.md", ROOT / "docs" / "metrics.md")
    for block in re.findall(
        r"^```python\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL
    )
]


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_the_readmes_code_runs(script, code):
    script("from django.conf import settings\nsettings.configure()\n" + code)


def test_the_readme_has_code_to_run():
    assert len(BLOCKS) >= 5


def test_links_of_the_documents_lead_somewhere():
    for document in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_races_name_tests_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    everything = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`((?:test|case)_\w+)`", text):
        assert f"def {name}(" in everything, name
