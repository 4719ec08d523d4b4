"""The dense products of other libraries: what a layer of a user's model could run as on this machine.

Takes the weights of one layer, gives callables, and seconds of them from processes of their own. Knows none of the
sparse kernels.
"""
