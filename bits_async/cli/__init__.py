"""The command line: `bits-async`, over the same API that applications use, and with no power beyond it."""
