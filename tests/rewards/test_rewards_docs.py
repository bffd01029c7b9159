"""Every code block of docs/rewards.md runs: files are written as shown, Python is executed, commands are run, and the
rewards of training commands are loaded.
"""

import re
import shlex
from pathlib import Path

import pytest

from rewards import load_reward, load_rubric
from rewards.load import _MAKERS, _REGISTRY

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cli = pytest.importorskip("pipelines.cli")
    monkeypatch.chdir(tmp_path)
    commands: list[list[str]] = []
    scripts: list[str] = []
    for language, block in BLOCKS:
        title = re.match(r"# (\w+\.py)\n", block)
        if language == "python" and title:
            with (tmp_path / title[1]).open("a") as file:
                file.write(block)
        elif language == "python":
            scripts.append(block)
        elif language == "json":
            (tmp_path / "completions.jsonl").write_text(block)
        elif language == "bash":
            commands += [shlex.split(line) for line in block.splitlines()]
    assert len(commands) >= 6 and scripts
    for script in scripts:
        exec(compile(script, "docs/rewards.md", "exec"), {})
    for command in commands:
        if command[:2] == ["grpo", "reward"]:
            assert cli.main(command[1:]) == 0, command
        else:
            load_rubric(command[command.index("--reward") + 1 :])
    assert "value: mean 0.3333" in capsys.readouterr().out
    for name in ("brief", "shortest", "judged"):
        assert load_reward(f"my_rewards.py:{name}").name == name
    assert cli.main(["reward", "test", "my_rewards.py:judged", "completions.jsonl"]) == 0
    assert cli.main(["reward", "test", "my_rewards.py:shortest", "completions.jsonl"]) == 0


def test_every_reward_is_on_the_page() -> None:
    missing = [name for name in (*_REGISTRY, *_MAKERS) if f"`{name}" not in PAGE]
    assert not missing, f"add these to the table of docs/rewards.md: {missing}"
