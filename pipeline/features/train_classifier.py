"""`ddpm features train`: a classifier of a labelled data set, stored beside its index."""

import logging

from ddpm_pipeline.config.evaluation import FeaturesConfig
from ddpm_pipeline.data.index import load_index
from ddpm_pipeline.errors import DamageError, UserError
from ddpm_pipeline.features.classifier import accuracy, split_rows, train_classifier
from ddpm_pipeline.features.networks import ClassifierCard, features_folder, load_classifier, save_classifier
from ddpm_pipeline.features.reference_set import data_root, load_images
from ddpm_pipeline.progress import Progress
from ddpm_pipeline.store import open_store

_log = logging.getLogger(__name__)
_MAX_BYTES = 2_000_000_000


def train_features(config: FeaturesConfig, progress: Progress) -> tuple[str, ClassifierCard, bool]:
    """Train, test on the held-out images, save. Returns the folder's URI, the card, and whether it is new.

    An existing classifier of the same data and seed is kept. UserError for data without labels or with images of
    several sizes, and for a classifier less accurate than `min_accuracy`.
    """
    index = load_index(config.data)
    if index.image is None or index.num_classes is None or index.image.height != index.image.width:
        raise UserError(f"{config.data}: a classifier needs square images of one size, with labels")
    if index.num_samples * index.image.channels * index.image.height**2 > _MAX_BYTES:
        raise UserError(f"{config.data}: too large to hold in memory; set data to a part, such as one shard")
    folder = config.output or features_folder(data_root(config.data))
    store = open_store(folder)
    try:
        existing = load_classifier(store, folder).card
    except UserError:  # missing
        existing = None
    except DamageError as error:
        _log.warning("%s: training the classifier again", error)
        existing = None
    if existing is not None and (existing.data_digest, existing.seed) == (index.digest, config.seed):
        return folder, existing, False
    images, labels = load_images(index)
    train, held = split_rows(len(images), config.held_out, config.seed)
    classes = index.num_classes
    net = train_classifier(config, images[train], labels[train], classes, progress)
    found = accuracy(net, images[held], labels[held])
    if found < config.min_accuracy:
        raise UserError(
            f"features: held-out accuracy is {found:.2%}, below min_accuracy {config.min_accuracy:.2%}; "
            "train for more steps, or lower it"
        )
    card = ClassifierCard(
        image_channels=index.image.channels,
        image_size=index.image.height,
        num_classes=classes,
        channels=config.channels,
        num_features=config.num_features,
        sha256="",
        data_digest=index.digest,
        num_train=len(train),
        num_held_out=len(held),
        held_out_accuracy=found,
        seed=config.seed,
    )
    return folder, save_classifier(store, net, card), True
