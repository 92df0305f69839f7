"""Earlier name of `model_files`, which the code stored beside models registered by version 0.1.0 imports."""

from ddpm_pipeline.nets.model_files import load_model

__all__ = ["load_model"]
