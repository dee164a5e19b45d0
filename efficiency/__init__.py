"""Efficiency methods that apply to any network: a plain function each, and a Lightning callback for configurations."""

import importlib
from typing import Any

# Callbacks by the module that defines them; imported when asked for, since plain functions need no Lightning.
CALLBACKS = {
    "EcoFormer": "efficiency.ecoformer_callback",
    "GradientCheckpointing": "efficiency.checkpointing_callback",
    "Mesa": "efficiency.mesa_callback",
    "SPViT": "efficiency.spvit_callback",
}


def __getattr__(name: str) -> Any:
    if name not in CALLBACKS:
        raise AttributeError(f"module 'efficiency' has no attribute {name!r}")
    return getattr(importlib.import_module(CALLBACKS[name]), name)
