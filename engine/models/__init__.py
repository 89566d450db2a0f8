"""The models that paint: what the engine asks of one (protocol), the diffusers ones, detection and loading."""
