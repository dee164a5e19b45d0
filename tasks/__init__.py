"""What people run: one package per task, shared parts in `tasks.core`."""
