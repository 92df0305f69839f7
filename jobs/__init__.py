"""Jobs: one module each, configuration in, exit code out; and the command line over them."""
