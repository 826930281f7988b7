"""What `stagemesh doctor` looks at before a node joins a mesh. Each check returns findings and raises nothing."""
