"""How fast a simulation is: fixed workloads, fedsim's engines against plain loops and other simulators.

``docs/performance.md`` has the method, the table and how to read it. What happens where:

    workloads.py   the fixed workloads as configurations
    plan.py        one workload as arrays: data, cohorts, batch order, starting parameters
    federated.py   child process: fedsim's front door, with its run folder
    sequential.py  child process: the plain PyTorch loop
    peers/         child processes: other simulators, each in an interpreter of its own
    turns.py       what a child process and its reader say to each other
    runner.py      children started and led by turns
    tree.py        CPU seconds and memory of a process tree
    report.py      the table, the JSON file, the plot, the regression check
"""
