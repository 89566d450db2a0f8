"""What inpainting is: torch, numpy, Pillow and diffusers only; knows nothing of ComfyUI, HTTP or the command line."""
