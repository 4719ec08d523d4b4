"""``python -m bench.demo``."""

from bench.demo.job import main

if __name__ == "__main__":
    raise SystemExit(main())
