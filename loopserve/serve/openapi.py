"""Describe the bodies of requests in the OpenAPI document, since routes read them within their own bounds."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def body_of(model: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """Return the keywords of a route whose body is an object of this model."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    return {"openapi_extra": {"requestBody": {"required": required, "content": content}}}


def _inlined(part: Any, definitions: dict[str, Any]) -> Any:
    """Return a part of a schema with definitions in the place of references to them; none of our models holds itself."""
    if isinstance(part, dict):
        if "$ref" in part:
            return _inlined(definitions[part["$ref"].rpartition("/")[2]], definitions)
        return {name: _inlined(each, definitions) for name, each in part.items()}
    return [_inlined(each, definitions) for each in part] if isinstance(part, list) else part
