"""Read a generation with plain webdataset: nothing of this project is imported.

ddpm download s3://ddpm/samples/digits ./digits
python examples/read_generation.py ./digits
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset as wds


def samples(folder: Path) -> Iterator[dict[str, Any]]:
    """Every sample of a complete generation: `png` is uint8 (H, W, 3), `json` its index, seed and class."""
    manifest = json.loads((folder / "manifest.json").read_text())
    urls = [str(folder / shard["key"]) for shard in manifest["shards"]]
    yield from wds.WebDataset(urls, shardshuffle=False).decode("rgb8")


def main(folder: Path) -> None:
    """Count the samples of each class."""
    classes = Counter(sample["json"].get("class") for sample in samples(folder))
    for name, count in sorted(classes.items(), key=str):
        print(f"class {name}: {count}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
