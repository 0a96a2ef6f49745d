"""The reference side of the benchmarks: the published loader's way, written here plainly.

(The published network, plainly, is models.py.)
"""
import h5py
import torch


class PlainDataset(torch.utils.data.Dataset):
    """The published loader's way: one item at a time, a look-up by name for each of its fields."""

    def __init__(self, path, keys):
        self.path, self.keys, self.file = path, keys, None
        with h5py.File(path, "r") as file:
            self.index = [(mrn, csn, row) for mrn in file for csn in file[mrn]
                          for row in range(len(file[mrn][csn]["ppg"]))]

    def __len__(self):
        return len(self.index)

    def __getitem__(self, item):
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        mrn, csn, row = self.index[item]
        group = self.file[mrn][csn]
        return tuple(torch.tensor(group[key][row, ...], dtype=torch.float32) for key in self.keys)
