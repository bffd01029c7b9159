"""Pins what happens when the disk is full: the run ends with one clear message and its newest checkpoint is whole; with
space again it is resumed and ends as if nothing had been.

Once with a disk that is really full, where this process may mount one, with more or less room for the last write; once
with files that cannot be made any more, from one moment on.
"""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from grpo.checkpoint import checkpoints, find_damage
from grpo.trainer import GRPOTrainer
from tests.grpo.test_grpo_trainer import make_trainer, policy, repeatable, weights

__all__ = ["policy"]

FULL_FROM_STEP = 3


def trainer_in(run_dir: Path, policy: Path, on_step: Callable[[int, dict[str, float]], None]) -> GRPOTrainer:
    return make_trainer(
        policy, run_dir, on_step=on_step, steps=6, save_every=1, log_groups_every=1, dump_samples_every=1
    )


@pytest.fixture(scope="module")
def undisturbed(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> GRPOTrainer:
    trainer = trainer_in(tmp_path_factory.mktemp("undisturbed"), policy, lambda step, metrics: None)
    trainer.run()
    return trainer


def assert_stops_and_resumes(
    policy: Path, run_dir: Path, undisturbed: GRPOTrainer, fill: Callable[[], None], free: Callable[[], None]
) -> None:
    trainer = trainer_in(run_dir, policy, lambda step, metrics: fill() if step == FULL_FROM_STEP else None)
    with pytest.raises(OSError, match=r"the disk is full: .* stops after \d steps") as caught:
        trainer.run()
    found = re.search(r"after (\d) steps \(step_00000(\d) is whole\); free space and resume", str(caught.value))
    assert caught.value.errno == errno.ENOSPC and found, caught.value
    finished, saved = map(int, found.groups())
    assert FULL_FROM_STEP <= saved <= finished <= saved + 1
    whole = checkpoints(run_dir)
    assert [folder.name for folder in whole] == [f"step_{step:06d}" for step in (saved - 1, saved)]
    assert [find_damage(folder) for folder in whole] == [None, None]
    assert not list((run_dir / "checkpoints").glob(".*")), "a half-written checkpoint keeps no space"
    free()
    resumed = trainer_in(run_dir, policy, lambda step, metrics: None)
    assert resumed.first_step == saved
    resumed.run()
    assert repeatable(run_dir) == repeatable(undisturbed.run_dir)
    ours, theirs = weights(resumed), weights(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # -l: a test that failed may have left a file open


@pytest.mark.parametrize("pages_left", [0, 1, 2, 4, 20, 40, 60])
def test_a_disk_that_is_full(pages_left: int, small_disk: Path, policy: Path, undisturbed: GRPOTrainer) -> None:
    filler, run_dir = small_disk / "filler", small_disk / "run"

    def fill() -> None:
        with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        os.truncate(filler, filler.stat().st_size - 4096 * pages_left)

    assert_stops_and_resumes(policy, run_dir, undisturbed, fill, filler.unlink)


class FullDisk:
    """From its `n`-th file on that a process wants to write or folder that it wants to make in `folder`."""

    def __init__(self) -> None:
        self.folder, self.room = "", -1
        sys.addaudithook(self.hook)  # for as long as the process lives: there is one for all tests

    def hook(self, event: str, details: tuple[object, ...]) -> None:
        if self.room < 0 or event not in ("open", "os.mkdir") or self.folder not in str(details[0]):
            return
        if event == "open" and isinstance(details[2], int) and not details[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.room -= self.room > 0
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def full_disk() -> FullDisk:
    return FullDisk()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.parametrize("room", range(1, 17, 2))
def test_files_that_cannot_be_made(
    room: int, full_disk: FullDisk, tmp_path: Path, policy: Path, undisturbed: GRPOTrainer
) -> None:
    full_disk.folder = str(tmp_path)

    def fill() -> None:
        full_disk.room = room

    def free() -> None:
        full_disk.room = -1

    assert_stops_and_resumes(policy, tmp_path / "run", undisturbed, fill, free)
