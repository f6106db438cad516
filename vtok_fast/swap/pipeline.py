"""A pipeline of diffusers in the place of a model: its VAE is what there is to accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn


def of_pipeline(model: Any) -> tuple[Any, list[str]]:
    """The VAE of a pipeline, and what the report says of it; anything else as it is. Pipelines are known by
    their base class, so that diffusers is not imported."""
    bases = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(model).__mro__}
    if isinstance(model, nn.Module) or ("diffusers", "DiffusionPipeline") not in bases:
        return model, []
    vae = getattr(model, "vae", None)
    name = type(model).__name__
    if not isinstance(vae, nn.Module):
        raise TypeError(f"model: the pipeline {name} has no vae to accelerate, got {type(vae).__name__}")
    return vae, [f"Of the pipeline {name}, its vae was accelerated; its other parts are as they were."]
