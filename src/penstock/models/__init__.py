"""What a pipeline looks like: its folder, its skeleton without weights, its components, roles and stacks."""
