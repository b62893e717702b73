"""The rivals: each module trains a prepared workload in a process of its own and reports its rounds' seconds."""
