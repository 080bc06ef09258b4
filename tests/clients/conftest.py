"""Tiny models gain nothing from threads, and lose much where cores are shared."""

import torch

torch.set_num_threads(1)
