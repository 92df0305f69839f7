# %% [markdown]
# # Look at a generation
#
# `ddpm generate` has filled a prefix; here its images are counted, averaged and shown. Each shard is checked against
# the manifest while it is read. `PREFIX=s3://… python examples/look_at_generation.py` runs all cells.

# %%
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm_pipeline import api
from ddpm_pipeline.data.formats.contact_sheet import image_grid

generation = api.open_generation(os.environ.get("PREFIX", "s3://ddpm/samples/digits"))
print(f"{len(generation)} images of {generation.spec.image_shape}, sampled by {generation.spec.sampler.kind}")

# %%
counts: Counter[str] = Counter()
first: dict[str, list[np.ndarray]] = defaultdict(list)
total: dict[str, np.ndarray] = {}
for image, label, _ in generation:
    name = str(label) if label is None or generation.class_names is None else generation.class_names[label]
    counts[name] += 1
    total[name] = total.get(name, np.zeros(image.shape)) + image
    if len(first[name]) < 8:
        first[name].append(image)
for name, count in sorted(counts.items()):
    print(f"{name}: {count} images, mean level {total[name].mean() / count:.1f}")

# %% [markdown]
# A row for each class: the mean of its images, then the first eight.

# %%
rows = [[np.rint(total[name] / counts[name]).astype(np.uint8), *first[name]] for name in sorted(counts)]
Image.fromarray(image_grid(rows, sorted(counts))).save("classes.png")
print(f"wrote {Path('classes.png').resolve()}")
