"""The command line `tpv`: a noun, then a verb; a file a noun."""
