"""2:4 products on Hopper through CUTLASS: adapters, configurations, and the libraries that are compiled."""
