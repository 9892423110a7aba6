"""Methods of attribution, each a generator that asks for evaluations and ends with an estimate."""
