"""The readers that are fuzzed, by name; apart from them, so that naming them imports none."""

NAMES = (
    "tar",
    "npy",
    "idx",
    "CIFAR batch",
    "npz",
    "image mark",
    "image parquet",
    "metadata.csv",
    "metadata.parquet",
    "CelebA table",
    "dataset.json",
    "data set card",
    "index",
    "spec",
    "manifest",
    "done-record",
    "model card",
    "checkpoint record",
    "checkpoint state",
    "settings",
)
