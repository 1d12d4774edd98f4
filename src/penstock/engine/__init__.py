"""Running: put a pipeline together, call it, compare it with the plain one."""
