"""Mathematics on tensors and models. Knows nothing of SQL, click or the files of the registry."""
