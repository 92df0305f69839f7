"""Well-known data sets by name: where their files are, their hashes, license and citation.

Addresses are those of the authors or of the mirrors that torchvision and TensorFlow Datasets use. The SHA-256 of each
file is the one that Keras (CIFAR) and TensorFlow Datasets (the others) publish.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

from ddpm_pipeline.data.packing.fetch import FileVersion, RemoteFile
from ddpm_pipeline.errors import UserError
from ddpm_pipeline.store import StoreUnreachable
from ddpm_pipeline.store.web_file import WebFile, WebFileInfo, without_secrets

DEFAULT_SPLIT = "train"
"""The split of a data set named without one: what models are trained on."""


@dataclass(frozen=True)
class KnownFile:
    """A file of a data set."""

    name: str
    sha256: str
    urls: tuple[str, ...]
    """Tried in this order."""
    split: str | None = None
    """The split that it belongs to; None for one that all need."""


@dataclass(frozen=True)
class KnownDataset:
    """A data set that is packed by its name."""

    title: str
    summary: str
    """Images, their size, classes, and bytes to fetch for the training split."""
    page: str
    license: str
    citation: str
    files: tuple[KnownFile, ...]
    splits: tuple[str, ...] = ("train", "test")
    settings: dict[str, object] = field(default_factory=dict[str, object])
    """Settings that `ddpm pack NAME` starts from."""

    def files_of(self, split: str) -> list[KnownFile]:
        """The files that a split needs."""
        return [file for file in self.files if split == "all" or file.split in (None, split)]


def _drive(file_id: str) -> tuple[str, ...]:
    """The address behind Google Drive's page that asks whether to fetch a file too large for its virus scan."""
    return (f"https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t",)


def _idx_files(hashes: dict[str, str], *mirrors: str) -> tuple[KnownFile, ...]:
    files: list[KnownFile] = []
    for stem, sha256 in hashes.items():
        name, split = f"{stem}-ubyte.gz", "test" if stem.startswith("t10k") else "train"
        files.append(KnownFile(name, sha256, tuple(f"{mirror}/{name}" for mirror in mirrors), split))
    return tuple(files)


KNOWN_DATASETS: dict[str, KnownDataset] = {
    "cifar10": KnownDataset(
        "CIFAR-10",
        "50,000 + 10,000 RGB images of 32x32, 10 classes; 170 MB",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "none stated; its page asks for the citation",
        "Krizhevsky, Learning multiple layers of features from tiny images, 2009",
        (
            KnownFile(
                "cifar-10-python.tar.gz",
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
                ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
            ),
        ),
    ),
    "cifar100": KnownDataset(
        "CIFAR-100",
        "50,000 + 10,000 RGB images of 32x32, 100 classes or 20 (label_column=coarse); 169 MB",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "none stated; its page asks for the citation",
        "Krizhevsky, Learning multiple layers of features from tiny images, 2009",
        (
            KnownFile(
                "cifar-100-python.tar.gz",
                "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
                ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
            ),
        ),
    ),
    "mnist": KnownDataset(
        "MNIST",
        "60,000 + 10,000 gray images of 28x28, 10 digits; 10 MB",
        "http://yann.lecun.com/exdb/mnist/",
        "CC BY-SA 3.0, as Keras states it",
        "LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, 1998",
        _idx_files(
            {
                "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            },
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            "https://storage.googleapis.com/cvdf-datasets/mnist",
        ),
        settings={"channels": 1},
    ),
    "fashion-mnist": KnownDataset(
        "Fashion-MNIST",
        "60,000 + 10,000 gray images of 28x28, 10 kinds of clothes; 26 MB",
        "https://github.com/zalandoresearch/fashion-mnist",
        "MIT",
        "Xiao, Rasul, Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking machine learning, 2017",
        _idx_files(
            {
                "train-images-idx3": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "train-labels-idx1": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "t10k-images-idx3": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "t10k-labels-idx1": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            },
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        ),
        settings={"channels": 1},
    ),
    "celeba": KnownDataset(
        "CelebA, aligned and cropped",
        "162,770 + 19,867 + 19,962 RGB images of 178x218, 40 attributes (label_column=Smiling); 1.5 GB",
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        "non-commercial research only; its page has the agreement",
        "Liu, Luo, Wang, Tang, Deep learning face attributes in the wild, ICCV 2015",
        (
            KnownFile(
                "img_align_celeba.zip",
                "46fb89443c578308acf364d7d379fe1b9efb793042c0af734b6112e4fd3a8c74",
                _drive("0B7EVK8r0v71pZjFTYXZWM3FlRnM"),
            ),
            KnownFile(
                "list_attr_celeba.txt",
                "f0e5da289d5ccf75ffe8811132694922b60f2af59256ed362afa03fefba324d0",
                _drive("0B7EVK8r0v71pblRyaVFSWGxPY0U"),
            ),
            KnownFile(
                "list_eval_partition.txt",
                "fc955bcb3ef8fbdf7d5640d9a8693a8431b5f2ee291a5c1449a1549e7e073fe7",
                _drive("0B7EVK8r0v71pY0NSMzRuSXJEVkk"),
            ),
        ),
        ("train", "validation", "test"),
        {"image_size": "64"},
    ),
}


class KnownRemote(RemoteFile):
    """A file of a well-known data set, at the first of its addresses that answers."""

    def __init__(self, dataset: str, file: KnownFile, folder: Path) -> None:
        """`folder`: where a copy that someone else fetched would be found."""
        self.name, self.sha256, self.where = file.name, file.sha256, without_secrets(file.urls[0])
        self._dataset, self._file, self._folder = dataset, file, folder
        self._found: WebFile | None = None

    def stat(self) -> FileVersion:
        errors: list[UserError] = []
        for url in self._file.urls:
            try:
                self._found = WebFile(url)
                info = self._found.stat()
            except UserError as error:
                errors.append(error)
                continue
            self.where = self._found.where
            return FileVersion(size_bytes=info.size_bytes, tag=info.tag)
        kind = StoreUnreachable if all(isinstance(error, StoreUnreachable) for error in errors) else UserError
        raise kind(
            f"source: {self._dataset}: {errors[0]}; or put a copy of {self.name} (SHA-256 {self.sha256}) into "
            f"{self._folder}"
        )

    def open(self, start: int, version: FileVersion) -> io.RawIOBase:
        file = self._found or WebFile(self._file.urls[0])
        return file.open(start, WebFileInfo(version.size_bytes, version.tag, ()))
