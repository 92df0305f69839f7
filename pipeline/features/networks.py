"""Feature networks: a classifier of `ddpm features train` or a TorchScript file, from uint8 images to features."""

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ddpm_pipeline.config.base import Settings
from ddpm_pipeline.config.evaluation import FeatureNetworkConfig
from ddpm_pipeline.config.json_document import parse_document
from ddpm_pipeline.config.plugins import PluginIdentity, require_plugin
from ddpm_pipeline.devices import divided
from ddpm_pipeline.diffusion.image_scaling import from_uint8
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.features.classifier import Classifier
from ddpm_pipeline.store import ObjectMissing, Store, open_store

N = TypeVar("N", bound=nn.Module)
CARD_KEY = "classifier.json"
WEIGHTS_KEY = "classifier.safetensors"
_MAX_CARD_BYTES = 2**16
_MAX_NETWORK_BYTES = 2**31
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Features(NamedTuple):
    """The output of a feature network for B images."""

    vectors: Tensor
    """float32 (B, F), on the CPU."""
    logits: Tensor | None
    """float32 (B, K), on the CPU; None for a network without classes."""


class FeatureNetwork(Protocol):
    """Maps each image to its features."""

    @property
    def identity(self) -> str:
        """Hex digest of weights and preprocessing: features of different identities are never compared."""
        ...

    @property
    def digest(self) -> str:
        """Hex digest of all that determines its features: what is trusted where no hash pins the network."""
        ...

    @property
    def label(self) -> str:
        """A name for people."""
        ...

    def __call__(self, images: Tensor) -> Features:
        """Features of images uint8 (B, C, H, W)."""
        ...


class OpenFeatures(Protocol):
    """What a kind of feature network does, ours or another package's: opens a network.

    Its features are a function of the image alone, on one kind of device. reference: the reference data set's folder.
    gpu: the name of the GPU to run on, None for the CPU; a process without it may open the network, to know its
    identity. settings: of the plug-in's own class (of `file`, the `FeatureNetworkConfig`).
    """

    def __call__(self, settings: Any, reference: str, gpu: str | None, /) -> FeatureNetwork: ...


@dataclass(frozen=True)
class PluginNetwork:
    """Another package's feature network: its package, version and settings are part of its identity."""

    network: FeatureNetwork
    package: PluginIdentity
    config: FeatureNetworkConfig

    @property
    def identity(self) -> str:
        """Digest of package, settings and the network's own identity."""
        return self._with(self.network.identity)

    @property
    def digest(self) -> str:
        """The same of the network's own digest."""
        return self._with(self.network.digest)

    @property
    def label(self) -> str:
        """With the package's name and version."""
        return f"{self.network.label} of {self.package}"

    def __call__(self, images: Tensor) -> Features:
        """Features of images uint8 (B, C, H, W)."""
        features = self.network(images)
        if features.vectors.ndim != 2 or len(features.vectors) != len(images):
            raise UserError(
                f"network.kind {self.config.kind!r}: {self.package} returned {tuple(features.vectors.shape)} for "
                f"{len(images)} images, not one vector for each"
            )
        return features

    def _with(self, own: str) -> str:
        document = [self.package.model_dump(mode="json"), self.config.settings, own]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


class ClassifierCard(Settings):
    """`classifier.json`: describes the weights beside it."""

    format: Literal[1] = 1
    """Version of this file's layout."""
    image_channels: int = Field(ge=1, le=64)
    """Channels of the images."""
    image_size: int = Field(ge=1, le=2**14)
    """Height and width of the images, pixels."""
    num_classes: int = Field(ge=1, le=2**20)
    """Number of classes."""
    channels: int = Field(ge=8, le=2**12, multiple_of=8)
    """Channels of the first convolutions."""
    num_features: int = Field(ge=1, le=2**16)
    """Length of a feature vector."""
    sha256: str = Field(pattern=r"^([0-9a-f]{64})?$")
    """Hex digest of `classifier.safetensors`."""
    data_digest: str = Field(max_length=128)
    """Digest of the data set it was trained on."""
    num_train: int = Field(ge=0, lt=2**53)
    """Samples it was trained on."""
    num_held_out: int = Field(ge=0, lt=2**53)
    """Samples held out from training."""
    held_out_accuracy: float = Field(ge=0, le=1)
    """Accuracy on the held-out samples."""
    seed: int = Field(ge=0, lt=2**63)
    """Seed of the split and of the training."""

    @property
    def digest(self) -> str:
        """Hex digest of the whole card, and so of the weights, whose hash it holds."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier of `ddpm features train` with its card."""

    net: Classifier
    card: ClassifierCard
    gpu: str | None = None
    """Name of the GPU that it runs on; None on a CPU."""

    @property
    def identity(self) -> str:
        """sha256 of the weights and, on a GPU, of its name."""
        return _on(self.gpu, self.card.sha256)

    @property
    def digest(self) -> str:
        """Digest of the card."""
        return self.card.digest

    @property
    def label(self) -> str:
        """Name and held-out accuracy."""
        return f"classifier of {self.card.data_digest[:12]} ({self.card.held_out_accuracy:.2%} held out)"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features and logits of images uint8 (B, C, H, W)."""
        expected = (self.card.image_channels, self.card.image_size, self.card.image_size)
        if tuple(images.shape[1:]) != expected:
            raise UserError(
                f"network: this classifier takes images {expected}, not {tuple(images.shape[1:])}; "
                "train one on images of that shape: ddpm features train data=…"
            )
        vectors, logits = self.net(from_uint8(images.to(_device(self.gpu))))
        return Features(vectors.cpu(), logits.cpu())


@dataclass(frozen=True)
class ScriptedNetwork:
    """A TorchScript file, such as Inception, that maps images to vectors."""

    module: torch.jit.ScriptModule
    config: FeatureNetworkConfig
    sha256: str
    gpu: str | None = None
    """Name of the GPU that it runs on; None on a CPU."""

    @property
    def identity(self) -> str:
        """Digest of the file's sha256, of the preprocessing and, on a GPU, of its name."""
        return _on(self.gpu, self.digest)

    @property
    def digest(self) -> str:
        """Digest of the file's sha256 and of the preprocessing."""
        preprocessing = f"{self.sha256}/{self.config.input}/{self.config.size}/{self.config.rgb}"
        return hashlib.sha256(preprocessing.encode()).hexdigest()

    @property
    def label(self) -> str:
        """The file's name."""
        return f"{(self.config.uri or '').rsplit('/', 1)[-1]} {self.sha256[:12]}"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Features of images uint8 (B, C, H, W)."""
        vectors = self.module(self._preprocess(images.to(_device(self.gpu))))
        if isinstance(vectors, (tuple, list)):
            vectors = vectors[0]
        return Features(vectors.float().flatten(1).cpu(), None)

    def _preprocess(self, images: Tensor) -> Tensor:
        config = self.config
        images = images.expand(-1, 3, -1, -1) if config.rgb and images.shape[1] == 1 else images
        values = images.float()
        if config.size is not None and config.size != images.shape[-1]:
            edge = (config.size, config.size)
            values = F.interpolate(values, edge, mode="bilinear", antialias=True, align_corners=False)
        if config.input == "uint8":
            return values.round().clamp(0, 255).to(torch.uint8)
        if config.input == "signed":
            return divided(values, 127.5) - 1
        if config.input == "unit":
            return divided(values, 255)
        mean, std = (
            torch.tensor(v, device=values.device).reshape(1, 3, 1, 1) for v in (_IMAGENET_MEAN, _IMAGENET_STD)
        )
        return (divided(values, 255) - mean) / std


def features_folder(data: str) -> str:
    """The default folder of a data set's classifier."""
    return f"{data.rstrip('/')}/features"


def save_classifier(store: Store, net: Classifier, card: ClassifierCard) -> ClassifierCard:
    """Write the weights and, last, the card with their sha256."""
    data = save_tensors({name: value.contiguous() for name, value in net.state_dict().items()})
    card = card.model_copy(update={"sha256": hashlib.sha256(data).hexdigest()})
    store.write(WEIGHTS_KEY, data)
    store.write(CARD_KEY, (json.dumps(card.model_dump(mode="json"), indent=2) + "\n").encode())
    return card


def network_uri(config: FeatureNetworkConfig, reference: str) -> str:
    """URI of the network in the settings; by default beside the reference data. Another package's is named by kind."""
    if config.plugin is not None:
        return f"plugin:{config.kind}"
    return config.uri or f"{features_folder(reference)}/{CARD_KEY}"


def open_network(config: FeatureNetworkConfig, reference: str, gpu: str | None = None) -> FeatureNetwork:
    """Load the network in the settings. UserError when it is missing, DamageError when its hash is wrong.

    `gpu` names the GPU of this process, if the network is to run there: its features are of another identity. A process
    without that GPU may open the network to know its identity, but not run it.
    """
    found = require_plugin(config, "network.kind")
    open_features: OpenFeatures = found.plugin.load()
    network = open_features(config.options, reference, gpu)
    return network if found.identity is None else PluginNetwork(network, found.identity, config)


def open_file(config: FeatureNetworkConfig, reference: str, gpu: str | None) -> FeatureNetwork:
    """The network at the settings' `uri` as a kind of feature network."""
    uri = network_uri(config, reference)
    folder, _, name = uri.rpartition("/")
    store = open_store(folder)
    if name == CARD_KEY:
        return load_classifier(store, uri, config.sha256, gpu)
    if not name.endswith((".pt", ".ts")):
        raise UserError(
            f"network.uri: {uri} is neither {CARD_KEY} nor a TorchScript file (.pt, .ts); see docs/quality.md"
        )
    if config.sha256 is None:
        raise UserError(
            f"network.sha256: required for {name}, because a TorchScript file contains code; set the digest you trust"
        )
    data = _read(store, name, uri, _MAX_NETWORK_BYTES)
    if hashlib.sha256(data).hexdigest() != config.sha256:
        raise DamageError(f"{uri}: its sha256 is {hashlib.sha256(data).hexdigest()}, not {config.sha256}")
    try:
        module = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{uri}: not a TorchScript file ({reason}); see docs/quality.md") from None
    return ScriptedNetwork(_moved(module, gpu), config, config.sha256, gpu)


def network_exists(config: FeatureNetworkConfig) -> bool:
    """Whether the file at the settings' uri exists; a plug-in has none."""
    if config.plugin is not None:
        return True
    folder, _, name = (config.uri or "").rpartition("/")
    return bool(name) and open_store(folder).stat(name) is not None


def load_classifier(
    store: Store, uri: str, sha256: str | None = None, gpu: str | None = None
) -> TrainedClassifier:
    """The classifier whose card is in `store`. DamageError unless its weights have `sha256`, if given."""
    data = _read(store, CARD_KEY, uri, _MAX_CARD_BYTES)
    card = parse_document(ClassifierCard, data, uri, "a classifier's card")
    data = _read(store, WEIGHTS_KEY, uri, _MAX_NETWORK_BYTES)
    found = hashlib.sha256(data).hexdigest()
    if found != card.sha256 or sha256 not in (None, found):
        raise DamageError(f"{store.uri}/{WEIGHTS_KEY}: its sha256 is {found}, not {sha256 or card.sha256}")
    # On "meta" a net takes no memory, so a damaged card cannot ask for more than the file of the weights holds.
    with torch.device("meta"):
        net = Classifier(
            card.image_channels, card.image_size, card.num_classes, card.channels, card.num_features, 0.0
        )
    try:
        net.load_state_dict(load_tensors(data), assign=True)
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DamageError(f"{uri}: the weights do not fit the card: {reason}") from None
    return TrainedClassifier(_moved(net.float().eval().requires_grad_(False), gpu), card, gpu)


def _on(gpu: str | None, identity: str) -> str:
    """The identity of a network on a device: features that were rounded differently are not compared."""
    return identity if gpu is None else hashlib.sha256(f"{identity} on {gpu}".encode()).hexdigest()


def _device(gpu: str | None) -> torch.device:
    return torch.device("cpu" if gpu is None else "cuda")


def _moved(net: N, gpu: str | None) -> N:
    """On its device, where this process has it."""
    return net if gpu is None or not torch.cuda.is_available() else net.to("cuda")


def _read(store: Store, key: str, uri: str, max_bytes: int) -> bytes:
    """An object of a feature network. UserError when it is missing, DamageError for more than `max_bytes`."""
    try:
        found = store.stat(key)
        if found is not None and found.size_bytes > max_bytes:
            raise DamageError(f"{store.uri}/{key}: has {found.size_bytes} bytes, more than {max_bytes}")
        return store.read(key)
    except ObjectMissing:
        raise UserError(
            f"network.uri: {uri}: {key} does not exist; train a feature network with: ddpm features train data=…, "
            "or set network.uri"
        ) from None
