"""People -> functions: parse, call, print. One module a verb, with a `run(arguments)`."""
