"""The whole job on a real model, beside other engines: ``python -m bench.demo``, or ``make demo``."""
