"""Record a real step with PyTorch's own observers and turn what they saw into a Chakra trace."""
