"""The SQL record: schema, sessions, ledger, artifact store. Knows nothing of torch."""
