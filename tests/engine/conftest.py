"""How property tests run."""

from hypothesis import settings

# a busy machine is not a failure, and neither is an example that nobody saw before
settings.register_profile("mend", deadline=None, derandomize=True)
settings.load_profile("mend")
