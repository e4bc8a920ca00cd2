"""The fault kit: what kills, stops, cuts, restarts and crashes, for the tests in ``tests/faults`` and for chaos runs."""
