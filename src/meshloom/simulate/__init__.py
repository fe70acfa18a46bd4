"""When would it run: durations from a device and a network, and an engine that plays traces against them. No torch."""
