"""The code that MLflow stores beside registered weights ("models from code").

It is this short so that a model registered by one version of this package is loaded by every later one.
"""

from mlflow.models import set_model

from ddpm_pipeline.tracking.image_sampler import ImageSampler

set_model(ImageSampler())
