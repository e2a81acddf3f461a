"""Plan, rehearse and run LLM fleets on mixed GPUs with one file and one policy."""

__version__ = "0.1.0"
