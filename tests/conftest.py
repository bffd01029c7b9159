"""For every test: one thread, because matrices of toy size spin on more and crawl when the cores are busy."""

import torch

torch.set_num_threads(1)
