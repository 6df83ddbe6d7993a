"""MLPerf LoadGen as the clock of a benchmark, in a process of its own."""
