"""gptdist: train GPT models from scratch and fine-tune them, from a laptop CPU to a cluster."""

__version__ = "0.1.0"
