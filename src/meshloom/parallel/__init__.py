"""Weave one model onto a mesh: who talks to whom, how layers are cut, and how the processes are started."""
