"""Settings of the test process."""

import os

import torch

# Tiny tensors: a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)
# Before huggingface_hub is imported: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
