"""A sample of inject_faults.py: nothing is lost, and the same command always goes on."""

import shutil

import pytest
from inject_faults import inject_faults, make_commands

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed")]


# The cache of tokens, a checkpoint, the export; with a merge its own, too.
@pytest.mark.parametrize(("fault", "first", "every"), [("kill", 40, 90), ("EIO", 61, 120), ("ENOSPC", 50, 130)])
def test_faults_at_some_operations(tmp_path, fault, first, every):
    table, harms = inject_faults(tmp_path, [fault], list(make_commands(tmp_path)), every, first)
    assert harms == []
    assert sum(counts["survived"] for counts in table.values()) < sum(counts["runs"] for counts in table.values())
