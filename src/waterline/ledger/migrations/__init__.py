"""How the tables came to be, a step in each file of `versions`; Alembic runs those a ledger lacks."""
