"""The benchmark suite: workloads, the implementations that compete on them, and the checks and clocks that are the same for all."""
