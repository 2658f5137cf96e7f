"""The official weights of a golden file, for the rule engine."""

import pathlib

import numpy as np


class WeightsReader:
    """The arrays of a file whose names begin with `w:`, by their names without it."""

    def __init__(self, path: pathlib.Path):
        self.place = str(path)
        with np.load(path) as file:
            self.arrays = {name.removeprefix("w:"): file[name] for name in file if name.startswith("w:")}

    def names(self):
        return {name: (array.shape, array.dtype) for name, array in self.arrays.items()}

    def read(self, name, index):
        return self.arrays[name][index]
