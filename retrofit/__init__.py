"""retrofit: turns a released masked-diffusion language model into one that also inserts and so writes any length."""

__version__ = "0.1.0"
