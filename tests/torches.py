"""What the installed torch can do. Cases that it cannot are left out, not skipped: the config check refuses them."""

import torch

HAS_ZBV = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)
"""Zero-bubble schedules, and interleaved ones that receive late."""
