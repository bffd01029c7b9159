"""Which code this is: the commit of a checkout, the release of an installed package."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def code_version() -> str:
    """`release+commit`, with `-changed` where the checkout differs from its commit; what of it cannot be known is left
    out."""
    try:
        release = version("grpo-toolkit")
    except PackageNotFoundError:
        release = ""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return release
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=-changed"], capture_output=True, text=True
        )
    except FileNotFoundError:  # no git on this machine
        return release
    return "+".join(part for part in (release, described.stdout.strip()) if part)
