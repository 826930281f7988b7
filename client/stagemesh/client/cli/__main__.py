"""`python -m stagemesh.client.cli`: how `stagemesh up` starts its children."""

from stagemesh.client.cli import main

main()
