"""For every test: one thread, because matrices of toy size spin on more and crawl when the cores are busy. The order:
files with slow tests first, so that two processes end at about the same time.
"""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # stable: files stay whole, tests in their order
