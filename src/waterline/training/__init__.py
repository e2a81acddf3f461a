"""The recipe of abacus, the small reasoning model that ships with Waterline.

Read it in this order: `problems` (what is asked, and how one thinks about it), `tokens` (how that becomes numbers),
`network`, `train`, `export`, `evaluate`. Run it with ``python -m waterline.training``.

Importing this package imports neither torch nor gguf; only `network`, `train` and `export` need the extra
``waterline-llm[training]``.
"""
