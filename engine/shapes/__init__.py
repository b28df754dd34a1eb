"""The small world of coloured shapes behind the default run."""
