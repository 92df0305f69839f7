"""The feature network of a data set: `python -m jobs.features digits`."""

import sys
from collections.abc import Sequence

from jobs.progress import Progress
from jobs.shell import DONE, Call, guarded, parse_words, run_job
from pipeline.config.evaluate import FeaturesConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Settings in, exit code out."""
    return guarded(lambda: run_call(parse_words("features", argv)))


def run_call(call: Call) -> int:
    """Run the job that a call describes."""
    return run_job("features", FeaturesConfig, run, call, unit="steps")


def run(config: FeaturesConfig, progress: Progress) -> int:
    """Train the classifier, or find it trained."""
    import torch

    from pipeline.evaluate.train_features import train_features

    torch.set_num_threads(config.cpu_threads)
    folder, card, new = train_features(config, progress)
    print(
        f"{'trained' if new else 'there already'}: classifier of {card.num_classes} classes, "
        f"{card.held_out_accuracy:.2%} of {card.num_held_out} held-out images right"
    )
    print(f"network  {folder}/classifier.json  sha256 {card.sha256}")
    print("next     ddpm evaluate PRESET, ddpm promote PRESET")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
