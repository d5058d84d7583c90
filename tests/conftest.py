"""Settings of the test process."""

import os
import secrets

# Before triton is imported, which torch may do: its kernels run in its interpreter, on CPUs.
os.environ["TRITON_INTERPRET"] = "1"

import torch

# Tiny tensors: a second thread costs more than it brings, above all on a busy machine.
torch.set_num_threads(1)
# Before huggingface_hub is imported: no test may depend on the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before ray is imported: the clusters that tests start let nobody in but the test's own processes.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
