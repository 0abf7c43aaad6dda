"""These tests need an NVIDIA GPU; elsewhere they are not even collected. ``make test-gpu`` runs them."""

import torch

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]
