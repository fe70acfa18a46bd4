"""Pictures and pages of traces and timelines. Compute and draw stay apart. No torch."""
