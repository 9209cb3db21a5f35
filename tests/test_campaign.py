"""A few cases of each section of the campaign; hundreds are for `make campaign`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_short_campaign_finds_nothing() -> None:
    ended = subprocess.run(
        [sys.executable, ROOT / "tests/campaign", "--cases", "3"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout
