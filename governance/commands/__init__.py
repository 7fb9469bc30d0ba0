"""The command groups, one module each: parse, call a use case, render. Loaded lazily by `cli`."""
