"""One request's KV on its way from a prefill daemon to a decode daemon. Start with `states`: the theory and tables."""
