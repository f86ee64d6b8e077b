"""Which parameters of a model train, and adapters beside those that do not."""
