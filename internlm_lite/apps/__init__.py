"""Programs around a run: planner, doctor, report, conversion, benchmarks. Training code does not import them."""
