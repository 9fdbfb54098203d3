"""Wan slice files in ComfyUI: 28 MB on top of a model, exactly as trained; README.md says how to install this."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
