"""The mathematics of the methods: one folder each, `api` (validate, dispatch), `reference`, `triton`."""
