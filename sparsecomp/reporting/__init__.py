"""Text, tables, figures and markup that reports are made of, and files written whole. Knows no report."""
