"""Trains and measures mend-shapes, the small inpainting model that comes with the project.

``python -m comfyui_mend.training`` makes it from nothing, ``python -m comfyui_mend.training.evaluate`` measures it.
"""
