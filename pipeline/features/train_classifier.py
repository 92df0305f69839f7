"""`ddpm features train`: from a labelled data set to a classifier beside its index."""

import logging

from pipeline.config.evaluation import FeaturesConfig
from pipeline.data.index import load_index
from pipeline.errors import DamageError, UserError
from pipeline.features.classifier import accuracy, split_rows, train_classifier
from pipeline.features.networks import ClassifierCard, features_folder, load_classifier, save_classifier
from pipeline.features.reference_set import data_root, load_images
from pipeline.progress import Progress
from pipeline.store import open_store

_log = logging.getLogger(__name__)
_MOST_BYTES = 2_000_000_000


def train_features(config: FeaturesConfig, progress: Progress) -> tuple[str, ClassifierCard, bool]:
    """Train, test on what was held out, save. Returns the folder's URI, the card, and whether it was new.

    A classifier of the same data and seed that is there already is kept. UserError for data without labels or of
    several sizes, and for a classifier that is less accurate than `min_accuracy`.
    """
    index = load_index(config.data)
    if index.image is None or index.num_classes is None or index.image.height != index.image.width:
        raise UserError(
            f"{config.data}: square images of one size, with labels, are needed to train a classifier"
        )
    if index.num_samples * index.image.channels * index.image.height**2 > _MOST_BYTES:
        raise UserError(f"{config.data}: too large to hold in memory; name a part of it, such as one shard")
    folder = config.output or features_folder(data_root(config.data))
    store = open_store(folder)
    try:
        there = load_classifier(store, folder).card
    except UserError:  # there is none
        there = None
    except DamageError as error:
        _log.warning("%s: a classifier is trained anew", error)
        there = None
    if there is not None and (there.data_digest, there.seed) == (index.digest, config.seed):
        return folder, there, False
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
