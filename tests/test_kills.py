"""Runs that a SIGKILL ends heal: `python -m tests.kills` with few kills."""

import pytest

from tests.runs import start_process


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dph", "mle_pretrain"])
def test_a_run_killed_three_times_is_the_run_without_kills(script, toy_base):
    """In a process of its own: the runs are forked, and a process that has trained cannot fork."""
    process = start_process(["-m", "tests.kills", script, "--kills", "3"], timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"{script}: 3 kills" in process.stdout
    assert "0 did not heal" in process.stdout
