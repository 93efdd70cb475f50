"""What a release says of itself, in each place that says it."""

import re
from datetime import date
from pathlib import Path

import lstmfused

ROOT = Path(__file__).parent.parent


def released() -> list[tuple[str, str]]:
    """Versions and dates, as CHANGELOG.md has them from the newest on."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    return re.findall(r"^## \[(\d[^]]*)\] - (\S+)$", changelog, re.MULTILINE)


def test_versions() -> None:
    version, day = released()[0]
    assert version == lstmfused.__version__
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {version}" in citation
    assert f'date-released: "{day}"' in citation


def test_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    days = [date.fromisoformat(day) for _, day in released()]
    assert days == sorted(days, reverse=True)
    links = set(re.findall(r"^\[([^]]+)\]: https://", changelog, re.MULTILINE))
    assert links == {"Unreleased", *(version for version, _ in released())}
    groups = set(re.findall(r"^### (.+)$", changelog, re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
