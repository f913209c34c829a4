"""Imported as ``fedsim.strategies``; the folder sits at the top level of the repository."""

if __name__ != "fedsim.strategies":
    raise ImportError(f"import fedsim.strategies, not {__name__}: the bare name would load every class twice")
