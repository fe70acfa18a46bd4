"""The same step on a cluster one does not have: fake tensors, a fake process group, and the functions that train."""
