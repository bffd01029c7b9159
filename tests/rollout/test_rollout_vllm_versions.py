"""Pins the table of vLLM's versions: every row has a reason, and a version is compared by number, not as text."""

import pytest

from rollout.vllm_versions import TABLE, has


@pytest.mark.parametrize(
    ("version", "cpu_mla", "weight_version"),
    [
        ("0.25.1", False, False),
        ("0.27.1", False, True),
        ("0.28.0", True, True),
        ("0.32.0+cpu", True, True),
        ("0.100.0", True, True),
        ("1.0.0rc1", True, True),
    ],
)
def test_versions(version: str, cpu_mla: bool, weight_version: bool) -> None:
    assert (has("cpu_mla", version), has("weight_version", version)) == (cpu_mla, weight_version)


def test_every_row_says_what_is_so_before_it() -> None:
    assert all(row.otherwise for row in TABLE.values())
