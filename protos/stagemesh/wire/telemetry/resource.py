"""Who makes a span or a metric: the resource of this process."""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from stagemesh.wire.telemetry.names import Attribute


def make_resource(attributes: Mapping[str, str]) -> Resource:
    """These attributes and the SDK's own; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win."""
    return Resource.create(dict(attributes)).merge(OTELResourceDetector().detect())


def service_attributes(name: str, *, version: str, instance: str) -> dict[str, str]:
    """What a router or a stage says of itself: a service each, with its address."""
    return {
        Attribute.SERVICE_NAME: name,
        Attribute.SERVICE_VERSION: version,
        Attribute.SERVICE_INSTANCE: instance,
    }
