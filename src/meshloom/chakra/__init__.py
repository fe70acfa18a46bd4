"""What ran (or would run) on one rank: MLCommons Chakra execution traces, schema 0.0.4. No torch."""
