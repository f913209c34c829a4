"""Imported as ``fedsim.client``; the folder sits at the top level of the repository."""

if __name__ != "fedsim.client":
    raise ImportError(f"import fedsim.client, not {__name__}: the bare name would load every class twice")
