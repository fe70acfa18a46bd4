"""Generate: prompts in, tokens out, one step after another on all ranks of a plan."""
