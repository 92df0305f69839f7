"""How the kernels of group normalization divide a feature map."""

from dataclasses import dataclass

from torch import Tensor

TILE = 4096
"""Values of a tile: 32 for each thread."""
CHANNELS = 64
"""Neighboring channels of a tile, where the map has so many: two 128-byte lines of float32."""
PART_ROWS = 256
"""Rows of a part, unless that makes more than MOST_PARTS."""
MOST_PARTS = 64


@dataclass(frozen=True)
class Tiling:
    """How the rows and channels of a map are divided among programs: a function of one sample's shape."""

    rows: int
    channels: int
    groups: int

    @staticmethod
    def of(x: Tensor, groups: int) -> "Tiling":
        """That of a map (B, C, H, W)."""
        return Tiling(x.shape[2] * x.shape[3], x.shape[1], groups)

    @property
    def part_rows(self) -> int:
        """Rows that one program reads."""
        return max(PART_ROWS, -(-self.rows // MOST_PARTS))

    @property
    def parts(self) -> int:
        """Programs that share the rows of a sample."""
        return -(-self.rows // self.part_rows)

    @property
    def programs(self) -> int:
        """Programs for each sample."""
        return self.parts * -(-self.groups // self.tile["GROUPS"])

    @property
    def tile(self) -> dict[str, int]:
        """Sizes of a tile, which kernels are compiled for."""
        width = self.channels // self.groups
        places = _power_of_two(width)
        groups = min(_power_of_two(self.groups), max(1, CHANNELS // places))
        return {"GROUPS": groups, "WIDTH": width, "PLACES": places, "ROWS": max(1, TILE // (groups * places))}

    @property
    def variant(self) -> dict[str, int]:
        """Which way the sums are found, and for how many parts at most."""
        return {"WHOLE": self.parts == 1, "PARTS": _power_of_two(self.parts)}

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Arguments `rows` to `parts` of every kernel."""
        return self.rows, self.channels, self.groups, self.part_rows, self.parts


def _power_of_two(count: int) -> int:
    """The least one that is not below `count`."""
    return 1 << (count - 1).bit_length()
