"""Which layers of a model go sparse on this machine, and what became of them. Changes no weight."""
