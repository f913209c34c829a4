"""Imported as ``fedsim.server``; the folder sits at the top level of the repository."""

if __name__ != "fedsim.server":
    raise ImportError(f"import fedsim.server, not {__name__}: the bare name would load every class twice")
