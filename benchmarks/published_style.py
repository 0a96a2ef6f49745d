"""The reference side of the benchmarks and tests: the published practice, written here plainly.

`PlainResNet` is the published network as its description reads (default memory layout, `Conv1d`,
`InstanceNorm1d`, max pools of size 1), with the published state-dict names.
"""
import torch
from torch import nn


def plain_conv_block(in_channels, out_channels, stride=1):
    block = nn.Module()
    block.conv = nn.Conv1d(in_channels, out_channels, 15, stride=stride, padding=7)
    block.instance_norm = nn.InstanceNorm1d(out_channels, affine=True)
    block.forward = lambda x: torch.relu(block.instance_norm(block.conv(x)))
    return block


class PlainBlock(nn.Module):
    """kind 1: conv-norm-ReLU-conv + 1x1 skip; 2: norm-ReLU before it; 3: and one on the sum."""

    def __init__(self, kind, in_channels, out_channels):
        super().__init__()
        self.kind = kind
        if kind >= 2:
            self.mini_res = nn.Module()
            self.mini_res.instance_norm = nn.InstanceNorm1d(in_channels, affine=True)
        self.max_pool = nn.MaxPool1d(1, stride=1)
        self.conv1x1 = nn.Conv1d(in_channels, out_channels, 1, stride=4)
        self.conv1 = plain_conv_block(in_channels, out_channels, stride=4)
        self.conv2 = nn.Conv1d(out_channels, out_channels, 15, padding=7)
        if kind == 3:
            self.mini_res_end = nn.Module()
            self.mini_res_end.instance_norm = nn.InstanceNorm1d(out_channels, affine=True)

    def forward(self, x):
        skip = self.conv1x1(self.max_pool(x))
        main = torch.relu(self.mini_res.instance_norm(x)) if self.kind >= 2 else x
        total = self.conv2(self.conv1.forward(main)) + skip
        return torch.relu(self.mini_res_end.instance_norm(total)) if self.kind == 3 else total


class PlainResNet(nn.Module):
    """ppg [B, 1, 3600], vitals [B] each -> [B, 1]."""

    def __init__(self, num_discrete=3):
        super().__init__()
        self.layers = nn.ModuleList([
            plain_conv_block(1, 64), PlainBlock(1, 64, 64), PlainBlock(2, 64, 128),
            PlainBlock(2, 128, 128), PlainBlock(3, 128, 256)])
        self.projection = nn.Linear(256 + num_discrete, 128)
        self.mlp = nn.Sequential(nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, ppg, *discretes):
        x = ppg
        for layer in self.layers:
            x = layer.forward(x)
        x = torch.cat([x.mean(2)] + [d.unsqueeze(1) for d in discretes], dim=1)
        return self.mlp(self.projection(x))


class PlainDataset(torch.utils.data.Dataset):
    """The published loader's way: one item at a time, a look-up by name for each of its fields."""

    def __init__(self, path, keys):
        import h5py
        self.path, self.keys, self.file = path, keys, None
        with h5py.File(path, "r") as file:
            self.index = [(mrn, csn, row) for mrn in file for csn in file[mrn]
                          for row in range(len(file[mrn][csn]["ppg"]))]

    def __len__(self):
        return len(self.index)

    def __getitem__(self, item):
        import h5py
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        mrn, csn, row = self.index[item]
        group = self.file[mrn][csn]
        return tuple(torch.tensor(group[key][row, ...], dtype=torch.float32) for key in self.keys)
