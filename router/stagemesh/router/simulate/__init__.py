"""A lane in virtual time: the router's own scheduler over stages, links and a load that a YAML file describes."""
