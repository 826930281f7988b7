"""The router's spans. Nothing of it is made unless an OTLP receiver is configured."""
