"""A dataset whose items run the kernels where they are asked for: alone in its file, which a spawned worker imports."""

import torch

from ehrseq.modeling.selective_scan import selective_scan
from tests.kernels.inputs import scan_inputs


class ScannedRows(torch.utils.data.Dataset):
    """Six rows, each a scan of inputs of its own, [1, 40, 33]."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return selective_scan(**scan_inputs(1, 40, 33, 16, torch.float32, seed=i), backend="cpp")[0]
