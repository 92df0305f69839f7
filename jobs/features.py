"""The feature network of a data set: `ddpm features train digits`."""

from jobs.runner import DONE, JobArguments, run_job
from pipeline.config.evaluation import FeaturesConfig, PromoteConfig
from pipeline.data.index import load_index
from pipeline.progress import Progress
from pipeline.telemetry.terminal import echo
from pipeline.tracking import trust, trusted


def run_call(call: JobArguments) -> int:
    """Run the job that a call describes."""
    return run_job("features", FeaturesConfig, run, call, unit="steps")


def run(config: FeaturesConfig, progress: Progress) -> int:
    """Train the classifier, or find it trained."""
    import torch

    from pipeline.features.train_classifier import train_features

    torch.set_num_threads(config.cpu_threads)
    folder, card, new = train_features(config, progress)
    echo(
        f"{'trained' if new else 'there already'}: classifier of {card.num_classes} classes, "
        f"{card.held_out_accuracy:.2%} of {card.num_held_out} held-out images right"
    )
    echo(f"network  {folder}/classifier.json  sha256 {card.sha256}")
    echo("next     ddpm evaluate PRESET, ddpm promote PRESET")
    return DONE


def trust_call(call: JobArguments) -> int:
    """Trust what a preset's gate judges by from now on."""
    return run_job("promote", PromoteConfig, lambda c, p: trust_found(c), call, unit="images")


def trust_found(config: PromoteConfig) -> int:
    """Record the digests of the gate's feature network and measured reference as they are now; print the change."""
    from pipeline.features.networks import open_network
    from pipeline.features.reference_set import data_root, load_reference
    from pipeline.features.trust import NETWORK, REFERENCE, network_place, reference_place

    asked = config.gate.evaluate
    data, index = data_root(asked.reference), load_index(asked.reference)
    network = open_network(asked.network, data)
    measured = load_reference(index, asked.network, asked.batch_size)
    for what, place, digest in (
        (NETWORK, network_place(asked.network, data), network.digest),
        (REFERENCE, reference_place(index, asked.network, data), measured.digest),
    ):
        before = trusted(config.model, what, place)
        was = "nothing" if before is None else before.digest
        trust(config.model, what, place, digest)
        change = f"{digest} as before" if was == digest else f"{digest}, before {was}"
        echo(f"trusted  the {what} of {config.model}: {place}: {change}")
    return DONE
