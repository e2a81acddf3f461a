"""The live service: engines that are kept alive, and an OpenAI-compatible gateway in front of them.

The way of a request: `limits` (what a stranger's connection may cost) → `gateway` (which path) → `completions`, which
asks `access` (whose is it?), `body` (what is asked?), `dispatcher` (taken in? where? whose turn?) and `books` (is there
money?) → `passage` (from as many engines as it takes) → `upstream` (one engine). Beside it `supervisor` starts, watches
and restarts what `engines` describe, and `server` holds it all together.
"""
