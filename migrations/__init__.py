"""The Alembic environment of the registry. `registry.database.upgrade` runs it; nothing imports it."""
