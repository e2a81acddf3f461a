"""The live service: engines that are kept alive, and an OpenAI-compatible gateway in front of them."""
