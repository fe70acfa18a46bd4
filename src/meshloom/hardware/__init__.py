"""What a plan runs on: devices, hosts and the links between them, as data files. No torch."""
