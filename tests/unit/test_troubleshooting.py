"""docs/troubleshooting.md has an entry for every reason that the code can emit, and for no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from reasons_in_code import ROOT, reasons_in_code

from stagemesh.wire.errors import StagemeshError

TROUBLESHOOTING = (ROOT / "docs/troubleshooting.md").read_text()
UNTRIED = {"DEVICE_HANGS", "LINK_FAILED", "WORKER_LOST", "NOTHING_MEASURED", "UNSUPPORTED_ARCHITECTURE"}
"""By their name: of GPUs; in metrics and traces alone; of the command line, whose tests look at its lines."""
ENTRIES = re.findall(r"^### (\w+)$", TROUBLESHOOTING, re.MULTILINE)


def codes() -> set[str]:
    """Reasons of errors that were given none: the names of their status codes."""

    def below(kind: type[StagemeshError]) -> set[type[StagemeshError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    return {kind.code.name for kind in below(StagemeshError)}


def test_every_reason_has_an_entry() -> None:
    missing = {reason: files for reason, files in reasons_in_code().items() if reason not in ENTRIES}
    assert missing == {}, "say in docs/troubleshooting.md what an operator can do about it"


def test_every_reason_is_in_the_table_of_errors() -> None:
    table = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)*)`", (ROOT / "docs/errors.md").read_text()))
    missing = {reason: files for reason, files in reasons_in_code().items() if reason not in table}
    assert missing == {}, "give it a row in docs/errors.md"


def test_every_reason_is_in_a_test() -> None:
    tests = "".join(
        path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != Path(__file__).name
    )
    missing = [
        reason for reason in set(reasons_in_code()) - UNTRIED if not re.search(rf"\b{reason}\b", tests)
    ]
    assert sorted(missing) == [], "a row of docs/errors.md has a test"


def test_every_entry_is_a_reason_or_a_code() -> None:
    assert set(ENTRIES) - set(reasons_in_code()) - codes() == set()
    assert len(ENTRIES) == len(set(ENTRIES))


def test_every_entry_says_something() -> None:
    """One text may stand under several headings, as those of broken messages do."""
    bodies = re.findall(r"(?:^### \w+\n)+((?:(?!#).+\n?)*)", TROUBLESHOOTING, re.MULTILINE)
    assert bodies
    assert all(len(body.split()) >= 5 for body in bodies), [body for body in bodies if len(body.split()) < 5]


@pytest.mark.parametrize("reason", ["STAGE_LOST", "PROMPT_TOO_LONG", "BAD_RING", "CHAIN_REFUSED"])
def test_the_reader_of_the_sources_sees_them_all_ways(reason: str) -> None:
    """By keyword, by position, and one of two."""
    assert reason in reasons_in_code()


def test_links_within_the_page_lead_somewhere() -> None:
    anchors = {entry.lower() for entry in ENTRIES}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TROUBLESHOOTING)) <= anchors
