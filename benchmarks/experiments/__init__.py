"""The report's open questions at small scale: recipes of runs, many at a time, and what the runs say."""
