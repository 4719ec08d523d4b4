"""What ``sparsecomp bench`` runs: sparse against dense engines on this machine, each ratio beside its bound.

Takes shapes, patterns and seconds, gives a result as JSON values, its tables and its plot. Knows nothing of models.
"""
