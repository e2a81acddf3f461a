"""The live service: engines that are kept alive, and an OpenAI-compatible gateway in front of them.

The way of a request: `gateway` (HTTP) → `body` (what is asked) → `dispatcher` (taken in? where? whose turn?) →
`upstream` (one engine, relayed). Beside it `supervisor` starts, watches and restarts what `engines` describe, and
`server` holds it all together.
"""
