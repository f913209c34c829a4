"""Other simulators on the same arrays, each file a program for an interpreter that has that simulator.

They import the standard library, NumPy, their own simulator and ``benchmarks.speed.turns``; nothing of
fedsim.
"""
