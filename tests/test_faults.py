"""A sample of inject_faults.py: nothing is lost, and the same command always goes on."""

import shutil

import pytest
from inject_faults import inject_faults, make_commands

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")]


def test_faults_at_some_operations(tmp_path):
    """The cache of tokens, a checkpoint, the export; with a merge its own, too. The first of each kind strikes every
    command: summarize.py has the fewest operations, 46."""
    faults = {"kill": (40, 140), "EIO": (41, 120), "ENOSPC": (42, 130)}
    table, harms = inject_faults(tmp_path, faults, list(make_commands(tmp_path)))
    assert harms == []
    assert all(counts["runs"] for counts in table.values())
    for fault in faults:
        found = [counts for (_, name), counts in table.items() if name == fault]
        assert sum(counts["survived"] for counts in found) < sum(counts["runs"] for counts in found)
